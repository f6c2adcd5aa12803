"""Drafting one token at a time, for any draft that turns tokens into logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from limbeck.decoding.drafts import GoOn, Proposal
from limbeck.decoding.drafts.head import Vocabulary
from limbeck.decoding.live import DRAFT, Live, by_shape, random_numbers, served_at
from limbeck.decoding.sampler import draw

_STEP = 2


def behind(unread: int) -> int:
    """Columns that a row with so many unread ones reads before its first step, which is made for two at most: those of
    its newest token and of the drafted one before it, which the draft itself has not read."""
    return 0 if unread <= _STEP else unread - 1


def draft_by_steps(
    rows: Sequence[Live],
    most: Sequence[int],
    go_on: GoOn,
    first: Callable[[], Tensor],
    then: Callable[[list[int], int], Tensor],
    vocabulary: Vocabulary,
) -> Proposal:
    """first() gives the raw logits (B, D) of the token after each row's newest; then(tokens, j) those after the j-th
    drafted one, with each row's newest drafted token (any, for a row that takes no more)."""
    ids_D = vocabulary.ids_D
    proposal = Proposal(rows, [[] for _ in rows], [[] for _ in rows], ids_D=ids_D)
    sampled = any(row.request.sampling.temperature > 0 for row in rows)
    uniforms_BG = random_numbers(rows, DRAFT, max(most)) if sampled else None
    groups = by_shape(rows)
    raw: list[Tensor] = []
    served: list[Tensor] = []
    places: list[Tensor] = []
    live = [limit > 0 for limit in most]
    newest = [row.tokens[-1] for row in rows]
    while any(live):
        step = len(raw)
        raw_BD = then(newest, step) if step else first()
        uniforms_B = None if uniforms_BG is None else uniforms_BG[:, step]
        served_BD, places_B = _drawn(raw_BD, proposal, groups, uniforms_B, vocabulary.size)
        chosen_2B = torch.stack((_at(raw_BD, places_B), _at(served_BD, places_B)))
        confidence_B = (chosen_2B[0] - raw_BD.logsumexp(-1)).exp()
        ids_B = places_B if ids_D is None else ids_D[places_B]
        if not torch.isfinite(confidence_B).all():
            proposal.finite = False
            break
        raw.append(raw_BD)
        served.append(served_BD)
        places.append(places_B)
        drawable = (chosen_2B[1] > -torch.inf).tolist()
        for place, (token, confidence) in enumerate(zip(ids_B.tolist(), confidence_B.tolist(), strict=True)):
            live[place] = live[place] and drawable[place]
            if live[place]:
                newest[place] = token
                proposal.tokens[place].append(token)
                proposal.confidence[place].append(confidence)
                ended = token in rows[place].request.sampling.stop_tokens
                live[place] = not ended and step + 1 < most[place]
        if any(live) and not go_on(rows, proposal.confidence):
            break
    proposal.steps = len(raw)
    if raw:
        proposal.raw_BGD = torch.stack(raw, 1)
        proposal.served_BGD = torch.stack(served, 1) if sampled else None
        proposal.places_BG = torch.stack(places, 1)
    return proposal


def _at(values_BD: Tensor, places_B: Tensor) -> Tensor:
    return values_BD.gather(1, places_B[:, None])[:, 0]


def _drawn(
    raw_BD: Tensor, proposal: Proposal, groups: list[list[int]], uniforms_B: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """(logits as served, columns of the tokens drawn from them)."""
    if len(groups) == 1:
        return _drawn_together(raw_BD, list(range(len(proposal.rows))), proposal, uniforms_B, size)
    served_BD, places_B = torch.empty_like(raw_BD), raw_BD.new_empty(len(raw_BD), dtype=torch.long)
    for group in groups:
        uniforms_b = None if uniforms_B is None else uniforms_B[group]
        served_BD[group], places_B[group] = _drawn_together(raw_BD[group], group, proposal, uniforms_b, size)
    return served_BD, places_B


def _drawn_together(
    raw_bD: Tensor, group: list[int], proposal: Proposal, uniforms_b: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    contexts = [(proposal.rows[place], proposal.tokens[place]) for place in group]
    served_bD = served_at(raw_bD, contexts, proposal.ids_D, size)
    if uniforms_b is None or contexts[0][0].request.sampling.temperature == 0:
        return served_bD, served_bD.argmax(-1)
    return served_bD, draw(served_bD, uniforms_b.to(served_bD.device))
