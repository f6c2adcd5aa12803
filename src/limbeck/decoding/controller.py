"""How much is drafted, and by whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from limbeck.decoding.live import Live


@dataclass(frozen=True)
class Choice:
    """For one row and round: at most `gamma` tokens by the draft of this name. `NOTHING`: plain decoding."""

    draft: str | None
    gamma: int


NOTHING = Choice(None, 0)


@dataclass(frozen=True)
class Drafted:
    """One row's part in a round: `kept[j]` says whether the j-th judged token stood, `confidence[j]` is the draft's,
    whose weights were those of `version`."""

    row: Live
    draft: str
    confidence: Sequence[float]
    kept: Sequence[bool]
    version: int = 0


@dataclass(frozen=True)
class Round:
    """What a round cost and brought: `tokens` were emitted in `seconds`; the target read `rows` rows of `width` tokens
    in `verify_seconds`. By draft: all that it took, what a step of it takes, where it took one, and, where it was
    behind, how many columns it has read before and the seconds of that. `ended`: tokens of the completions that are
    whole with this round."""

    rows: int
    width: int
    tokens: int
    seconds: float
    verify_seconds: float
    draft_seconds: Mapping[str, float]
    step_seconds: Mapping[str, float]
    drafted: Sequence[Drafted] = field(default_factory=list[Drafted])
    read: Mapping[str, tuple[int, float]] = field(default_factory=dict[str, tuple[int, float]])
    ended: Sequence[int] = ()


class Controller(Protocol):
    @property
    def names(self) -> Sequence[str]:
        """The drafts that it chooses by itself, beside those that requests name."""
        ...

    def plan(self, rows: Sequence[Live]) -> list[Choice]:
        """One choice a row, for the next round. `Live.behind` is what each draft would have to read first."""
        ...

    def go_on(self, draft: str, rows: Sequence[Live], confidence: Sequence[Sequence[float]]) -> bool:
        """Whether to draft another token after these, all of which will be verified."""
        ...

    def record(self, round_: Round) -> None:
        """A round is over."""
        ...

    def probed(self, tokens: int, seconds: float) -> None:
        """A pass of the target over so many tokens takes so long: tried before anything is served."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Always `gamma` tokens by one draft, or by the one that a request names: what is drafted depends on the request
    alone, so results can be repeated token for token."""

    draft: str | None
    gamma: int

    @property
    def names(self) -> Sequence[str]:
        return [] if self.draft is None else [self.draft]

    def plan(self, rows: Sequence[Live]) -> list[Choice]:
        names = [row.request.route or self.draft for row in rows]
        return [Choice(name, self.gamma) if name is not None and self.gamma else NOTHING for name in names]

    def go_on(self, draft: str, rows: Sequence[Live], confidence: Sequence[Sequence[float]]) -> bool:
        return True

    def record(self, round_: Round) -> None:
        pass

    def probed(self, tokens: int, seconds: float) -> None:
        pass
