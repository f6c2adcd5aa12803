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
class Share:
    """A share of yeses, of which old ones count less."""

    yes: float
    all: float
    decay: float = _DECAY

    def add(self, value: bool) -> None:
        self.yes = self.yes * self.decay + value
        self.all = self.all * self.decay + 1

    @property
    def value(self) -> float:
        return self.yes / self.all


@dataclass
class Mean:
    """A mean of which old values count less."""

    decay: float = 0.9
    total: float = 0.0
    count: float = 0.0

    def add(self, value: float) -> None:
        self.total = self.total * self.decay + value
        self.count = self.count * self.decay + 1

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0


@dataclass
class DraftRecord:
    """What a draft has done: how often a token stands (all, by confidence, by its place in the block), and what a step
    costs."""

    stands: Share = field(default_factory=lambda: Share(0.75 * _PRIOR_TOKENS, _PRIOR_TOKENS))
    by_confidence: list[Share] = field(default_factory=lambda: [_prior(bin_) for bin_ in range(len(_EDGES) + 1)])
    by_place: list[Share] = field(default_factory=list[Share])
    step_seconds: Mean = field(default_factory=Mean)

    def probability(self, confidence: float) -> float:
        """That a token of this confidence stands, the ones before it standing."""
        return self.by_confidence[bisect.bisect(_EDGES, confidence)].value


def _prior(bin_: int) -> Share:
    edges = (0.0, *_EDGES, 1.0)
    return Share((edges[bin_] + edges[bin_ + 1]) / 2 * _PRIOR_TOKENS, _PRIOR_TOKENS)


class VerifyCost:
    """Seconds of a pass of the target by the number of tokens in it, between known sizes linear."""

    def __init__(self) -> None:
        self.known: dict[int, Mean] = {}

    def add(self, tokens: int, seconds: float) -> None:
        self.known.setdefault(tokens, Mean()).add(seconds)

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
        self.rows: WeakKeyDictionary[Live, Share] = WeakKeyDictionary()
        self.verify = VerifyCost()
        self.other = Mean()  # seconds of a round that are neither drafting nor verifying
        self.tokens = self.seconds = 0.0  # of the last rounds
        self.off = 0  # rounds since drafting was last tried
        self.wait = _PROBE_FIRST
        self.trying = False

    def record_of(self, name: str) -> DraftRecord:
        return self.records.setdefault(name, DraftRecord())

    def plan(self, rows: Sequence[Live]) -> list[Choice]:
        for row in rows:
            if row not in self.rows:
                self.rows[row] = self._fresh(row)
        speed = self._speed(len(rows))
        choices = [self._by_match(row, speed, len(rows)) for row in rows]
        names = {row.request.route or self.draft for row, choice in zip(rows, choices, strict=True) if choice is None}
        pays = {
            name: self._pays(name, [row for row in rows if (row.request.route or self.draft) == name], speed)
            for name in names
            if name is not None
        }
        planned: list[Choice] = []
        for row, choice in zip(rows, choices, strict=True):
            name = row.request.route or self.draft
            if choice is None:
                choice = Choice(name, self.max_gamma) if name is not None and pays[name] else NOTHING
            planned.append(choice)
        return planned

    def go_on(self, draft: str, rows: Sequence[Live], confidence: Sequence[Sequence[float]]) -> bool:
        record, gain = self.record_of(draft), 0.0
        steps = max(map(len, confidence))
        for row, values in zip(rows, confidence, strict=True):
            if len(values) == steps:  # others have ended
                reach = self._stands(row, record)
                for value in values:
                    reach *= record.probability(value)
                gain += reach
        return gain >= self._speed(len(rows)) * self._token_seconds(record, len(rows), steps + 1)

    def record(self, round_: Round) -> None:
        self.verify.add(round_.rows * round_.width, round_.verify_seconds)
        drafting = sum(round_.draft_seconds.values())
        self.other.add(round_.seconds - drafting - round_.verify_seconds)
        self.tokens = self.tokens * _ROUND_DECAY + round_.tokens
        self.seconds = self.seconds * _ROUND_DECAY + round_.seconds
        for name, seconds in round_.step_seconds.items():
            self.record_of(name).step_seconds.add(seconds)
        if self.trying and any(any(drafted.kept) for drafted in round_.drafted):
            self.off = self.wait  # it came out well: again at once
        self.trying = False
        for drafted in round_.drafted:
            record = self.record_of(drafted.draft)
            record.by_place += [Share(0.0, 0.0) for _ in range(len(drafted.kept) - len(record.by_place))]
            for place, (confidence, kept) in enumerate(zip(drafted.confidence, drafted.kept, strict=True)):
                record.by_confidence[bisect.bisect(_EDGES, confidence)].add(kept)
                record.by_place[place].add(kept)
                record.stands.add(kept)
                if drafted.row in self.rows and (self.ngram is None or drafted.draft != self.ngram[0]):
                    self.rows[drafted.row].add(kept)

    def probed(self, tokens: int, seconds: float) -> None:
        self.verify.add(tokens, seconds)

    def _fresh(self, row: Live) -> Share:
        name = row.request.route or self.draft
        share = 0.75 if name is None else self.record_of(name).stands.value
        return Share(share * 2 * _PRIOR_TOKENS, 2 * _PRIOR_TOKENS, 0.97)

    def _stands(self, row: Live, record: DraftRecord) -> float:
        share = self.rows.get(row)
        return record.stands.value if share is None else share.value

    def _speed(self, rows: int) -> float:
        """Tokens a second that drafting must beat: plain decoding's, or what the last rounds have reached."""
        plain_s = self.verify(rows) + self.other.value
        plain = rows / plain_s if plain_s > 0 else 0.0
        return max(plain, self.tokens / self.seconds if self.seconds > 0 else 0.0)

    def _token_seconds(self, record: DraftRecord, rows: int, place: int) -> float:
        """What drafting and verifying the `place`-th token costs more."""
        more = self.verify(rows * (place + 1)) - self.verify(rows * place)
        return record.step_seconds.value + max(more, 0.0)

    def _pays(self, name: str, rows: Sequence[Live], speed: float) -> bool:
        """Whether the first drafted token is worth its cost. Where not, it is tried now and then: texts change."""
        record = self.record_of(name)
        gain = sum(self._stands(row, record) for row in rows)
        if gain >= speed * self._token_seconds(record, len(rows), 1):
            self.wait = _PROBE_FIRST
            return True
        self.off += 1
        if self.off < self.wait:
            return False
        self.off, self.wait, self.trying = 0, min(2 * self.wait, _PROBE_LAST), True
        return True

    def _by_match(self, row: Live, speed: float, rows: int) -> Choice | None:
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
            seconds = self.verify(rows * (count + 1)) + self.other.value
            if seconds > 0 and rows * expected / seconds > best:
                best, gamma = rows * expected / seconds, count
        return Choice(name, gamma) if best > speed else None
