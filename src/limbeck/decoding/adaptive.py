"""A controller that drafts as much as pays, from what rounds have cost and brought.

Drafting is a renewal process: each round brings some tokens and takes some seconds, and the long-run speed is the ratio
of the two means. The rule that maximises it (marginal value theorem, Charnov 1976) is to draft another token as long as
its expected gain per second of its own cost is at least the speed reached so far: whether the tokens before it stand,
by the draft's confidence in each and how often such confidence was right, times how often the next one stands.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from weakref import WeakKeyDictionary

from limbeck.decoding.controller import NOTHING, Choice, Round
from limbeck.decoding.drafts.ngram import NgramDraft, ngram_confidence
from limbeck.decoding.live import Live

_EDGES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_DECAY = 0.995  # a token judged: about the last 200 count
_ROUND_DECAY = 0.97
_PRIOR_TOKENS = 4.0
_PROBE_FIRST, _PROBE_LAST = 8, 64  # rounds without drafting until it is tried again


@dataclass
class Average:
    """A mean of which old values count less; it begins with `total` / `count`."""

    total: float = 0.0
    count: float = 0.0
    decay: float = 0.9

    def add(self, value: float) -> None:
        self.total = self.total * self.decay + value
        self.count = self.count * self.decay + 1

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0


@dataclass
class DraftRecord:
    """What a draft has done: how often a token stands (all, by confidence, by its place in the block), and what a step
    costs. `off`: rounds since it was last tried where it does not pay, `wait`: how many there must be, `trying`: in
    this one it is."""

    stands: Average = field(default_factory=lambda: _share(0.75))
    by_confidence: list[Average] = field(
        default_factory=lambda: [_share((low + high) / 2) for low, high in pairwise((0.0, *_EDGES, 1.0))]
    )
    by_place: list[Average] = field(default_factory=list[Average])
    step_seconds: Average = field(default_factory=Average)
    off: int = 0
    wait: int = _PROBE_FIRST
    trying: bool = False

    def probability(self, confidence: float) -> float:
        """That a token of this confidence stands, the ones before it standing."""
        return self.by_confidence[bisect.bisect(_EDGES, confidence)].value

    def at(self, place: int) -> float:
        """How much likelier a token at this place of a block stands than tokens do, those before it standing: its text
        may be of the kind that is easy, or the draft worse the further it goes."""
        if place >= len(self.by_place):
            return self.at(place - 1) if place else 1.0
        known, all_ = self.by_place[place], self.stands.value
        return (known.total + all_ * _PRIOR_TOKENS) / (known.count + _PRIOR_TOKENS) / max(all_, 1e-6)

    def judged(self, confidence: Sequence[float], kept: Sequence[bool]) -> None:
        """What became of a block's tokens."""
        self.by_place += [Average(decay=_DECAY) for _ in range(len(kept) - len(self.by_place))]
        for place, (value, stood) in enumerate(zip(confidence, kept, strict=True)):
            self.by_confidence[bisect.bisect(_EDGES, value)].add(stood)
            self.by_place[place].add(stood)
            self.stands.add(stood)


def _share(value: float, weight: float = _PRIOR_TOKENS, decay: float = _DECAY) -> Average:
    return Average(value * weight, weight, decay)


class VerifyCost:
    """Seconds of a pass of the target by the number of tokens in it, between known sizes linear."""

    def __init__(self) -> None:
        self.known: dict[int, Average] = {}

    def add(self, tokens: int, seconds: float) -> None:
        self.known.setdefault(tokens, Average()).add(seconds)

    def __call__(self, tokens: int) -> float:
        sizes = sorted(self.known)
        if not sizes:
            return 0.0
        place = bisect.bisect_left(sizes, tokens)
        if place < len(sizes) and (sizes[place] == tokens or place == 0):
            return self.known[sizes[place]].value
        if len(sizes) == 1:
            return self.known[sizes[0]].value
        low, high = sizes[max(0, min(place, len(sizes) - 1) - 1)], sizes[min(place, len(sizes) - 1)]
        slope = max(0.0, (self.known[high].value - self.known[low].value) / (high - low))
        return self.known[low].value + slope * (tokens - low)


