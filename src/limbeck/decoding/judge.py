"""What the target makes of drafted tokens: how many stand, and which token comes after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.decoding.drafts import Block
from limbeck.decoding.live import ACCEPT, TARGET, Live, random_numbers, served_at, shape_of
from limbeck.decoding.sampler import draw
from limbeck.decoding.verify import accepts, leading, overlap, residual, residual_of_point


@dataclass(frozen=True, eq=False)
class Verdict:
    """The first `accepted` of `tokens` are drafted ones that stand, the last is drawn after them; `logprobs` are raw.
    `alpha` and `alpha_raw` (empty unless asked for): one for each drafted token judged, a rejected one included.
    `error`: why a token could not be had; then `tokens` are those before it. `finite`: no NaN in all that was read for
    the row, behind a rejected token neither."""

    tokens: list[int]
    logprobs: list[float]
    accepted: int
    alpha: list[float]
    alpha_raw: list[float]
    error: str | None = None
    finite: bool = True


def judge(rows: Sequence[Live], logits_BQV: Tensor, blocks: Sequence[Block | None], *, want_raw: bool) -> list[Verdict]:
    """One verdict a row. logits_BQV[b, j]: the target's raw logits (float32) at index len(tokens) + j, given the first
    j tokens of the row's block (None: nobody drafted for it)."""
    units: dict[object, list[int]] = {}
    for place, (row, block) in enumerate(zip(rows, blocks, strict=True)):
        proposal = None if block is None else id(block.proposal)
        units.setdefault((proposal, shape_of(row.request.sampling)), []).append(place)
    verdicts: dict[int, Verdict] = {}
    for places in units.values():
        logits_bQV = logits_BQV if len(places) == len(rows) else logits_BQV[places]
        own = [block for place in places if (block := blocks[place]) is not None]  # all of them, or none
        unit = _Unit([rows[place] for place in places], logits_bQV, own)
        verdicts.update(zip(places, unit.verdicts(want_raw), strict=True))
    return [verdicts[place] for place in range(len(rows))]


def _trouble(logprobs: list[float], served: list[float]) -> tuple[str | None, int]:
    """(what is wrong with a row's tokens or None, how many of them come before it)."""
    for place, (logprob, logit) in enumerate(zip(logprobs, served, strict=True)):
        if logprob != logprob:
            return "expected finite logits, found NaN: check the target's weights and dtype", place
        if logit == -torch.inf:
            return "expected a token to draw, found all ruled out: lower no_repeat_ngram_size or min_tokens", place
    return None, len(logprobs)


