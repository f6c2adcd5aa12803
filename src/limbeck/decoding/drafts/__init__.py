"""Drafts: whatever proposes the next tokens of a request, with the distributions that it drew them from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from limbeck.decoding.live import Live

GoOn = Callable[[Sequence[Live], Sequence[Sequence[float]]], bool]
"""go_on(rows[b], confidence[b][j]): whether another token is drafted after these. It is asked when all of them are in
the proposal: a token is never dropped for what it is, which would bias the output."""


@dataclass(eq=False)
class Proposal:
    """Drafted tokens of `rows`, those that were ready. Row b has len(tokens[b]) of them, after its newest token;
    `confidence` is the draft's own probability of each at temperature 1, unfiltered (or an estimate in [0, 1]).

    raw_BGD, served_BGD: the logits that they came from, raw and as served, over the tokens `ids_D` (None: all, in
    order); `places_BG` says which column each token is. All None: q is a point mass on the token. `served_BGD` alone is
    None where all rows are greedy. `steps` were taken, after `read` columns had been read for rows that were behind, in
    `read_seconds`. `finite` is false where the draft gave NaN: then none of it counts.
    """

    rows: Sequence[Live]
    tokens: list[list[int]]
    confidence: list[list[float]] = field(default_factory=list[list[float]])
    raw_BGD: Tensor | None = None
    served_BGD: Tensor | None = None
    places_BG: Tensor | None = None
    ids_D: Tensor | None = None
    steps: int = 0
    read: int = 0
    read_seconds: float = 0.0
    finite: bool = True


@dataclass(frozen=True, eq=False)
class Block:
    """One row's part of a proposal: line `line` of what the draft `name` proposes."""

    name: str
    proposal: Proposal
    line: int

    @property
    def tokens(self) -> list[int]:
        return self.proposal.tokens[self.line]

    @property
    def confidence(self) -> list[float]:
        return self.proposal.confidence[self.line]


class Draft(Protocol):
    """One draft of a target. It keeps a state for every slot of the engine: rows of a batch, numbered from 0.

    `taps` are the layers of the target whose hidden states it reads (none: ()), as indices of transformers'
    `hidden_states`. `ids_D`: the tokens that it may draft beside a request's own (None: all). `version` counts the
    swaps. `benched`: it has given NaN and is asked no more until the next swap.
    """

    version: int
    benched: bool
    taps: tuple[int, ...]

    @property
    def ids_D(self) -> Tensor | None: ...

    def bind(self, vocabulary: int, context: int | None = None) -> None:
        """Called once by the engine, whose requests have `context` tokens at most. PreflightError where the draft's
        vocabulary is not the target's."""
        ...

    def open(self, row: Live) -> None:
        """A request takes its slot; nothing of an earlier one counts."""
        ...

    def propose(self, rows: Sequence[Live], most: Sequence[int], go_on: GoOn) -> Proposal:
        """At most `most[b]` (1 or more) tokens after the newest of each row; at least one, unless nothing can be
        drawn there. A row that is far behind is not ready before later calls have read on."""
        ...

    def behind(self, row: Live) -> int:
        """Columns that must be read before a first step for this row: 0 where it begins with the step."""
        ...

    def settle(self, row: Live, known: int, hidden_TF: Tensor | None) -> None:
        """The target has read on. Columns [0, known) of the row's tokens, as they stand now, are those that the draft
        was shown or drafted itself; `hidden_TF` are the target's hidden states, of the layers `taps` side by side in
        that order, of the columns it has read anew: a view, which keeps the whole round's alive (None: no taps)."""
        ...

    def close(self, row: Live) -> None:
        """A request has ended."""
        ...

    def move(self, source: int, target: int) -> None:
        """What was slot `source` is now slot `target`."""
        ...

    def expire(self) -> None:
        """Forgets what has outlived its time to live. Called now and then, also where nothing is served."""
        ...

    def prepare(self, state: Mapping[str, Tensor], version: int) -> Callable[[], None]:
        """New weights: what takes time is done here, in any thread; the function returned puts them in place, between
        two rounds. `state` may hold a part of them. ModelError where they do not fit."""
        ...
