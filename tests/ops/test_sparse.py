"""A teacher's top-k + tail against the same buckets made by hand on probabilities, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.errors import RecipeError
from limbeck.ops import DIVERGENCES, linear_terms
from limbeck.ops.sparse import SPARSE_STATS, bucketed, top_k
from limbeck.types import Dense, Head, Sparse

N, V, H, K = 7, 12, 5, 3


def make(k: int = K) -> tuple[Tensor, Head, Sparse, Tensor, Tensor]:
    hidden = torch.randn(N, H, dtype=torch.float64, requires_grad=True)
    head = Head(torch.randn(V, H, dtype=torch.float64, requires_grad=True), softcap=4.0)
    teacher = torch.log_softmax(2 * torch.randn(N, V, dtype=torch.float64), -1)
    return hidden, head, top_k(teacher, k), teacher, torch.randint(0, V, (N,))


def by_hand(probs_NV: Tensor, tokens_NK: Tensor) -> Tensor:
    """Buckets as probabilities, row by row."""
    rows: list[Tensor] = []
    for probs_V, tokens_K in zip(probs_NV, tokens_NK.tolist(), strict=True):
        others = [token for token in range(V) if token not in tokens_K]
        rows.append(torch.cat([probs_V[tokens_K], probs_V[others].sum()[None]]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_and_gradient_are_those_of_the_buckets(name: str) -> None:
    hidden, head, signal, teacher, tokens = make()
    options: dict[str, Any] = {"divergence": name, "weights": (0.7, 0.3), "chunk_tokens": 3}
    terms = linear_terms(hidden, head, signal, tokens, **options)
    logits = 4.0 * torch.tanh(hidden @ head.weight_VH.T / 4.0)
    buckets = [by_hand(probs, signal.tokens_NK) for probs in (torch.softmax(logits, -1), teacher.exp())]
    expected = DIVERGENCES[name](buckets[0].log(), buckets[1].log())
    torch.testing.assert_close(terms.divergence_N, expected)
    loss = 0.7 * expected + 0.3 * torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
    torch.testing.assert_close(terms.loss_N, loss)
    inputs = (hidden, head.weight_VH)
    torch.testing.assert_close(
        torch.autograd.grad(terms.loss_N.sum(), inputs, retain_graph=True), torch.autograd.grad(loss.sum(), inputs)
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_all_tokens_are_the_whole_distribution(name: str) -> None:
    hidden, head, signal, teacher, _ = make(k=V)
    assert torch.isneginf(signal.tail_logprob_N).all()
    whole = linear_terms(hidden, head, Dense(teacher), divergence=name).loss_N
    torch.testing.assert_close(linear_terms(hidden, head, signal, divergence=name).loss_N, whole)


def test_buckets_lose_and_never_gain() -> None:
    hidden, head, signal, teacher, _ = make()
    for name in ("forward_kl", "reverse_kl", "jsd", "total_variation"):
        few = linear_terms(hidden, head, signal, divergence=name).loss_N
        assert (few <= linear_terms(hidden, head, Dense(teacher), divergence=name).loss_N + 1e-12).all()
    # No loss where the student spreads the tail as the teacher does.
    logits = 2 * torch.randn(N, V, dtype=torch.float64)
    top = top_k(torch.log_softmax(logits, -1), K)
    inside = torch.zeros(N, V, dtype=torch.float64).scatter(1, top.tokens_NK, torch.randn(N, K, dtype=torch.float64))
    student, teacher = torch.log_softmax(logits + inside, -1), torch.log_softmax(logits, -1)
    bucket_kl = DIVERGENCES["forward_kl"](bucketed(student, top.tokens_NK), bucketed(teacher, top.tokens_NK))
    torch.testing.assert_close(bucket_kl, DIVERGENCES["forward_kl"](student, teacher))


def test_a_small_tail_is_not_rounded_away() -> None:
    """In float32 one minus the mass of the top tokens is 0 here, and its logarithm -inf."""
    logits = torch.full((1, 1000), -40.0)
    logits[0, :2] = 0.0
    expected = torch.tensor([998.0]).log() - 40.0 - torch.tensor([2.0]).log()
    torch.testing.assert_close(top_k(torch.log_softmax(logits, -1), 2).tail_logprob_N, expected)


def test_statistics_of_buckets() -> None:
    hidden, head, signal, teacher, tokens = make()
    terms = linear_terms(hidden, head, signal, tokens, stats=SPARSE_STATS, divergence="jsd")
    student = torch.log_softmax(4.0 * torch.tanh(hidden @ head.weight_VH.T / 4.0), -1).detach()
    q, p = by_hand(student.exp(), signal.tokens_NK), by_hand(teacher.exp(), signal.tokens_NK)
    torch.testing.assert_close(terms.stats["forward_kl"], (p * (p / q).log()).sum(-1))
    torch.testing.assert_close(terms.stats["reverse_kl"], (q * (q / p).log()).sum(-1))
    torch.testing.assert_close(terms.stats["entropy"], -(student.exp() * student).sum(-1))
    torch.testing.assert_close(terms.stats["agreement"], (student.argmax(-1) == teacher.argmax(-1)).double())


def test_what_top_k_cannot_give_is_refused() -> None:
    hidden, head, signal, _, tokens = make()
    with pytest.raises(RecipeError, match="temperature of 1 for a teacher's top-k"):
        linear_terms(hidden, head, signal, divergence="jsd", temperature=2.0)
    with pytest.raises(RecipeError, match="top-k allows .*found teacher_entropy"):
        linear_terms(hidden, head, signal, tokens, divergence="jsd", stats=("teacher_entropy",))
    with pytest.raises(ValueError, match="expected the teacher at the student's 7 tokens, found 6"):
        fewer = Sparse(signal.tokens_NK[1:], signal.logprobs_NK[1:], signal.tail_logprob_N[1:])
        linear_terms(hidden, head, fewer, divergence="jsd")
    for k in (0, V + 1):
        with pytest.raises(ValueError, match="top_k expects 1 to 12"):
            top_k(torch.zeros(1, V), k)
