"""The gate's and the watch's errors, by enumeration and over seeds, beside a rule that would not hold them."""

from __future__ import annotations

import itertools
import math

import numpy as np

from limbeck.online.gate import Bet, Gate, Watch

SEEDS = 2000


def test_wealth_is_a_supermartingale_and_its_maximum_keeps_the_error() -> None:
    """Every sequence of 12 coins that fall on an event with a probability of at most `chance`."""
    for chance, probability in ((0.5, 0.5), (0.5, 0.3), (0.4, 0.4), (0.4, 0.1)):
        mean = reached = 0.0
        for events in itertools.product((False, True), repeat=12):
            bet = Bet(chance)
            for event in events:
                bet.add(event)
            weight = math.prod(probability if event else 1 - probability for event in events)
            mean += weight * bet.wealth
            reached += weight * (bet.highest >= 10)
        assert mean <= 1 + 1e-9
        assert reached <= 0.1
        if probability == chance:
            assert mean > 1 - 1e-9  # fair: nothing is given away


def _differences(rng: np.random.Generator, better: float, requests: int) -> np.ndarray:
    """Of a new draft that is better on this share of requests: small gains, losses four times as large."""
    wins = rng.random(requests) < better
    size = rng.exponential(0.02, requests)
    return np.where(wins, size, -4 * size)


def _passes(better: float, requests: int = 64) -> tuple[float, float]:
    """Shares of seeds in which (the gate, a rule that looks at the mean's sign after every request) lets it pass."""
    gate, passed, naive = Gate(0.05), 0, 0
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        differences = _differences(rng, better, requests)
        serving = rng.uniform(0.3, 0.6, requests)
        verdict = gate.judge(serving.tolist(), (serving + differences).tolist())
        passed += verdict.kind == "better"
        naive += bool((np.cumsum(differences) > 0).any())
    return passed / SEEDS, naive / SEEDS


def test_a_worse_draft_passes_at_most_as_often_as_stated() -> None:
    bound = 0.05 + 4 * math.sqrt(0.05 * 0.95 / SEEDS)
    for better in (0.5, 0.4, 0.2):
        passed, naive = _passes(better)
        assert passed <= bound
        assert naive > 2 * bound  # the control: without the test it would pass


def test_an_equal_draft_that_is_symmetric_passes_at_most_as_often_as_stated() -> None:
    gate, passed, refused = Gate(0.05), 0, 0
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        verdict = gate.judge([0.5] * 64, (0.5 + rng.normal(0, 0.05, 64)).tolist())
        passed += verdict.kind == "better"
        refused += verdict.kind == "worse"
    bound = 0.05 + 4 * math.sqrt(0.05 * 0.95 / SEEDS)
    assert 0 < passed / SEEDS <= bound and 0 < refused / SEEDS <= bound


def test_a_better_draft_passes_soon() -> None:
    rng = np.random.default_rng(0)
    passed = sum(
        Gate(0.05).judge([0.0] * 40, [float(g) for g in np.where(rng.random(40) < 0.85, 0.05, -0.02)]).kind == "better"
        for _ in range(400)
    )
    assert passed >= 0.95 * 400
    assert Gate(0.05).judge([0.1] * 6, [0.4] * 6).kind == "better"
    assert Gate(0.05).judge([0.4] * 6, [0.1] * 6).kind == "worse"


def test_the_least_that_can_decide() -> None:
    """One request fewer decides nothing even where all are won."""
    for error in (0.2, 0.05, 0.01, 0.001):
        gate = Gate(error)
        assert gate.judge([0.1] * gate.least, [0.4] * gate.least).kind == "better"
        assert gate.judge([0.1] * (gate.least - 1), [0.4] * (gate.least - 1)).kind == "undecided"
    assert Gate(0.05).least == 6


def test_too_little_or_nothing_is_undecided() -> None:
    assert Gate(0.05).judge([0.1] * 4, [0.4] * 4).kind == "undecided"
    assert Gate(0.05).judge([], []).kind == "undecided"
    assert Gate(0.05).judge([0.3] * 500, [0.3] * 500).kind == "undecided"  # the same draft


def test_more_wins_do_not_outweigh_a_lower_mean() -> None:
    new = [0.51] * 40 + [0.0] * 10
    assert Gate(0.05).judge([0.5] * 50, new).kind == "undecided"


def _watched(after: float, seed: int, requests: int = 256, late: int = 0) -> int | None:
    """After how many requests (beyond `late` unchanged ones) the watch raises its alarm, acceptance being .5 before."""
    rng, watch = np.random.default_rng(seed), Watch()
    for alpha in rng.normal(0.5, 0.1, 64):
        assert not watch.add(float(alpha))
    watch.swapped()
    changed = rng.normal(after, 0.1, requests - late)
    for place, alpha in enumerate([*rng.normal(0.5, 0.1, late), *changed]):
        if watch.add(float(alpha)):
            return place + 1 - late
    return None


def test_the_watch_is_silent_unless_acceptance_falls() -> None:
    false = sum(_watched(0.5, seed) is not None for seed in range(500))
    assert false / 500 <= 0.02 + 4 * math.sqrt(0.02 * 0.98 / 500)
    for late in (0, 40, 150):
        times = [_watched(0.25, seed, late=late) for seed in range(50)]
        assert all(time is not None and time <= 25 for time in times)
    assert sum(_watched(0.6, seed) is not None for seed in range(200)) == 0


def test_the_watch_needs_a_reference_and_takes_a_new_one_in_time() -> None:
    watch = Watch()
    watch.swapped()
    assert not any(watch.add(0.5) for _ in range(64))  # nothing to compare with; then these
    assert watch.floor == 0.5
    assert any(watch.add(0.2) for _ in range(20))
    watch.rest()
    assert not any(watch.add(0.2) for _ in range(64))
    assert watch.floor == 0.2
    assert not any(watch.add(0.6) for _ in range(256))
    assert not any(watch.add(0.3) for _ in range(1))
    assert watch.floor == 0.6  # that of the last requests
