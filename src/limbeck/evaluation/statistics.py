"""Means and differences with 95 % intervals. Every interval stands for itself: none is widened for the number of
pairs or metrics in a table, so of twenty true ties one is expected to look like a difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 10_000
LEAST_SEEDS = 3  # of training, for an interval over them

Verdict = Literal["better", "worse", "no clear difference"]


@dataclass(frozen=True, slots=True)
class Interval:
    """`values`: one mean a seed. `low` and `high` are None where nothing can be said (`how` says why)."""

    mean: float
    low: float | None
    high: float | None
    values: list[float]
    how: str


@dataclass(frozen=True, slots=True)
class Difference:
    """a - b; `verdict` on a. No clear difference: the interval holds 0, or there is none."""

    difference: float
    low: float | None
    high: float | None
    verdict: Verdict
    how: str


def mean_interval(
    values: np.ndarray, *, seeds: Literal["training", "evaluation"] = "training", weights: np.ndarray | None = None
) -> Interval:
    """The mean of `values` [seeds, prompts], or [seeds], and its 95 % interval.

    Three training seeds or more: Student's t over the means of the seeds. Else (fewer, or seeds that only sampled the
    completions of one trained model) prompts are resampled with their values over all seeds kept together: the interval
    then covers the choice of prompts, not the noise of training, and has no width where all prompts score the same.
    `weights` [prompts]: a mean over tokens has them as weights. ValueError for an empty array or a NaN.
    """
    values_SP, weights_P = _checked(values, weights)
    means_S = values_SP @ weights_P / weights_P.sum()
    low, high, how = _interval(values_SP, weights_P, seeds)
    return Interval(float(means_S.mean()), low, high, means_S.tolist(), how)


def paired_difference(
    a: np.ndarray,
    b: np.ndarray,
    *,
    seeds: Literal["training", "evaluation"] = "training",
    weights: np.ndarray | None = None,
    lower_is_better: bool = False,
) -> Difference:
    """a - b over the same seeds and prompts ([seeds, prompts] or [seeds] each), as `mean_interval` of the differences.

    ValueError where the shapes differ.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"expected the same seeds and prompts on both sides, found {a.shape} and {b.shape}")
    interval = mean_interval(a - b, seeds=seeds, weights=weights)
    verdict: Verdict = "no clear difference"
    if interval.low is not None and interval.high is not None and not interval.low <= 0 <= interval.high:
        verdict = "better" if (interval.low > 0) != lower_is_better else "worse"
    return Difference(interval.mean, interval.low, interval.high, verdict, f"paired, {interval.how}")


def _checked(values: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    values_SP = np.asarray(values, dtype=np.float64)
    values_SP = values_SP[:, None] if values_SP.ndim == 1 else values_SP
    if values_SP.ndim != 2 or not values_SP.size or not np.isfinite(values_SP).all():
        raise ValueError(
            f"expected finite values [seeds, prompts], found shape {values_SP.shape}, NaN {np.isnan(values_SP).sum()}"
        )
    weights_P = np.ones(values_SP.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights_P.shape != (values_SP.shape[1],) or not weights_P.sum() > 0:
        raise ValueError(f"expected one weight a prompt ({values_SP.shape[1]}), found shape {weights_P.shape}")
    return values_SP, weights_P


def _interval(values_SP: np.ndarray, weights_P: np.ndarray, seeds: str) -> tuple[float | None, float | None, str]:
    count, prompts = values_SP.shape
    if seeds == "training" and count >= LEAST_SEEDS:
        return *t_interval(values_SP @ weights_P / weights_P.sum()), f"t interval over {count} training seeds"
    if prompts == 1:
        return None, None, f"one value for each of {count} seeds: no interval"
    how = f"bootstrap over {prompts} prompts ({RESAMPLES} resamples, {count} {seeds} seeds)"
    return *bootstrap_interval(values_SP.mean(0), weights_P), how


def t_interval(values_S: np.ndarray) -> tuple[float, float]:
    """Student's t interval of the mean."""
    count = len(values_S)
    half = stats.t.ppf((1 + LEVEL) / 2, count - 1) * values_S.std(ddof=1) / np.sqrt(count)
    return float(values_S.mean() - half), float(values_S.mean() + half)


def bootstrap_interval(values_P: np.ndarray, weights_P: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap of the weighted mean (Efron, 1979), the same numbers at every call."""
    random = np.random.default_rng(0)
    prompts = len(values_P)
    rows = max(1, 2_000_000 // prompts)  # resamples at a time: 16 MB
    means: list[np.ndarray] = []
    for start in range(0, RESAMPLES, rows):
        chosen_RP = random.integers(0, prompts, (min(rows, RESAMPLES - start), prompts), dtype=np.int32)
        means.append((values_P * weights_P)[chosen_RP].sum(1) / weights_P[chosen_RP].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