class _Unit:
    """Rows whose tokens one proposal drafted, or nobody, and whose distributions have one shape."""

    def __init__(self, rows: list[Live], logits_bQV: Tensor, blocks: list[Block]) -> None:
        self.rows = rows
        self.proposal = blocks[0].proposal if blocks else None
        self.lines = [block.line for block in blocks]
        self.texts = [block.tokens for block in blocks] or [[] for _ in rows]
        self.counts = [len(text) for text in self.texts]
        self.most = max(self.counts)
        self.logits_bqV = logits_bQV[:, : self.most + 1]
        padded = [[*text, *[0] * (self.most - len(text))] for text in self.texts]
        self.drafted_bg = torch.tensor(padded, dtype=torch.long, device=logits_bQV.device)

    def verdicts(self, want_raw: bool) -> list[Verdict]:
        width = self.most + 1
        contexts = [(row, text[:j]) for row, text in zip(self.rows, self.texts, strict=True) for j in range(width)]
        served_bqV = served_at(self.logits_bqV.flatten(0, 1), contexts).unflatten(0, (-1, width))
        greedy = self.rows[0].request.sampling.temperature == 0
        accepted, last_b, alpha_bg = (self._greedy if greedy else self._sampled)(served_bqV)
        total_bq = self.logits_bqV.logsumexp(-1)
        alpha_raw_bg = self._alpha_raw(total_bq) if want_raw and self.most else None
        verdicts: list[Verdict] = []
        for place, (count, kept, last) in enumerate(zip(self.counts, accepted, last_b.tolist(), strict=True)):
            tokens = [*self.texts[place][:kept], last]
            steps = range(kept + 1)
            logprobs = (self.logits_bqV[place, steps, tokens] - total_bq[place, : kept + 1]).tolist()
            error, good = _trouble(logprobs, served_bqV[place, steps, tokens].tolist())
            kept, judged = min(kept, good), min(kept + 1, count, good)
            alpha_raw = [] if alpha_raw_bg is None else alpha_raw_bg[place, :judged].tolist()
            alpha = alpha_bg[place, :judged].tolist()
            finite = bool(torch.isfinite(total_bq[place, : count + 1]).all())
            verdicts.append(Verdict(tokens[:good], logprobs[:good], kept, alpha, alpha_raw, error, finite))
        return verdicts

    def _greedy(self, served_bqV: Tensor) -> tuple[list[int], Tensor, Tensor]:
        """(accepted, the token after them, alpha): p and q are point masses."""
        choice_bq = served_bqV.argmax(-1)
        kept_bg = choice_bq[:, : self.most] == self.drafted_bg
        accepted = leading(kept_bg, self.counts)
        return accepted, choice_bq[range(len(accepted)), accepted], kept_bg.double()

    def _sampled(self, served_bqV: Tensor) -> tuple[list[int], Tensor, Tensor]:
        device, lines = served_bqV.device, range(len(self.rows))
        after_bq = random_numbers(self.rows, TARGET, self.most + 1).to(device)
        if not self.most:
            return [0] * len(self.rows), draw(served_bqV[:, 0], after_bq[:, 0]), served_bqV.new_zeros(len(lines), 0)
        p_bqV = served_bqV.softmax(-1)
        p_bgV, ids_D = p_bqV[:, :-1], None if self.proposal is None else self.proposal.ids_D
        p_bg = p_bgV.gather(-1, self.drafted_bg[..., None])[..., 0]
        uniforms_bg = random_numbers(self.rows, ACCEPT, self.most).to(device)
        q_bgD = self._of_draft("served_BGD")
        if q_bgD is None:
            q_bg: Tensor | float = 1.0
            alpha_bg = p_bg
        else:
            places_bg = self._of_draft("places_BG", softmax=False)
            assert places_bg is not None
            q_bg = q_bgD.gather(-1, places_bg[..., None])[..., 0]
            alpha_bg = overlap(p_bgV.flatten(0, 1), q_bgD.flatten(0, 1), ids_D).view_as(p_bg)
        accepted = leading(accepts(p_bg, q_bg, uniforms_bg), self.counts)
        final_bV = served_bqV[lines, accepted]
        for place, (kept, count) in enumerate(zip(accepted, self.counts, strict=True)):
            if kept == count:
                continue
            at_V = p_bqV[place, kept][None]
            if q_bgD is None:
                rest_V = residual_of_point(at_V, self.drafted_bg[place, kept][None])
            else:
                rest_V = residual(at_V, q_bgD[place, kept][None], ids_D)
            final_bV[place] = rest_V[0].log()
        return accepted, draw(final_bV, after_bq[lines, accepted]), alpha_bg

    def _alpha_raw(self, total_bq: Tensor) -> Tensor:
        """sum_v min(p, q) at temperature 1, unfiltered."""
        logits_bgV, total_bg1 = self.logits_bqV[:, :-1], total_bq[:, :-1, None]
        q_bgD = self._of_draft("raw_BGD")
        if q_bgD is None:
            return (logits_bgV.gather(-1, self.drafted_bg[..., None]) - total_bg1)[..., 0].exp()
        ids_D = self.proposal.ids_D if self.proposal else None
        logits_bgD = logits_bgV if ids_D is None else logits_bgV[..., ids_D]  # few of them: not after a pass over all
        return torch.minimum((logits_bgD - total_bg1).exp(), q_bgD).sum(-1)

    def _of_draft(self, name: str, *, softmax: bool = True) -> Tensor | None:
        """What the proposal holds for these rows; logits as probabilities."""
        held_BG: Tensor | None = None if self.proposal is None else getattr(self.proposal, name)
        if held_BG is None:
            return None
        if len(self.lines) != held_BG.shape[0]:
            held_BG = held_BG[self.lines]
        held_BG = held_BG[:, : self.most]
        return held_BG.softmax(-1) if softmax else held_BG
