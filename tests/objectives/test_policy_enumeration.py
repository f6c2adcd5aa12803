"""Policy gradients against the analytic gradient: every sequence of a toy enumerated (see toy_sequences)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import estimators
import pytest
import torch
from toy_sequences import (
    ALL,
    STUDENT,
    TEACHER,
    error,
    expectation,
    loss,
    minillm_gradients,
    mixed_logprob,
    reverse_kl_gradient,
    variance,
)

from limbeck.objectives import divergence, policy
from limbeck.ops.policy import leave_one_out


def test_the_enumeration_is_whole() -> None:
    assert len(ALL) == 1 + 2 + 12
    for share in (0.0, 0.2):
        assert sum(float(mixed_logprob(tokens, share).exp()) for tokens in ALL) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("single_step", [True, False])
def test_without_mixture_the_expectation_is_the_gradient_of_the_sequences_reverse_kl(single_step: bool) -> None:
    found = expectation(minillm_gradients(0.0, length_norm=False, single_step=single_step))
    assert error(found, reverse_kl_gradient()) < 1e-8


@pytest.mark.parametrize("single_step", [True, False])
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_with_products_of_weights_the_mixture_is_unbiased_too(share: float, single_step: bool) -> None:
    options = {"length_norm": False, "single_step": single_step, "importance": "product"}
    assert error(expectation(minillm_gradients(share, **options)), reverse_kl_gradient()) < 1e-8


def test_the_current_steps_weight_alone_is_biased_and_of_lower_variance() -> None:
    """The paper's approximation: its bias (docs/estimators.md) grows with the share."""
    exact = reverse_kl_gradient()
    errors = [error(expectation(minillm_gradients(share, length_norm=False)), exact) for share in (0.1, 0.2, 0.5)]
    assert 1e-3 < errors[0] < errors[1] < errors[2] < 0.5
    step = variance(minillm_gradients(0.5, length_norm=False))
    assert step < variance(minillm_gradients(0.5, length_norm=False, importance="product"))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_every_sequences_gradient_is_that_of_the_published_loss(share: float) -> None:
    """Written out: sum over t of w_t KL(q || p) at t - w_t R_{t+1} / (T - t), the second w_t alone differentiated."""
    for (_, found), tokens in zip(minillm_gradients(share), ALL, strict=True):
        student, teacher = STUDENT.of_tokens(tokens), TEACHER.of_tokens(tokens).detach()
        mixture = ((1 - share) * student.exp() + share * teacher.exp()).detach()
        weights, rewards = student.exp() / mixture, (teacher - student).detach()
        whole = STUDENT.logprobs(tokens)
        kl = (whole.exp() * (whole - TEACHER.logprobs(tokens).detach())).sum(-1)
        later = [rewards[t + 1 :].sum() / max(len(tokens) - t - 1, 1) for t in range(len(tokens))]
        expected = (weights.detach() * kl).sum() - (weights * torch.stack(later)).sum()
        torch.testing.assert_close(found, STUDENT.gradient(expected), rtol=1e-9, atol=1e-12)


def test_variance_falls_with_each_stabiliser() -> None:
    """Exact variances of one sequence's gradient; each stabiliser is taken away from the whole method in turn."""
    without_single_step = variance(minillm_gradients(0.0, length_norm=False, single_step=False))
    plain = variance(minillm_gradients(0.0, length_norm=False))
    normalised = variance(minillm_gradients(0.0))
    assert without_single_step > plain > normalised
    # The teacher's share at the paper's .2, with or without the normalisation; at .5 it costs more than it saves.
    assert variance(minillm_gradients(0.2, length_norm=False)) < plain
    assert variance(minillm_gradients(0.2)) < normalised
    # The clip holds ratios that the mixture has moved: where the student has left what was written.
    assert variance(minillm_gradients(0.5, clip=0.2)) < variance(minillm_gradients(0.5))


