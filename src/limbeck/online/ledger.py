"""Where the time goes: seconds of prefill, draft, verify, overhead and idling, which add up to the wall clock, beside
what training took in its own process; and the net speedup against plain decoding, which is sampled now and then.

Training slows down whatever is decoded beside it. So what is served counts as it is, training beside it or not, and
plain decoding as it is while nothing trains: the speedup is that of drafting and learning together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from limbeck.decoding.controller import NOTHING, Choice, Controller, Round
from limbeck.decoding.live import Live
from limbeck.decoding.speculative import Seconds


@dataclass
class Sample:
    """Rounds of one kind with one number of requests."""

    tokens: float = 0.0
    seconds: float = 0.0
    rounds: float = 0.0

    def add(self, tokens: int, seconds: float, decay: float) -> None:
        self.tokens = self.tokens * decay + tokens
        self.seconds = self.seconds * decay + seconds
        self.rounds = self.rounds * decay + 1


@dataclass
class Ledger:
    """`idle` and `overhead` are the service's own; `training` is the other process's, beside the wall clock.

    Rounds by the number of requests in them: all that were `served`, and the `plain` ones of these while nothing was
    trained. Older ones count less (`decay` a round).
    """

    idle: float = 0.0
    overhead: float = 0.0
    training: float = 0.0
    tokens: int = 0
    started: float = 0.0
    decay: float = 0.999
    served: dict[int, Sample] = field(default_factory=dict[int, Sample])
    plain: dict[int, Sample] = field(default_factory=dict[int, Sample])

    def seconds(self, engine: Seconds) -> dict[str, float]:
        """Seconds since the start by what they were spent on. All but `training` add up to the wall clock."""
        return {
            "prefill": engine.prefill,
            "draft": engine.draft,
            "verify": engine.verify,
            "overhead": engine.overhead + self.overhead,
            "idle": self.idle,
            "training": self.training,
        }

    def per_token(self, engine: Seconds) -> dict[str, float]:
        """The same for each served token, idling left out."""
        spent = self.seconds(engine)
        del spent["idle"]
        return {name: value / max(self.tokens, 1) for name, value in spent.items()}

    def add_round(self, round_: Round, *, alone: bool) -> None:
        """One round. `alone`: nothing was trained beside it."""
        kinds = [self.served] if round_.draft_seconds or not alone else [self.served, self.plain]
        for kind in kinds:
            kind.setdefault(round_.rows, Sample()).add(round_.tokens, round_.seconds, self.decay)

    @property
    def speedup(self) -> float | None:
        """Seconds that plain rounds alone would have taken for the tokens that were served, by the seconds that these
        took: over the numbers of requests of which plain rounds are known. None: not known."""
        wanted = taken = 0.0
        for rows, sample in list(self.served.items()):
            plain = self.plain.get(rows)
            if plain is not None and plain.tokens:
                wanted += sample.tokens * plain.seconds / plain.tokens
                taken += sample.seconds
        return wanted / taken if taken else None

    @property
    def plain_tokens_per_s(self) -> float | None:
        """Tokens/s of plain rounds alone, by the mix of requests that they were sampled with."""
        seconds = sum(sample.seconds for sample in list(self.plain.values()))
        return sum(sample.tokens for sample in list(self.plain.values())) / seconds if seconds else None


@dataclass(eq=False)
class Watched:
    """A controller that another one steers: it counts each round, and makes a share of the rounds plain ones.

    One round in `every` is plain, for all requests in it (0: none). `seen` is called with every round. `training`:
    whether a draft is being trained just now.
    """

    inner: Controller
    ledger: Ledger
    every: int
    seen: Callable[[Round], None]
    training: Callable[[], bool]
    count: int = 0
    disturbed: bool = False

    @property
    def names(self) -> Sequence[str]:
        return self.inner.names

    def plan(self, rows: Sequence[Live]) -> list[Choice]:
        self.count += 1
        self.disturbed = self.training()
        if self.every and self.count % self.every == 0:
            return [NOTHING] * len(rows)
        return self.inner.plan(rows)

    def go_on(self, draft: str, rows: Sequence[Live], confidence: Sequence[Sequence[float]]) -> bool:
        return self.inner.go_on(draft, rows, confidence)

    def record(self, round_: Round) -> None:
        self.ledger.add_round(round_, alone=not (self.disturbed or self.training()))
        self.seen(round_)
        self.inner.record(round_)

    def probed(self, tokens: int, seconds: float) -> None:
        self.inner.probed(tokens, seconds)


@dataclass
class Clock:
    """Cuts the wall clock of one thread into pieces without gap: `lap` gives the seconds since the last one."""

    last: float = field(default_factory=perf_counter)

    def lap(self) -> float:
        now = perf_counter()
        seconds, self.last = now - self.last, now
        return seconds
