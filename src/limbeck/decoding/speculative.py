"""The speculative engine: a draft proposes, the target verifies all of it in one pass, and nothing of the target's
distribution changes (see `verify`). Requests join and leave between rounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from torch import Tensor

from limbeck.decoding.controller import Controller, Drafted, Fixed, Round
from limbeck.decoding.drafts import Block, Draft
from limbeck.decoding.judge import Verdict, judge
from limbeck.decoding.live import Live
from limbeck.decoding.modes import evaluating
from limbeck.decoding.reader import Reader
from limbeck.decoding.records import Completion, check_prompt
from limbeck.decoding.requests import Event, FinishReason, Observation, Observed, Observer, Request
from limbeck.decoding.sampler import Sampling
from limbeck.errors import PreflightError, RolloutError

_PREFILL_TOKENS = 4096  # prompt tokens, padding included, in one forward: those who are being served wait for it


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
    wait. observer: is shown every pass of the target, inside `step`.

    `add` and `cancel` may be called from other threads than the one that calls `step`. Raises RolloutError for a target
    that it cannot run (see `Reader`), PreflightError for a draft of another vocabulary and for a controller's choice of
    a draft that is not there.
    """

    def __init__(
        self,
        target: Any,
        tokenizer: Any,
        drafts: Mapping[str, Draft],
        controller: Controller,
        *,
        max_batch: int,
        observer: Observer | None = None,
    ) -> None:
        self.reader = Reader(target)
        self.modules = tuple(self.reader.model.modules())
        self.vocabulary = self.reader.head.size
        self.tokenizer = tokenizer
        self.drafts = dict(drafts)
        for draft in self.drafts.values():
            draft.bind(self.vocabulary)
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
        self.waiting: deque[Request] = deque()
        self.cancelled: deque[str] = deque()
        self.seconds = Seconds()
        self.target_passes = 0

    # -- requests ----------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Takes a request in. RolloutError for one that cannot be served: no tokens, too many, others than the
        vocabulary's, more than one sample, a route without draft."""
        sampling = request.sampling
        check_prompt(request.tokens, self.reader.limit, self.vocabulary)
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
        limit = self.reader.limit
        with evaluating(self.modules):
            self.reader.read([0], [[0]], [0])
            for width in [width for width in widths if limit is None or width < limit]:
                seconds: list[float] = []
                for _ in range(2):
                    start = perf_counter()
                    hidden_BQH, _ = self.reader.read([0], [[0] * width], [1])
                    self.reader.logits(hidden_BQH[0])
                    seconds.append(perf_counter() - start)
                self.controller.probed(width, min(seconds))
            self.reader.rows.forget(0)

    # -- a round -----------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """One round: waiting requests are read, each request that is served gets at least one token."""
        start, timed = perf_counter(), self._timed()
        with evaluating(self.modules):
            events = self._drop_cancelled()
            events += self._admit()
            if self.rows:
                events += self._round()
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
            self._leave(row)
        return events

    def _admit(self) -> list[Event]:
        """Reads the prompts of waiting requests, as many as there is room for, in their order."""
        joining: list[Live] = []
        longest = 0
        while self.waiting and len(self.rows) + len(joining) < self.max_batch:
            longest = max(longest, len(self.waiting[0].tokens))
            if joining and longest * (len(joining) + 1) > _PREFILL_TOKENS:
                break
            request = self.waiting.popleft()
            length, limit = len(request.tokens), self.reader.limit
            end = length + request.sampling.max_tokens
            end = end if limit is None else min(end, limit)
            joining.append(Live(request, end, len(self.rows) + len(joining)))
        if not joining:
            return []
        for row in joining:
            for draft in self.drafts.values():
                draft.open(row)
        start = perf_counter()
        texts = [row.tokens for row in joining]
        hidden_BTH, tapped_BTF = self._read(joining, texts, [0] * len(joining))
        last_BH = hidden_BTH[range(len(joining)), [len(text) - 1 for text in texts]]
        logits_B1V = self.reader.logits(last_BH)[:, None]
        self.seconds.prefill += perf_counter() - start
        self.rows += joining
        return self._settle(joining, [None] * len(joining), logits_B1V, [0] * len(joining), tapped_BTF)[0]

    def _round(self) -> list[Event]:
        begin = perf_counter()
        rows = list(self.rows)
        blocks, costs, steps = self._propose(rows)
        texts = [[row.tokens[-1], *(block.tokens if block else ())] for row, block in zip(rows, blocks, strict=True)]
        start = perf_counter()
        starts = [len(row.tokens) - 1 for row in rows]
        hidden_BQH, tapped_BQF = self._read(rows, texts, starts)
        logits_BQV = self.reader.logits(hidden_BQH.flatten(0, 1)).unflatten(0, hidden_BQH.shape[:2])
        verify_s = perf_counter() - start
        self.seconds.verify += verify_s
        events, verdicts = self._settle(rows, blocks, logits_BQV, starts, tapped_BQF)
        seen: list[Drafted] = []
        for row, block, verdict in zip(rows, blocks, verdicts, strict=True):
            if block is not None:
                kept = [place < verdict.accepted for place in range(len(verdict.alpha))]
                seen.append(Drafted(row, block.name, block.confidence[: len(kept)], kept))
        tokens = sum(len(event.tokens) for event in events)
        seconds = perf_counter() - begin
        self.controller.record(Round(len(rows), logits_BQV.shape[1], tokens, seconds, verify_s, costs, steps, seen))
        return events

    def _read(
        self, rows: Sequence[Live], texts: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """A pass of the target."""
        self.target_passes += 1
        for row in rows:
            row.counters.rounds += 1
        return self.reader.read([row.slot for row in rows], texts, starts, self.taps)

    def _propose(self, rows: list[Live]) -> tuple[list[Block | None], dict[str, float], dict[str, float]]:
        """(what each row is given, by draft its seconds, and those of one more step of it)."""
        choices = self.controller.plan(rows)
        blocks: list[Block | None] = [None] * len(rows)
        costs: dict[str, float] = {}
        steps: dict[str, float] = {}
        groups: dict[str, list[int]] = {}
        for place, (row, choice) in enumerate(zip(rows, choices, strict=True)):
            name = choice.draft
            if name is not None and choice.gamma > 0 and row.left > 1 and not (row.alone or self.drafts[name].benched):
                groups.setdefault(name, []).append(place)
        for name, places in groups.items():
            start = perf_counter()
            draft, group = self.drafts[name], [rows[place] for place in places]
            most = [min(choices[place].gamma, rows[place].left - 1) for place in places]
            proposal = draft.propose(
                group, most, lambda confidence, name=name, group=group: self.controller.go_on(name, group, confidence)
            )
            if proposal.finite:
                for line, place in enumerate(places):
                    if proposal.tokens[line]:
                        blocks[place] = Block(name, proposal, line)
            else:
                draft.benched = True
            costs[name] = perf_counter() - start
            if proposal.step_seconds is not None:
                steps[name] = proposal.step_seconds
            self.seconds.draft += costs[name]
        return blocks, costs, steps

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
        written = row.tokens[row.prompt :][-sampling.tail :] if sampling.stop_strings else []
        for place, token in enumerate(tokens):
            written.append(token)
            if token in sampling.stop_tokens or sampling.completes(self.tokenizer, [written])[0]:
                return place + 1, "stop"
            if place + 1 == row.left:
                return place + 1, "length"
        return len(tokens), None if verdict.error is None else "error"

    def _leave(self, row: Live) -> None:
        """The last row takes the slot."""
        mover = self.rows.pop()
        for draft in self.drafts.values():
            draft.close(row)
        if mover is row:
            return
        self.reader.rows.copy_row(mover.slot, row.slot)
        for draft in self.drafts.values():
            draft.move(mover.slot, row.slot)
        self.rows[row.slot] = mover
        mover.slot = row.slot


def speculate(
    target: Any,
    draft: Draft | None,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    gamma: int = 5,
    max_batch: int = 16,
    tokenizer: Any = None,
    observer: Observer | None = None,
    streams: Sequence[tuple[int, ...]] | None = None,
) -> list[Completion]:
    """`sampling.n` completions a prompt, prompt-major as `generate` gives them: the same tokens, where greedy or
    without a draft. Raises RolloutError as `Engine.add` does, and for NaN."""
    drafts = {} if draft is None else {"draft": draft}
    engine = Engine(
        target, tokenizer, drafts, Fixed("draft" if draft else None, gamma), max_batch=max_batch, observer=observer
    )
    one = replace(sampling, n=1)
    count = 0
    for index, prompt in enumerate(prompts):
        for sample in range(sampling.n):
            stream = (index,) if streams is None else streams[index]
            engine.add(Request(str(count), tuple(prompt), one, stream, sample))
            count += 1
    tokens: list[list[int]] = [[] for _ in range(count)]
    logprobs: list[list[float]] = [[] for _ in range(count)]
    reasons: list[Any] = [None] * count
    while engine.busy:
        for event in engine.step():
            place = int(event.id)
            if event.error is not None:
                raise RolloutError(f"prompt {place // sampling.n}: {event.error}")
            tokens[place] += event.tokens
            logprobs[place] += event.logprobs
            reasons[place] = event.finish_reason
    return [Completion(*written) for written in zip(tokens, logprobs, reasons, strict=True)]
