"""Credit by hand: sums of later rewards, their counts, baselines, clipped surrogates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.ops import policy


def tensor(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


MASK = torch.tensor([[True, True, True], [True, True, False]])
REWARDS = tensor([1.0, 2.0, 4.0], [3.0, 5.0, 99.0])  # 99 stands in the padding


def test_later_rewards_by_hand() -> None:
    assert policy.later_rewards(REWARDS, MASK).tolist() == [[6, 4, 0], [5, 0, 0]]
    assert policy.later_rewards(REWARDS, MASK, own=True).tolist() == [[7, 6, 4], [8, 5, 0]]
    assert policy.later_rewards(REWARDS, MASK, discount=0.5).tolist() == [[4, 4, 0], [5, 0, 0]]
    assert policy.later_rewards(REWARDS, MASK, discount=0.5, own=True).tolist() == [[3, 4, 4], [5.5, 5, 0]]


def test_terms_and_the_length_normalised_sum() -> None:
    assert policy.terms_of(MASK).tolist() == [[2, 1, 0], [1, 0, 0]]
    assert policy.terms_of(MASK, own=True).tolist() == [[3, 2, 1], [2, 1, 0]]
    sums = policy.later_rewards(REWARDS, MASK)
    assert policy.length_normalised(sums, policy.terms_of(MASK)).tolist() == [[3, 4, 0], [5, 0, 0]]


def test_weights_of_the_current_step_and_their_products() -> None:
    student, behaviour = tensor([0.5, 0.2, 0.9]).log(), tensor([0.25, 0.4, 0.9]).log()
    weights = policy.importance_weights(student, behaviour)
    torch.testing.assert_close(weights, tensor([2.0, 0.5, 1.0]))
    torch.testing.assert_close(policy.prefix_products(weights), tensor([2.0, 1.0, 1.0]))


def test_whitening_knows_real_tokens_alone() -> None:
    values = tensor([1.0, 2.0, 4.0], [3.0, 5.0, 1e6])
    found = policy.whitened(values, MASK)
    real = np.array([1.0, 2.0, 4.0, 3.0, 5.0])
    np.testing.assert_allclose(found[MASK].numpy(), (real - real.mean()) / real.std(), rtol=1e-6)
    assert found[1, 2] == 0


def test_leave_one_out_by_hand() -> None:
    assert policy.leave_one_out(tensor([1.0, 2.0, 6.0], [4.0, 4.0, 4.0])).tolist() == [[-3, -1.5, 4.5], [0, 0, 0]]
    with pytest.raises(ValueError, match="two samples a prompt or more, found 1"):
        policy.leave_one_out(tensor([1.0]))


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("ratio", [0.5, 0.95, 1.0, 1.1, 1.5])
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 3.0])
def test_the_weight_of_the_log_probability_is_the_surrogates_derivative(
    ratio: float, advantage: float, clip: float | None
) -> None:
    """Against autograd through min(ratio A, clamp(ratio) A) by log q, ratio = q / constant."""
    logprob = torch.tensor([-1.3], dtype=torch.float64, requires_grad=True)
    behaviour = logprob.detach() - torch.tensor([ratio], dtype=torch.float64).log()
    ratios, advantages = (logprob - behaviour).exp(), torch.tensor([advantage], dtype=torch.float64)
    value = policy.surrogate(ratios, advantages, clip)
    plain = ratio * advantage
    expected = plain if clip is None else min(plain, float(np.clip(ratio, 0.8, 1.2)) * advantage)
    assert value.item() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(value.sum(), logprob)
    weight = policy.surrogate_weight(ratios.detach(), advantages, clip)
    torch.testing.assert_close(weight, gradient)
