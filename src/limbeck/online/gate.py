"""Whether a new draft may serve, and whether the one that serves must go: sequential tests by betting.

Both watch events whose probability is at most `chance` if nothing is to be done, and bet on them at fair odds or worse:
then the wealth is a nonnegative supermartingale that starts at 1, and by Ville's inequality it ever reaches 1 / error
with a probability of at most `error`, however often one looks (Waudby-Smith and Ramdas, JRSS-B 2024, arXiv 2010.09686).
No assumption on the size or shape of differences is made, and the unit is a request: positions of one request are not
independent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

_MOST = 0.98  # of a stake: one loss must not end it
_PRIOR = (1.5, 2.0)  # events and trials that the first stakes are laid by


@dataclass
class Bet:
    """Wealth from betting that events come more often than with probability `chance`."""

    chance: float = 0.5
    wealth: float = 1.0
    highest: float = 1.0
    events: int = 0
    trials: int = 0

    def add(self, event: bool) -> None:
        """The stake follows the share of events so far, and never falls below fair odds."""
        share = (self.events + _PRIOR[0]) / (self.trials + _PRIOR[1])
        share = min(max(share, self.chance), _MOST)
        self.wealth *= share / self.chance if event else (1 - share) / (1 - self.chance)
        self.highest = max(self.highest, self.wealth)
        self.events += event
        self.trials += 1


@dataclass(frozen=True)
class Verdict:
    """`better`: the new draft may serve. `worse`: it is shown to be worse. `undecided`: neither is shown.

    `gain`: mean difference of acceptance over the requests; `wealth`: the evidence that the new one is better.
    """

    kind: Literal["better", "worse", "undecided"]
    gain: float
    wealth: float
    requests: int


@dataclass(frozen=True)
class Gate:
    """Compares two drafts on requests that neither was trained on since they differ, in pairs.

    The new draft passes when it is shown to accept more than the serving one on more than half of the requests, and
    does so in the mean: where on a request of this traffic it is better with a probability of at most 1/2, it passes
    with a probability of at most `error`. Likewise for `worse`. A tie counts against what is to be shown.

    `error` holds for one verdict. Verdicts on the same requests are not independent, and among many updates that change
    nothing some pass: what passes by chance is about as good as what it replaces, and `Watch` looks on.
    """

    error: float = 0.05

    @property
    def least(self) -> int:
        """The fewest requests that can decide: as many as must all be won."""
        bet = Bet()
        while bet.highest < 1 / self.error:
            bet.add(True)
        return bet.trials

    def judge(self, serving: Sequence[float], new: Sequence[float]) -> Verdict:
        """serving[r], new[r]: acceptance of the two on request r, in any order that does not look at them."""
        better, worse = Bet(), Bet()
        differences = [b - a for a, b in zip(serving, new, strict=True)]
        for difference in differences:
            better.add(difference > 0)
            worse.add(difference < 0)
        gain = sum(differences) / len(differences) if differences else 0.0
        kind: Literal["better", "worse", "undecided"] = "undecided"
        if better.highest >= 1 / self.error and gain > 0:
            kind = "better"
        elif worse.highest >= 1 / self.error and gain < 0:
            kind = "worse"
        return Verdict(kind, gain, better.highest, len(differences))


@dataclass
class Watch:
    """Live acceptance after a swap against that before it: it must not fall, at once or later.

    The reference are the last `window` requests before the swap, or where there was none for long, of those before.
    After it, a request below their lower quartile counts as an event: had nothing changed, one in four would be.
    `chance` .4 leaves room for the reference being a sample (64 requests put more than .4 below their own quartile with
    a probability under .01). As a fall may come at any time, the wealth is spread evenly over bets that begin `every`
    requests apart: it is a supermartingale still. The alarm is false with a probability of at most `error` beside that,
    in `most` requests; then a new reference is taken.
    """

    error: float = 0.01
    window: int = 64
    least: int = 16
    most: int = 256
    every: int = 8
    chance: float = 0.4
    recent: deque[float] = field(default_factory=deque[float])
    floor: float | None = None
    bets: list[Bet] = field(default_factory=list[Bet])
    trials: int = 0

    def add(self, alpha: float) -> bool:
        """The acceptance of a request that one version served from its start. True: it has fallen."""
        self.recent.append(alpha)
        if len(self.recent) > self.window:
            self.recent.popleft()
        if self.floor is None or self.trials >= self.most:
            if len(self.recent) == self.window:
                self.swapped()
            return False
        if self.trials % self.every == 0:
            self.bets.append(Bet(self.chance))
        self.trials += 1
        for bet in self.bets:
            bet.add(alpha < self.floor)
        shares = -(-self.most // self.every)
        wealth = (sum(bet.wealth for bet in self.bets) + shares - len(self.bets)) / shares
        return wealth >= 1 / self.error

    def swapped(self) -> None:
        """A new version serves from now on: those before it are the reference, or where they are few, the last one."""
        ranked = sorted(self.recent)
        self._begin(ranked[len(ranked) // 4] if len(ranked) >= self.least else self.floor)

    def rest(self) -> None:
        """Nothing is watched until `window` more requests are a reference."""
        self._begin(None)

    def _begin(self, floor: float | None) -> None:
        self.floor, self.bets, self.trials = floor, [], 0
        self.recent.clear()
