"""Objectives against plain softmax arithmetic in float64."""

from __future__ import annotations

import pytest
import torch

from limbeck.objectives import OBJECTIVES, cross_entropy, divergence, language_modelling, policy
from limbeck.types import Head, Hidden

N, V, H, G = 7, 11, 4, 3


@pytest.fixture
def parts() -> tuple[torch.Tensor, Head, Hidden, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher = Hidden(normal(N, G), Head(normal(V, G)))
    return normal(N, H).requires_grad_(), Head(normal(V, H).requires_grad_()), teacher, torch.arange(N)


def logprobs(hidden_NH: torch.Tensor, head: Head, temperature: float = 1.0) -> torch.Tensor:
    return (hidden_NH @ head.weight_VH.T / temperature).log_softmax(-1)


def test_cross_entropy_is_minus_the_log_probability(parts: tuple[torch.Tensor, Head, Hidden, torch.Tensor]) -> None:
    hidden_NH, head, signal, tokens_N = parts
    terms = cross_entropy(hidden_NH, head, None, tokens_N)
    expected_N = -logprobs(hidden_NH, head)[torch.arange(N), tokens_N]
    torch.testing.assert_close(terms.loss_N, expected_N)
    with_signal = cross_entropy(hidden_NH, head, signal, tokens_N, stats=("forward_kl",))
    torch.testing.assert_close(with_signal.loss_N, expected_N)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_adds_weighted_cross_entropy_and_no_hidden_factor(
    parts: tuple[torch.Tensor, Head, Hidden, torch.Tensor], temperature: float
) -> None:
    hidden_NH, head, signal, tokens_N = parts
    terms = divergence(
        hidden_NH, head, signal, tokens_N, name="forward_kl", temperature=temperature, cross_entropy_weight=0.3
    )
    student, teacher = logprobs(hidden_NH, head, temperature), logprobs(signal.hidden_NH, signal.head, temperature)
    kl_N = (teacher.exp() * (teacher - student)).sum(-1)
    nll_N = -logprobs(hidden_NH, head)[torch.arange(N), tokens_N]
    torch.testing.assert_close(terms.loss_N, kl_N + 0.3 * nll_N)
    found = torch.autograd.grad(terms.loss_N.sum(), (hidden_NH, head.weight_VH))
    expected = torch.autograd.grad((kl_N + 0.3 * nll_N).sum(), (hidden_NH, head.weight_VH))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_every_objective_is_registered() -> None:
    assert OBJECTIVES == {
        "cross_entropy": cross_entropy,
        "divergence": divergence,
        "policy": policy,
        "language_modelling": language_modelling,
    }


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_language_modelling_is_half_hard_half_teacher(
    parts: tuple[torch.Tensor, Head, Hidden, torch.Tensor], share: float
) -> None:
    hidden_NH, head, signal, tokens_N = parts
    terms = language_modelling(hidden_NH, head, signal if share else None, tokens_N, teacher_share=share)
    student, teacher = logprobs(hidden_NH, head), logprobs(signal.hidden_NH, signal.head)
    kl_N = (teacher.exp() * (teacher - student)).sum(-1)
    expected_N = -(1 - share) * student[torch.arange(N), tokens_N] + share * kl_N
    torch.testing.assert_close(terms.loss_N, expected_N)
