"""pass@k and maj@k against every subset of the samples."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from itertools import combinations, permutations
from math import comb
from typing import Any

import numpy as np
import pytest

from limbeck.evaluation import FINAL_ANSWERS, final_answer, majority_at_k, pass_at_k
from limbeck.scoring import RIGHT_OR_WRONG

N = 6


def by_number_right(n: int) -> np.ndarray:
    """[n, n + 1]: prompt c has c right samples."""
    return np.array([[sample < right for right in range(n + 1)] for sample in range(n)], dtype=float)


@pytest.mark.parametrize("k", [1, 2, 3, N])
def test_pass_at_k_is_the_mean_over_all_subsets(k: int) -> None:
    correct_SP = by_number_right(N)
    expected = [
        np.mean([column[list(chosen)].max() for chosen in combinations(range(N), k)]) for column in correct_SP.T
    ]
    np.testing.assert_allclose(pass_at_k(correct_SP, k), expected, rtol=1e-12, atol=1e-15)


def test_pass_at_k_is_unbiased_for_fresh_samples() -> None:
    """1 - (1 - p)^k where each sample is right with chance p; the plug-in 1 - (1 - c / n)^k is not that."""
    k, p = 3, 0.3
    chance = np.array([comb(N, c) * p**c * (1 - p) ** (N - c) for c in range(N + 1)])
    truth = 1 - (1 - p) ** k
    assert chance @ pass_at_k(by_number_right(N), k) == pytest.approx(truth, rel=1e-12)
    assert abs(chance @ (1 - (1 - np.arange(N + 1) / N) ** k) - truth) > 0.05


def vote(answers: list[Any], right: list[float]) -> float:
    """The chance to be right when one of the commonest answers is taken at random."""
    counts = Counter(answer for answer in answers if answer is not None)
    best = [answer for answer in counts if counts[answer] == max(counts.values())]
    return sum(right[answers.index(answer)] for answer in best) / len(best) if best else 0.0


@pytest.mark.parametrize("k", [1, 2, 3, N])
def test_majority_at_k_is_unbiased(k: int) -> None:
    """Over all orders of the samples, its mean is the mean over all subsets of k."""
    answers = ["7", "7", "8", None, "9", "8"]
    right = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    expected = np.mean([vote([answers[i] for i in s], [right[i] for i in s]) for s in combinations(range(N), k)])
    orders = list(permutations(range(N)))
    correct_SP = np.array([[right[order[sample]] for order in orders] for sample in range(N)])
    shuffled = [[answers[order[sample]] for order in orders] for sample in range(N)]
    found = majority_at_k(correct_SP, shuffled, k)
    assert found.mean() == pytest.approx(expected, rel=1e-12)
    if k == N:
        assert found.tolist() == [0.5] * len(orders)  # 7 and 8 twice each, whatever the order


def test_majority_hand_cases() -> None:
    def found(answers: list[Any], right: list[float], k: int) -> float:
        return majority_at_k(np.array(right)[:, None], [[answer] for answer in answers], k)[0]

    assert found(["4", "4", "5"], [1, 1, 0], 3) == 1.0
    assert found(["5", "5", "4"], [0, 0, 1], 3) == 0.0
    assert found([None, None, "4"], [0, 0, 1], 3) == 1.0  # no answer is no vote
    assert found([None, None, None], [0, 0, 0], 3) == 0.0
    assert found(["4", "5", "5", "4", "4"], [1, 0, 0, 1, 1], 2) == pytest.approx((0.5 + 0.5) / 2)  # the fifth is left
    assert found(["4", "5", "5", "4", "5"], [1, 0, 0, 1, 0], 2) == pytest.approx((0.5 + 0.5) / 2)  # groups share none


def test_final_answers() -> None:
    assert final_answer("accuracy", "so 18.00") == final_answer("numeric_answer", "#### 18") == Decimal(18)
    assert final_answer("accuracy", "none") is None
    assert final_answer("accuracy", "it is 0") == 0  # an answer, though it is false
    assert final_answer("exact_match", "The Cat!") == final_answer("exact_match", "cat")
    assert final_answer("exact_match", " ") is None
    # As the verifier reads it: two ways to one answer are one vote, nothing between the tags is none.
    for text in ("3 + 4 = <answer> 7 </answer>", "7\n"):
        assert final_answer("reasoning_gym", text) == "7"
    assert final_answer("reasoning_gym", "<answer></answer>") is None
    assert set(FINAL_ANSWERS) == set(RIGHT_OR_WRONG) - {"regex"}


def test_what_is_not_right_or_wrong_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 0 and 1"):
        pass_at_k(np.array([[0.5]]), 1)
    for k in (0, 3):
        with pytest.raises(ValueError, match="k from 1 to the 2 samples"):
            pass_at_k(np.zeros((2, 1)), k)
        with pytest.raises(ValueError, match="k from 1 to the 2 samples"):
            majority_at_k(np.zeros((2, 1)), [["a"], ["a"]], k)
