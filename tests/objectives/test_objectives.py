"""Objectives against plain softmax arithmetic in float64."""

from __future__ import annotations

import pytest
import torch

from limbeck.errors import PreflightError
from limbeck.objectives import OBJECTIVES, MiniLLM, cross_entropy, divergence, language_modelling, policy
from limbeck.recipe import Recipe
from limbeck.types import Context, Head, Hidden, Sparse

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


def test_a_policy_gradient_is_not_taken_against_top_tokens_alone(
    parts: tuple[torch.Tensor, Head, Hidden, torch.Tensor],
) -> None:
    hidden_NH, head, _, tokens_N = parts
    uniform_N2 = torch.full((N, 2), 0.4, dtype=torch.float64).log()
    top = Sparse(torch.stack([tokens_N, tokens_N + 1], 1), uniform_N2, torch.full((N,), 0.2, dtype=torch.float64).log())
    context = Context(tokens=N, sequences=1, columns={})
    with pytest.raises(PreflightError, match="expected a teacher's full distribution, found its top tokens alone"):
        policy(hidden_NH, head, top, tokens_N, context=context)


def test_the_authors_credit_by_hand() -> None:
    """Gamma .95 over the rewards that remain, rewards / .5 and clipped at 100, r_t among them, whitened over tokens."""
    minillm = {"method": "minillm", "teacher": "t", "student": "s", "corpus_weight": 0, "variant": "reference"}
    credit = MiniLLM(**Recipe.parse(minillm).credit)  # pyright: ignore[reportAttributeAccessIssue]
    rewards = [[1.0, -2.0, 80.0], [0.5, -70.0]]
    sums: list[float] = []
    for row in rewards:
        clipped = [max(-100.0, min(100.0, reward / 0.5)) for reward in row]
        for t in range(len(row)):
            total = sum(0.95 ** (k - t) * clipped[k] for k in range(t, len(row)))
            sums.append(total / (len(row) - t))
    mean = sum(sums) / len(sums)
    deviation = (sum((value - mean) ** 2 for value in sums) / len(sums)) ** 0.5
    rewards_BT = torch.tensor([rewards[0], [*rewards[1], 0.0]], dtype=torch.float64)
    mask_BT = torch.tensor([[True, True, True], [True, True, False]])
    found_BT = credit.advantages(rewards_BT, torch.full_like(rewards_BT, 0.5), mask_BT)
    expected_N = torch.tensor([(value - mean) / deviation for value in sums], dtype=torch.float64)
    torch.testing.assert_close(found_BT[mask_BT], expected_N, rtol=1e-6, atol=1e-8)
    assert credit._single_step(rewards_BT).eq(1).all()  # unweighted


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
