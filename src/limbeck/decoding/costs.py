"""What rounds cost and how drafts do, as measured: the numbers that a controller steers by."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

_EDGES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_DECAY = 0.995  # a token judged: about the last 200 count
_FADE = 0.98  # a round in which nothing could be learnt
_PRIOR_TOKENS = 4.0
_AFTER_SWAP = 2.0  # tokens that a draft's past counts for when it has new weights
_FRESH = 256  # rounds after which what was measured is no longer true
_LOOK = 16  # rounds after which it is looked for
_FACTOR_STEP = 0.2
_SIZE_READINGS, _SIZE_DECAY = 20.0, 0.99  # what was known of a size before it came: slower to change than the factor


@dataclass
class Average:
    """A mean of which old values count less; it begins with `total` / `count`."""

    total: float = 0.0
    count: float = 0.0
    decay: float = 0.9

    def add(self, value: float, weight: float = 1.0) -> None:
        """A value, or the sum of `weight` of them."""
        self.total = self.total * self.decay + value
        self.count = self.count * self.decay + weight

    def shrink(self, factor: float, least: float = 0.0) -> None:
        """All so far counts less, but for as much as `least` values in any case."""
        factor = max(factor, min(1.0, least / self.count)) if self.count else 1.0
        self.total *= factor
        self.count *= factor

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0


def share(value: float, weight: float = _PRIOR_TOKENS, decay: float = _DECAY) -> Average:
    """How often something holds: a guess that counts as `weight` readings."""
    return Average(value * weight, weight, decay)


class Curve:
    """Seconds by a size, linear between known sizes and beyond the last. Where a size is measured, that counts beside
    what was `probed`; it is forgotten when the size has not come for a while, for costs change: a size that once looked
    dear is not avoided for ever."""

    def __init__(self) -> None:
        self.probed: dict[int, float] = {}
        self.known: dict[int, float] = {}
        self.sizes: list[int] = []
        self._measured: dict[int, tuple[Average, int]] = {}  # with the round in which it came last
        self._round = 0

    def probe(self, size: int, seconds: float) -> None:
        """A reading before anything is served, which stays."""
        self.probed[size] = seconds
        self._renew()

    def add(self, size: int, seconds: float) -> None:
        """A reading of this round."""
        average = self._measured[size][0] if size in self._measured else self._expected(size)
        if seconds < average.value / 2:  # nothing takes less than it takes: what was read before was a disturbance
            average.shrink(0.0)
        average.add(seconds)
        self._measured[size] = average, self._round
        if size in self.known:
            self.known[size] = average.value
        else:
            self._renew()

    def _expected(self, size: int) -> Average:
        """What its neighbours say of a size; of one beyond them all, nothing."""
        return share(Curve.__call__(self, size), _SIZE_READINGS if self.spans(size) else 0.0, _SIZE_DECAY)

    def spans(self, size: int) -> bool:
        return bool(self.sizes) and self.sizes[0] <= size <= self.sizes[-1]

    def tick(self) -> None:
        """A round is over."""
        self._round += 1
        if self._round % _LOOK:
            return
        fresh = {size: pair for size, pair in self._measured.items() if pair[1] + _FRESH >= self._round}
        if len(fresh) < len(self._measured) and (fresh or self.probed):  # old is better than none
            self._measured = fresh
            self._renew()

    def _renew(self) -> None:
        self.known = self.probed | {size: average.value for size, (average, _) in self._measured.items()}
        self.sizes = sorted(self.known)

    def __call__(self, size: int) -> float:
        sizes, known = self.sizes, self.known
        if not sizes:
            return 0.0
        if size in known:
            return known[size]
        if len(sizes) == 1 or size < sizes[0]:
            return known[sizes[0]]
        place = min(bisect.bisect_left(sizes, size), len(sizes) - 1)
        low, high = sizes[place - 1], sizes[place]
        slope = max(0.0, (known[high] - known[low]) / (high - low))
        return known[low] + slope * (size - low)


class VerifyCost(Curve):
    """Seconds of a round beside its drafting, by the tokens in the target's pass: a curve, times `factor`, which says
    how slow the machine is at the moment. Whatever size is read tells about it, so that a size which comes rarely, as
    plain decoding's may, is judged by the machine of now and not of then."""

    factor = 1.0

    def add(self, size: int, seconds: float) -> None:
        if self.spans(size):
            wrong = seconds / max(self(size), 1e-9)
            self.factor *= min(max(wrong, 0.5), 2.0) ** _FACTOR_STEP  # one slow pass is not a slow machine
        super().add(size, seconds / self.factor)

    def __call__(self, size: int) -> float:
        return self.factor * super().__call__(size)


@dataclass
class DraftRecord:
    """What a draft has done: how often a token stands (all, by confidence, by its place in the block), and seconds, by
    a machine as fast as the probed one: of a step by the number of rows, and by the column that it must read before,
    beyond a step's. `allowance`: what may still be lost by trying it where it seems not to pay."""

    version: int | None = None
    stands: Average = field(default_factory=lambda: share(0.75))
    by_confidence: list[Average] = field(default_factory=lambda: _honest())
    by_place: list[Average] = field(default_factory=list[Average])
    step_s: Curve = field(default_factory=Curve)
    read_s: Average = field(default_factory=Average)
    allowance: float = 0.0

    def probability(self, confidence: float) -> float:
        """That a token of this confidence stands, the ones before it standing."""
        return self.bin_of(confidence).value

    def bin_of(self, confidence: float) -> Average:
        return self.by_confidence[bisect.bisect(_EDGES, confidence)]

    def at(self, place: int) -> float:
        """How much likelier a token at this place of a block stands than tokens do, those before it standing: its text
        may be of the kind that is easy, or the draft worse the further it goes."""
        if not self.by_place:
            return 1.0
        known, all_ = self.by_place[min(place, len(self.by_place) - 1)], self.stands.value
        return (known.total + all_ * _PRIOR_TOKENS) / (known.count + _PRIOR_TOKENS) / max(all_, 1e-6)

    def judged(self, confidence: Sequence[float], kept: Sequence[bool]) -> None:
        """What became of a block's tokens."""
        self.by_place += [Average(decay=_DECAY) for _ in range(len(kept) - len(self.by_place))]
        for place, (value, stood) in enumerate(zip(confidence, kept, strict=True)):
            self.bin_of(value).add(stood)
            self.by_place[place].add(stood)
            self.stands.add(stood)

    def renew(self, version: int) -> bool:
        """Whether it has other weights than before. Then its past says little."""
        swapped = self.version is not None and self.version != version
        self.version = version
        if swapped:
            self.stands.shrink(0.0, _AFTER_SWAP)
            self.by_confidence, self.by_place = _honest(), []
        return swapped

    def rest(self, kind: Average | None = None) -> None:
        """A round without it, or without a match of this kind: what is long ago counts less, or a draft that has become
        good would need as many tokens to show it as it once had wrong."""
        (kind or self.stands).shrink(_FADE, 2 * _PRIOR_TOKENS)


def _honest() -> list[Average]:
    """Tokens stand as often as their confidence says."""
    return [share((low + high) / 2) for low, high in pairwise((0.0, *_EDGES, 1.0))]
