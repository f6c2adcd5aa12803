"""Intervals: scipy as oracle, and their coverage on simulated data with controls that must fail."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from limbeck.evaluation import statistics
from limbeck.evaluation.statistics import mean_interval, paired_difference

SIMULATIONS = 1000
COVERED = (0.93, 0.97)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_training_seeds_get_students_t() -> None:
    a_SP, b_SP = normal(5, 7), normal(5, 7, seed=1)
    expected = stats.ttest_1samp(a_SP.mean(1), 0).confidence_interval(0.95)
    found = mean_interval(a_SP)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.values == pytest.approx(a_SP.mean(1)) and found.mean == pytest.approx(a_SP.mean())
    assert found.how == "t interval over 5 training seeds"

    expected = stats.ttest_rel(a_SP.mean(1), b_SP.mean(1)).confidence_interval(0.95)
    difference = paired_difference(a_SP, b_SP)
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))
    assert difference.difference == pytest.approx(a_SP.mean() - b_SP.mean())
    assert difference.how == "paired, t interval over 5 training seeds"


def test_one_number_a_seed() -> None:
    assert mean_interval(np.array([1.0, 2.0, 4.0])) == mean_interval(np.array([[1.0], [2.0], [4.0]]))
    lonely = mean_interval(np.array([1.0, 2.0]))
    assert (lonely.mean, lonely.low, lonely.high, lonely.values) == (1.5, None, None, [1.0, 2.0])
    assert "no interval" in lonely.how
    assert paired_difference(np.array([2.0]), np.array([1.0])).verdict == "no clear difference"


@pytest.mark.parametrize(("rows", "seeds"), [(2, "training"), (1, "training"), (6, "evaluation")])
def test_otherwise_prompts_are_resampled(rows: int, seeds: str) -> None:
    values_SP = normal(rows, 60) ** 2
    expected = stats.bootstrap(
        (values_SP.mean(0),), np.mean, method="percentile", n_resamples=50_000, rng=np.random.default_rng(9)
    ).confidence_interval
    found = mean_interval(values_SP, seeds=seeds)  # pyright: ignore[reportArgumentType]
    # A bound of 10 000 resamples is known to about a hundredth of the interval's width.
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.05 * width)
    assert found == mean_interval(values_SP, seeds=seeds)  # pyright: ignore[reportArgumentType]
    assert found.how == f"bootstrap over 60 prompts (10000 resamples, {rows} {seeds} seeds)"


def test_weights_make_it_a_mean_over_tokens() -> None:
    values_P, tokens_P = normal(40), np.random.default_rng(1).integers(1, 50, 40)
    found = mean_interval(values_P[None], weights=tokens_P)
    assert found.mean == pytest.approx(np.average(values_P, weights=tokens_P))
    expected = stats.bootstrap(
        [values_P, tokens_P],
        lambda v, w, axis: (v * w).sum(axis) / w.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=50_000,
        rng=np.random.default_rng(9),
    ).confidence_interval
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.05 * width)


def test_verdicts() -> None:
    base_SP = normal(4, 30)
    above_SP = base_SP + 1 + 0.1 * normal(4, 30, seed=2)
    assert paired_difference(above_SP, base_SP).verdict == "better"
    assert paired_difference(base_SP, above_SP).verdict == "worse"
    assert paired_difference(above_SP, base_SP, lower_is_better=True).verdict == "worse"
    assert paired_difference(base_SP, above_SP, lower_is_better=True).verdict == "better"
    assert paired_difference(base_SP, base_SP).verdict == "no clear difference"
    swing_SP = base_SP + np.array([[1.0], [-1.0], [1.0], [-0.9]])  # over seeds, whatever the prompts say
    assert paired_difference(swing_SP, base_SP).verdict == "no clear difference"


def test_pairing_beats_the_noise_of_the_prompts() -> None:
    prompts_P = 10 * normal(50)
    a_SP, b_SP = prompts_P[None] + 0.3, prompts_P[None] + 0.1 * normal(1, 50, seed=3)
    assert paired_difference(a_SP, b_SP).verdict == "better"
    shuffled_SP = np.random.default_rng(4).permutation(b_SP, axis=1)
    assert paired_difference(a_SP, shuffled_SP).verdict == "no clear difference"


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"same seeds and prompts on both sides, found \(3, 4\) and \(3, 5\)"):
        paired_difference(np.zeros((3, 4)), np.zeros((3, 5)))
    with pytest.raises(ValueError, match="NaN 1"):
        mean_interval(np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match="finite values"):
        mean_interval(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="one weight a prompt"):
        mean_interval(np.zeros((1, 3)), weights=np.ones(2))


def share_covered(intervals: list[tuple[float, float]], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def test_the_bound_on_coverage_rarely_fails_by_chance() -> None:
    covered = stats.binom(SIMULATIONS, 0.95)
    assert covered.cdf(COVERED[0] * SIMULATIONS - 1) + covered.sf(COVERED[1] * SIMULATIONS) < 0.006


def test_coverage_over_training_seeds() -> None:
    random = np.random.default_rng(5)
    truth = 0.3
    found: dict[str, list[tuple[float, float]]] = {"t": [], "normal": [], "prompts only": []}
    for _ in range(SIMULATIONS):
        shared_SP = random.normal(size=(3, 20))  # the same prompts and starts on both sides
        a_SP = shared_SP + truth + random.normal(size=(3, 1)) + 0.2 * random.normal(size=(3, 20))
        difference = paired_difference(a_SP, shared_SP)
        assert difference.low is not None and difference.high is not None
        found["t"].append((difference.low, difference.high))
        half = (difference.high - difference.low) / 2 * float(stats.norm.ppf(0.975) / stats.t.ppf(0.975, 2))
        found["normal"].append((difference.difference - half, difference.difference + half))
        per_prompt_P = (a_SP - shared_SP).mean(0)
        half = stats.t.ppf(0.975, 19) * per_prompt_P.std(ddof=1) / 20**0.5
        found["prompts only"].append((float(per_prompt_P.mean() - half), float(per_prompt_P.mean() + half)))
    assert COVERED[0] <= share_covered(found["t"], truth) <= COVERED[1]
    assert share_covered(found["normal"], truth) < COVERED[0]
    assert share_covered(found["prompts only"], truth) < COVERED[0]


def test_coverage_over_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 4000)
    random = np.random.default_rng(6)
    truth = 0.05
    found: dict[str, list[tuple[float, float]]] = {"paired": [], "unpaired": []}
    for _ in range(SIMULATIONS):
        chance_P = random.uniform(0, 0.9, 100)  # of a right answer: easy and hard prompts, the same on both sides
        a_SP = (random.uniform(size=(5, 100)) < chance_P + truth).astype(float)
        b_SP = (random.uniform(size=(5, 100)) < chance_P).astype(float)
        difference = paired_difference(a_SP, b_SP, seeds="evaluation")
        assert difference.low is not None and difference.high is not None
        found["paired"].append((difference.low, difference.high))
        half = 1.96 * np.sqrt((a_SP.mean(0).var(ddof=1) + b_SP.mean(0).var(ddof=1)) / 100)
        found["unpaired"].append((difference.difference - half, difference.difference + half))
    assert COVERED[0] <= share_covered(found["paired"], truth) <= COVERED[1]
    assert share_covered(found["unpaired"], truth) > COVERED[1]