REWARDS = {tokens: float(len(tokens)) + 3.0 * (1 in tokens) - 2.0 * (2 in tokens) for tokens in ALL}


def reward_gradient() -> torch.Tensor:
    """Of E[r] under the student."""
    return STUDENT.gradient(sum((STUDENT.of_tokens(t).sum().exp() * REWARDS[t] for t in ALL), torch.zeros(())))


def rewarded(alpha: float) -> Callable[..., Any]:
    def objective(*args: Any, **kwargs: Any) -> Any:
        weights = {"divergence_weight": alpha, "policy_weight": 1 - alpha, "per_sequence": True}
        return policy(*args, name="jsd", beta=0.5, **weights, **kwargs)

    return objective


@pytest.mark.parametrize("baseline", [0.0, 1.7])
def test_alpha_zero_is_the_gradient_of_the_expected_reward(baseline: float) -> None:
    """What is minimised is -E[r]; one sample a prompt and a baseline that does not know the sample."""
    total = torch.zeros_like(reward_gradient())
    for tokens in ALL:
        columns = {"advantage": [REWARDS[tokens] - baseline] * len(tokens)}
        value = loss(tokens, columns, (len(tokens), 1), rewarded(0.0)) / len(tokens)
        total += STUDENT.of_tokens(tokens).sum().exp().detach() * STUDENT.gradient(value)
    assert error(-total, reward_gradient()) < 1e-8


@pytest.mark.parametrize("n", [2, 3])
def test_leave_one_out_is_unbiased_for_every_group_size(n: int) -> None:
    total = torch.zeros_like(reward_gradient())
    score = {tokens: STUDENT.gradient(STUDENT.of_tokens(tokens).sum()) for tokens in ALL}
    chance = {tokens: STUDENT.of_tokens(tokens).sum().exp().item() for tokens in ALL}
    for group in product(ALL, repeat=n):
        advantages = leave_one_out(torch.tensor([[REWARDS[tokens] for tokens in group]], dtype=torch.float64))[0]
        weight = torch.tensor([chance[tokens] for tokens in group], dtype=torch.float64).prod()
        total += weight * sum(a * score[tokens] for a, tokens in zip(advantages, group, strict=True)) / n
    assert error(total, reward_gradient()) < 1e-8


def test_groups_of_two_through_the_objective() -> None:
    """Both sequences of a pair in one step: divided by its two sequences, whatever their lengths."""
    total = torch.zeros_like(reward_gradient())
    for one, other in product(ALL, repeat=2):
        tokens = len(one) + len(other)
        pair = torch.tensor([[REWARDS[one], REWARDS[other]]], dtype=torch.float64)
        value = torch.zeros((), dtype=torch.float64)
        for sequence, advantage in zip((one, other), leave_one_out(pair)[0].tolist(), strict=True):
            value = value + loss(sequence, {"advantage": [advantage] * len(sequence)}, (tokens, 2), rewarded(0.0))
        chance = (STUDENT.of_tokens(one).sum() + STUDENT.of_tokens(other).sum()).exp().detach()
        total += chance * STUDENT.gradient(value / tokens)
    assert error(-total, reward_gradient()) < 1e-8


def test_alpha_one_is_gkd_exactly() -> None:
    for tokens in ALL:
        columns = {"advantage": [5.0] * len(tokens)}
        with_reward = STUDENT.gradient(loss(tokens, columns, (len(tokens), 1), rewarded(1.0)))

        def plain(*args: Any, **kwargs: Any) -> Any:
            return divergence(*args, name="jsd", beta=0.5, **kwargs)

        torch.testing.assert_close(
            with_reward, STUDENT.gradient(loss(tokens, {}, (len(tokens), 1), plain)), rtol=0, atol=0
        )


def test_the_page_of_biases_and_variances_is_what_its_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    estimators.main()
    page = Path(__file__).parents[2] / "docs" / "estimators.md"
    assert page.read_text() == capsys.readouterr().out
