"""The speculative engine: a draft proposes, the target verifies all of it in one pass, and nothing of the target's
distribution changes (see `verify`). Requests join and leave between rounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from limbeck.decoding.clock import now
from limbeck.decoding.controller import Controller, Drafted, Round
from limbeck.decoding.drafting import drafted
from limbeck.decoding.drafts import Block, Draft
from limbeck.decoding.judge import Verdict, judge
from limbeck.decoding.live import Live
from limbeck.decoding.modes import evaluating
from limbeck.decoding.pieces import PIECE
from limbeck.decoding.reader import Reader, check_rotation
from limbeck.decoding.records import check_prompt
from limbeck.decoding.requests import Event, FinishReason, Observation, Observed, Observer, Request
from limbeck.errors import PreflightError, RolloutError


@dataclass
class Seconds:
    """Where the time inside `step` went. They add up to it: `overhead` is all the rest."""

    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    overhead: float = 0.0


class Engine:
    """Serves requests by rounds.

    target: a causal model of transformers, whose layers keep plain keys and values. tokenizer: for stop strings alone.
    drafts: by name; `controller` says which of them drafts and how much. max_batch: requests served at once, the others
    wait. context: tokens of a request at most, prompt and completion (None: what the target reads, which is the most):
    keys and values take memory by it. observer: is shown every pass of the target that gives tokens, inside `step`.
    reader: that of another engine of the target, whose weights in the order of products are shared so; of the two one
    alone has requests at a time.

    `add` and `cancel` may be called from other threads than the one that calls `step`. Raises RolloutError for a target
    that it cannot run (see `Reader`, `check_rotation`) and a context of less than 2 tokens, PreflightError for a draft
    of another vocabulary and for a controller's choice of a draft that is not there.
    """

    def __init__(
        self,
        target: Any,
        tokenizer: Any,
        drafts: Mapping[str, Draft],
        controller: Controller,
        *,
        max_batch: int,
        context: int | None = None,
        observer: Observer | None = None,
        reader: Reader | None = None,
    ) -> None:
        check_rotation(target)
        self.reader = reader or Reader(target)
        if context is not None and context < 2:
            raise RolloutError(f"context: expected 2 tokens or more, found {context}: name another")
        self.reader.rows.bound(context)
        self.context = self.reader.rows.most
        self.modules = tuple(self.reader.model.modules())
        self.vocabulary = self.reader.head.size
        self.tokenizer = tokenizer
        self.drafts = dict(drafts)
        for draft in self.drafts.values():
            draft.bind(self.vocabulary, self.context)
        self.taps = tuple(sorted({tap for draft in self.drafts.values() for tap in draft.taps}))
        self.own_taps = {name: [self.taps.index(tap) for tap in draft.taps] for name, draft in self.drafts.items()}
        unknown = [name for name in controller.names if name not in self.drafts]
        if unknown:
            known = ", ".join(self.drafts) or "none"
            raise PreflightError(
                f"controller: expected the engine's drafts ({known}), found {unknown[0]}: add it to them"
            )
        self.controller = controller
        self.max_batch = max_batch
        self.observer = observer
        self.rows: list[Live] = []  # in the order of their slots, without gap
        self.reading: deque[Live] = deque()  # those whose prompts are still read, by turns
        self.waiting: deque[Request] = deque()
        self.cancelled: deque[str] = deque()
        self.seconds = Seconds()
        self.target_passes = 0

    # -- requests ----------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Takes a request in. RolloutError for one that cannot be served: no tokens, too many, others than the
        vocabulary's, more than one sample, a route without draft."""
        sampling = request.sampling
        check_prompt(request.tokens, self.context, self.vocabulary)
        sampling.check(self.tokenizer, self.vocabulary)
        if sampling.n != 1 or sampling.max_tokens < 1:
            raise RolloutError(
                f"expected n = 1 and max_tokens of at least 1, found {sampling.n} and {sampling.max_tokens}: add a "
                "request for each sample"
            )
        if request.route is not None and request.route not in self.drafts:
            known = ", ".join(self.drafts) or "none"
            raise RolloutError(f"expected the route of a draft ({known}), found {request.route!r}: leave it out")
        self.waiting.append(request)

    def cancel(self, id: str) -> None:
        """Ends a request at the next step; one that is not there is not missed."""
        self.cancelled.append(id)

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.waiting or self.cancelled)

    def probe(self, widths: Sequence[int] = (1, 2, 4, 6, 8, 12, 16)) -> None:
        """Tells the controller what passes of the target cost. To be called before anything is served."""
        limit, device = self.context, self.reader.device
        with evaluating(self.modules):
            self.reader.read([0], [[0]], [0])
            for width in [width for width in widths if limit is None or width < limit]:
                seconds: list[float] = []
                for _ in range(2):
                    start = now(device)
                    hidden_BQH, _ = self.reader.read([0], [[0] * width], [1])
                    self.reader.logits(hidden_BQH[0])
                    seconds.append(now(device) - start)
                self.controller.probed(width, min(seconds))
            self.reader.rows.forget(0)

    # -- a round -----------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """One round: a piece of the prompts of those who have joined is read, and each request whose prompt is read
        gets at least one token."""
        start, timed = perf_counter(), self._timed()
        with evaluating(self.modules):
            events = self._drop_cancelled()
            self._admit()
            if self.reading:
                events += self._read_prompts()
            rows = [row for row in self.rows if not row.joining]
            if rows:
                events += self._round(rows)
        self.seconds.overhead += perf_counter() - start - (self._timed() - timed)
        return events

    def _timed(self) -> float:
        return self.seconds.prefill + self.seconds.draft + self.seconds.verify

    def _drop_cancelled(self) -> list[Event]:
        gone: set[str] = set()
        while self.cancelled:
            gone.add(self.cancelled.popleft())
        if not gone:
            return []
        waiting = [self.waiting.popleft() for _ in range(len(self.waiting))]
        self.waiting.extendleft(reversed([request for request in waiting if request.id not in gone]))
        events = [Event(request.id, [], [], "cancelled") for request in waiting if request.id in gone]
        for row in [row for row in self.rows if row.request.id in gone]:
            events.append(Event(row.request.id, [], [], "cancelled", row.counters))
            if row.joining:
                self.reading.remove(row)
                self.reader.rows.forget(row.slot)  # whether there is NaN shows at its prompt's end alone
            self._leave(row)
        return events

    def _admit(self) -> None:
        """Waiting requests take the free slots, in their order."""
        while self.waiting and len(self.rows) < self.max_batch:
            request = self.waiting.popleft()
            end = len(request.tokens) + request.sampling.max_tokens
            row = Live(request, end if self.context is None else min(end, self.context), len(self.rows))
            self.rows.append(row)
            self.reading.append(row)
            for draft in self.drafts.values():
                draft.open(row)
        self.reader.rows.keep(len(self.rows))

    def _read_prompts(self) -> list[Event]:
        """One pass over the next pieces of prompts, of as many as there is room for; a prompt that is not whole after
        it waits for the others' turns. The first tokens of those that are."""
        start = now(self.reader.device)
        rows: list[Live] = []
        width = 0
        for row in self.reading:
            longer = max(width, min(row.prompt - row.read, PIECE))
            if rows and longer * (len(rows) + 1) > PIECE:
                break
            rows, width = [*rows, row], longer
        starts = [row.read for row in rows]
        texts = [row.tokens[row.read : min(row.read + width, row.prompt)] for row in rows]
        hidden_BTH, tapped_BTF = self._read(rows, texts, starts)
        for row, text in zip(rows, texts, strict=True):
            self.reading.popleft()
            row.read += len(text)
        whole = [place for place, row in enumerate(rows) if not row.joining]
        for place, row in enumerate(rows):
            if row.joining:
                self.reading.append(row)
                self._settle_piece(row, None if tapped_BTF is None else tapped_BTF[place, : len(texts[place])])
        if not whole:
            self.seconds.prefill += now(self.reader.device) - start
            return []
        logits_BV = self.reader.logits(hidden_BTH[whole, [len(texts[place]) - 1 for place in whole]])
        self.seconds.prefill += now(self.reader.device) - start
        ready, begun = [rows[place] for place in whole], [starts[place] for place in whole]
        tapped_BTF = tapped_BTF if tapped_BTF is None or len(whole) == len(rows) else tapped_BTF[whole]
        return self._settle(ready, [None] * len(ready), logits_BV[:, None], begun, tapped_BTF)[0]

    def _settle_piece(self, row: Live, hidden_TF: Tensor | None) -> None:
        """What there is to keep of a piece of a prompt that is not whole yet."""
        if hidden_TF is not None:
            if self.observer is not None and row.request.train:
                row.tapped.append(hidden_TF.clone())
            for name, draft in self.drafts.items():
                draft.settle(row, row.read, self.tapped_by(name, hidden_TF))

    def _round(self, rows: list[Live]) -> list[Event]:
        begin = perf_counter()
        drafting = drafted(rows, self.drafts, self.controller)
        self.seconds.draft += sum(drafting.seconds.values())
        blocks = drafting.blocks
        texts = [[row.tokens[-1], *(block.tokens if block else ())] for row, block in zip(rows, blocks, strict=True)]
        start = now(self.reader.device)
        starts = [len(row.tokens) - 1 for row in rows]
        hidden_BQH, tapped_BQF = self._read(rows, texts, starts)
        logits_BQV = self.reader.logits(hidden_BQH.flatten(0, 1)).unflatten(0, hidden_BQH.shape[:2])
        verify_s = now(self.reader.device) - start
        self.seconds.verify += verify_s
        events, verdicts = self._settle(rows, blocks, logits_BQV, starts, tapped_BQF)
        seen: list[Drafted] = []
        for row, block, verdict in zip(rows, blocks, verdicts, strict=True):
            if block is not None:
                kept = [place < verdict.accepted for place in range(len(verdict.alpha))]
                version = self.drafts[block.name].version
                seen.append(Drafted(row, block.name, block.confidence[: len(kept)], kept, version))
        ended = [len(row.tokens) - row.prompt for row, event in zip(rows, events, strict=True) if event.finish_reason]
        width, tokens = logits_BQV.shape[1], sum(len(event.tokens) for event in events)
        costs = drafting.seconds, drafting.step_seconds, seen, drafting.read, ended
        self.controller.record(Round(len(rows), width, tokens, perf_counter() - begin, verify_s, *costs))
        return events

    def _read(
        self, rows: Sequence[Live], texts: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """A pass of the target."""
        self.target_passes += 1
        return self.reader.read([row.slot for row in rows], texts, starts, self.taps)

    # -- what comes of a pass ----------------------------------------------------------------------------------------

    def _settle(
        self,
        rows: Sequence[Live],
        blocks: Sequence[Block | None],
        logits_BQV: Tensor,
        starts: Sequence[int],
        tapped_BQF: Tensor | None,
    ) -> tuple[list[Event], list[Verdict]]:
        """Gives each row its tokens; those that end leave. The pass has read the columns from `starts` on."""
        watched = self.observer is not None and any(row.request.train for row in rows)
        verdicts = judge(rows, logits_BQV, blocks, want_raw=watched)
        events: list[Event] = []
        observed: list[Observed] = []
        for row in rows:
            row.counters.rounds += 1
        for place, (row, verdict, block) in enumerate(zip(rows, verdicts, blocks, strict=True)):
            before = len(row.tokens)
            if verdict.error is not None and not verdict.finite and block is not None:
                # NaN may come of a drafted token, and then reaches the ones before it: once more, without any.
                row.alone, block = True, None
                verdict = verdicts[place] = Verdict([], [], 0, [], [], finite=False)
            event = self._give(row, verdict, block)
            events.append(event)
            kept = len(event.tokens)
            hidden_TF = None
            if tapped_BQF is not None:
                hidden_TF = tapped_BQF[place, : before - starts[place] + kept - 1]
            if watched and row.request.train and kept:
                observed.append(self._observed(row, verdict, block, before, logits_BQV[place, :kept], hidden_TF))
                row.tapped.clear()
            if event.finish_reason is None:
                for name, draft in self.drafts.items():
                    draft.settle(row, before + min(verdict.accepted, kept), self.tapped_by(name, hidden_TF))
        if self.observer is not None and observed:
            self.observer(Observation(observed))
        # Nobody moves into another slot before all NaN is gone: it would move along.
        for row, verdict, event in zip(rows, verdicts, events, strict=True):
            if not verdict.finite:
                self.reader.rows.forget(row.slot, 0 if event.finish_reason else len(row.tokens) - 1)
        for row, event in zip(rows, events, strict=True):
            if event.finish_reason is not None:
                self._leave(row)
        return events, verdicts

    def _give(self, row: Live, verdict: Verdict, block: Block | None) -> Event:
        """The tokens that the completion takes are the row's now, and counted."""
        kept, reason = self._written(row, verdict)
        tokens, judged = verdict.tokens[:kept], min(len(verdict.alpha), kept)
        row.tokens += tokens
        counters = row.counters
        counters.drafted += len(block.tokens) if block else 0
        counters.accepted += min(verdict.accepted, kept)
        counters.verified += judged
        counters.alpha_sum += sum(verdict.alpha[:judged])
        error = verdict.error if reason == "error" else None
        return Event(row.request.id, tokens, verdict.logprobs[:kept], reason, counters if reason else None, error)

    def _observed(
        self,
        row: Live,
        verdict: Verdict,
        block: Block | None,
        start: int,
        logits_nV: Tensor,
        hidden_TF: Tensor | None,
    ) -> Observed:
        judged = min(len(verdict.alpha), len(logits_nV))
        if hidden_TF is not None and row.tapped:
            hidden_TF = torch.cat([*row.tapped, hidden_TF])
        return Observed(
            row.request,
            row.tokens,
            start,
            logits_nV,
            drafted=tuple(block.tokens[:judged]) if block else (),
            accepted=min(verdict.accepted, len(logits_nV)),
            alpha=tuple(verdict.alpha[:judged]),
            alpha_raw=tuple(verdict.alpha_raw[:judged]),
            hidden_TF=hidden_TF,
            draft=block.name if block else None,
            version=self.drafts[block.name].version if block else 0,
        )

    def tapped_by(self, name: str, hidden_TF: Tensor | None) -> Tensor | None:
        """What one draft reads of the hidden states of all `taps`."""
        own = self.own_taps[name]
        if hidden_TF is None or not own:
            return None
        if own == list(range(len(self.taps))):
            return hidden_TF
        return hidden_TF.unflatten(-1, (len(self.taps), -1))[:, own].flatten(1)

    def _written(self, row: Live, verdict: Verdict) -> tuple[int, FinishReason | None]:
        """(how many of the verdict's tokens the completion takes, why it ends with them or None)."""
        sampling, tokens = row.request.sampling, verdict.tokens
        before = len(row.tokens) - row.prompt
        text = row.tokens[-sampling.tail - 1 :] if sampling.stop_strings else []
        for place, token in enumerate(tokens):
            text.append(token)
            if token in sampling.stop_tokens or sampling.completes(self.tokenizer, [text], [before + place + 1])[0]:
                return place + 1, "stop"
            if place + 1 == row.left:
                return place + 1, "length"
        return len(tokens), None if verdict.error is None else "error"

    def _leave(self, row: Live) -> None:
        """The last row takes the slot."""
        mover = self.rows.pop()
        self.reader.rows.keep(len(self.rows))
        for draft in self.drafts.values():
            draft.close(row)
        if mover is row:
            return
        self.reader.rows.copy_row(mover.slot, row.slot)
        if mover.joining:
            self.reader.rows.forget(mover.slot)
        for draft in self.drafts.values():
            draft.move(mover.slot, row.slot)
        self.rows[row.slot] = mover
        mover.slot = row.slot