class Adaptive:
    """Chooses for each round who drafts and how much, off included.

    draft: the name of the one that serves requests without a route; None: none does. ngram: its name and itself, used
    where a match promises more than the speed reached. max_gamma: tokens drafted at most.
    """

    def __init__(self, draft: str | None, *, ngram: tuple[str, NgramDraft] | None = None, max_gamma: int = 12) -> None:
        self.draft = draft
        self.ngram = ngram
        self.max_gamma = max_gamma
        self.records: dict[str, DraftRecord] = {}
        self.rows: WeakKeyDictionary[Live, Average] = WeakKeyDictionary()
        self.verify = VerifyCost()
        self.other = Average()  # seconds of a round that are neither drafting nor verifying
        self.reached: dict[int, tuple[float, float]] = {}  # by number of rows: tokens, seconds of the last rounds
        self.planned = 1  # rows in this round

    @property
    def names(self) -> Sequence[str]:
        ngram = [] if self.ngram is None else [self.ngram[0]]
        return ngram if self.draft is None else [self.draft, *ngram]

    def record_of(self, name: str) -> DraftRecord:
        return self.records.setdefault(name, DraftRecord())

    def plan(self, rows: Sequence[Live]) -> list[Choice]:
        self.planned = len(rows)
        for row in rows:
            if row not in self.rows:
                self.rows[row] = self._fresh(row)
        speed = self._speed()
        planned: list[Choice] = []
        groups: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            choice, name = self._by_match(row, speed), row.request.route or self.draft
            planned.append(choice or NOTHING)
            if choice is None and name is not None:
                groups.setdefault(name, []).append(place)
        for name, places in groups.items():
            if self._pays(name, [rows[place] for place in places], speed):
                for place in places:
                    planned[place] = Choice(name, self.max_gamma)
        return planned

    def go_on(self, draft: str, rows: Sequence[Live], confidence: Sequence[Sequence[float]]) -> bool:
        record, gain = self.record_of(draft), 0.0
        steps = max(map(len, confidence))
        for row, values in zip(rows, confidence, strict=True):
            if len(values) == steps:  # others have ended
                reach = self._stands(row, record, steps)
                for value in values:
                    reach *= record.probability(value)
                gain += reach
        return gain >= self._speed() * self._token_seconds(record, steps + 1)

    def record(self, round_: Round) -> None:
        well = round_.tokens >= self._speed() * round_.seconds
        self.verify.add(round_.rows * round_.width, round_.verify_seconds)
        drafting = sum(round_.draft_seconds.values())
        self.other.add(round_.seconds - drafting - round_.verify_seconds)
        tokens, seconds = self.reached.get(round_.rows, (0.0, 0.0))
        self.reached[round_.rows] = (
            tokens * _ROUND_DECAY + round_.tokens,
            seconds * _ROUND_DECAY + round_.seconds,
        )
        for name, step in round_.step_seconds.items():
            self.record_of(name).step_seconds.add(step)
        for drafted in round_.drafted:
            record = self.record_of(drafted.draft)
            record.judged(drafted.confidence, drafted.kept)
            if record.trying and well:
                record.off = record.wait  # it paid: again at once
            if drafted.row in self.rows and (self.ngram is None or drafted.draft != self.ngram[0]):
                for kept in drafted.kept:
                    self.rows[drafted.row].add(kept)
        for record in self.records.values():
            record.trying = False

    def probed(self, tokens: int, seconds: float) -> None:
        self.verify.add(tokens, seconds)

    def _fresh(self, row: Live) -> Average:
        name = row.request.route or self.draft
        return _share(0.75 if name is None else self.record_of(name).stands.value, 2 * _PRIOR_TOKENS, 0.97)

    def _stands(self, row: Live, record: DraftRecord, place: int) -> float:
        """The chance of a token that is not drafted yet, the ones before it standing."""
        share = self.rows.get(row)
        return min(1.0, (record.stands if share is None else share).value * record.at(place))

    def _speed(self) -> float:
        """Tokens a second that drafting must beat: plain decoding's, or what the last rounds with as many rows have
        reached."""
        plain_s = self.verify(self.planned) + self.other.value
        plain = self.planned / plain_s if plain_s > 0 else 0.0
        tokens, seconds = self.reached.get(self.planned, (0.0, 0.0))
        return max(plain, tokens / seconds if seconds > 0 else 0.0)

    def _token_seconds(self, record: DraftRecord, place: int) -> float:
        """What drafting and verifying the `place`-th token costs more: all rows of the pass become as wide."""
        more = self.verify(self.planned * (place + 1)) - self.verify(self.planned * place)
        return record.step_seconds.value + max(more, 0.0)

    def _pays(self, name: str, rows: Sequence[Live], speed: float) -> bool:
        """Whether the first drafted token is worth its cost. Where not, it is tried now and then: texts change."""
        record = self.record_of(name)
        gain = sum(self._stands(row, record, 0) for row in rows)
        if gain >= speed * self._token_seconds(record, 1):
            record.wait = _PROBE_FIRST
            return True
        record.off += 1
        if record.off < record.wait:
            return False
        record.off, record.wait, record.trying = 0, min(2 * record.wait, _PROBE_LAST), True
        return True

    def _by_match(self, row: Live, speed: float) -> Choice | None:
        """The n-gram draft, where its match promises more tokens a second than the rest does."""
        if self.ngram is None or row.request.route is not None:
            return None
        name, draft = self.ngram
        tokens, length = draft.look_up(row, self.max_gamma)
        if not tokens:
            return None
        stands, best, expected, reach = self.record_of(name).probability(ngram_confidence(length)), 0.0, 1.0, 1.0
        gamma = 0
        for count in range(1, len(tokens) + 1):
            reach *= stands
            expected += reach
            seconds = self.verify(self.planned * (count + 1)) + self.other.value
            if seconds > 0 and self.planned * expected / seconds > best:
                best, gamma = self.planned * expected / seconds, count
        return Choice(name, gamma) if best > speed else None
