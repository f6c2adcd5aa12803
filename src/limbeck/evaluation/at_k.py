"""What k samples a prompt are worth: one of them right, or the majority."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from limbeck.scoring import final_number, given_answer, normalised

FINAL_ANSWERS: dict[str, Callable[[str], Hashable | None]] = {
    "numeric_answer": final_number,
    "accuracy": final_number,
    "exact_match": normalised,
    "reasoning_gym": given_answer,
}
"""By metric, the answer that it finds in a completion; other metrics of RIGHT_OR_WRONG know none."""


def pass_at_k(correct_SP: np.ndarray, k: int) -> np.ndarray:
    """[prompts]: the chance that one of k samples, drawn from those at hand without replacement, is right:
    1 - C(n - c, k) / C(n, k) with c right of n. Unbiased for k fresh samples (Chen et al. 2021, arXiv 2107.03374,
    eq. 1). `correct_SP` holds 0 and 1; ValueError for k outside 1 to n."""
    n = _checked(correct_SP, k)
    wrong_P = n - correct_SP.sum(0)
    # C(n - c, k) / C(n, k) as a product of k shares: no factorials.
    return 1 - np.prod([np.maximum(wrong_P - i, 0) / (n - i) for i in range(k)], axis=0)


def majority_at_k(correct_SP: np.ndarray, answers: Sequence[Sequence[Hashable | None]], k: int) -> np.ndarray:
    """[prompts]: how often the commonest of k answers is right (Wang et al. 2023, arXiv 2203.11171), the mean over the
    n // k disjoint groups of k samples: unbiased. `answers` [seeds][prompts]; None, no answer, has no vote; a tie
    counts by its share of right answers; 0 where nobody votes. ValueError for k outside 1 to n."""
    n = _checked(correct_SP, k)
    found = np.zeros(correct_SP.shape[1])
    for prompt in range(len(found)):
        groups = [range(start, start + k) for start in range(0, n - k + 1, k)]
        found[prompt] = np.mean(
            [_vote([(answers[s][prompt], correct_SP[s, prompt]) for s in group]) for group in groups]
        )
    return found


def final_answer(metric: str, completion: str) -> Hashable | None:
    """What a completion votes for, by an entry of FINAL_ANSWERS; None where it gives no answer."""
    answer = FINAL_ANSWERS[metric](completion)
    return None if answer == "" else answer


def _vote(ballots: Sequence[tuple[Any, float]]) -> float:
    counts = Counter(answer for answer, _ in ballots if answer is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    winners = [answer for answer, count in counts.items() if count == most]
    # One answer is right or wrong wherever it stands; a score that sees more than the answer counts by its mean.
    return float(np.mean([np.mean([right for answer, right in ballots if answer == winner]) for winner in winners]))


def _checked(correct_SP: np.ndarray, k: int) -> int:
    n = len(correct_SP)
    if not np.isin(correct_SP, (0, 1)).all():
        raise ValueError("expected 0 and 1 for wrong and right, found other numbers")
    if not 1 <= k <= n:
        raise ValueError(f"expected k from 1 to the {n} samples at hand, found {k}")
    return n
