"""Objective and acceptance on traces, against sums over the whole vocabulary in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.errors import ModelError, RecipeError
from limbeck.online.objective import BLEND_RATE, acceptance, find_objective, known_mass, terms
from limbeck.ops.sparse import top_k
from limbeck.types import Head

N, H, V = 40, 16, 60


def _case(seed: int = 0, peak: float = 2.0) -> tuple[Tensor, Head, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(N, H, generator=generator)
    head = Head(torch.randn(V, H, generator=generator) * 0.5, torch.randn(V, generator=generator))
    logits_NV = torch.randn(N, V, generator=generator) * peak
    logits_NV[:5, ::3] = -torch.inf  # zeros in p
    return hidden_NH, head, logits_NV.log_softmax(-1)


def _bias(head: Head) -> Tensor:
    assert head.bias_V is not None
    return head.bias_V.double()


def _draft(hidden_NH: Tensor, head: Head, ids_D: Tensor | None) -> Tensor:
    """q (N, V) in float64, zero outside D."""
    logits_NV = hidden_NH.double() @ head.weight_VH.double().T + _bias(head)
    if ids_D is not None:
        outside_V = torch.ones(V, dtype=torch.bool)
        outside_V[ids_D] = False
        logits_NV = logits_NV.masked_fill(outside_V, -torch.inf)
    return logits_NV.softmax(-1)


VOCABULARIES = {"whole": None, "reduced": torch.tensor([1, 3, 4, 9, 11, 20, 33, 34, 35, 50, 59])}


@pytest.mark.parametrize("name", list(VOCABULARIES))
def test_acceptance_is_the_overlap_with_the_whole_p(name: str) -> None:
    ids_D = VOCABULARIES[name]
    hidden_NH, head, logprobs_NV = _case()
    expected_N = torch.minimum(logprobs_NV.double().exp(), _draft(hidden_NH, head, ids_D)).sum(-1)
    found_N = acceptance(hidden_NH, head, top_k(logprobs_NV, V), ids_D)
    assert torch.allclose(found_N.double(), expected_N, atol=1e-5)
    if ids_D is not None:
        mass_N = logprobs_NV.exp()[:, ids_D].sum(-1)
        assert torch.allclose(known_mass(top_k(logprobs_NV, V), ids_D), mass_N, atol=1e-5)
        assert bool((found_N <= mass_N + 1e-5).all()) and float(mass_N.mean()) < 0.5


@pytest.mark.parametrize("name", list(VOCABULARIES))
def test_acceptance_from_top_k_is_off_by_the_tail_at_most(name: str) -> None:
    ids_D = VOCABULARIES[name]
    hidden_NH, head, logprobs_NV = _case(1)
    exact_N = torch.minimum(logprobs_NV.double().exp(), _draft(hidden_NH, head, ids_D)).sum(-1)
    for k in (4, 8, 16):
        signal = top_k(logprobs_NV, k)
        off_N = acceptance(hidden_NH, head, signal, ids_D).double() - exact_N
        assert bool((off_N >= -1e-5).all()) and bool((off_N <= signal.tail_logprob_N.exp() + 1e-5).all())


def test_identical_and_disjoint() -> None:
    hidden_NH, head, _ = _case(2)
    logprobs_NV = _draft(hidden_NH, head, None).log().float()
    assert torch.allclose(acceptance(hidden_NH, head, top_k(logprobs_NV, V), None), torch.ones(N), atol=1e-5)
    elsewhere_NV = torch.full((N, V), -torch.inf)
    elsewhere_NV[:, 0] = 0
    found_N = acceptance(hidden_NH, head, top_k(elsewhere_NV, V), VOCABULARIES["reduced"])
    assert torch.allclose(found_N, torch.zeros(N), atol=1e-6)


@pytest.mark.parametrize("vocabulary", list(VOCABULARIES))
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "total_variation", "blend"])
def test_gradients_are_those_of_the_sums_over_d(name: str, vocabulary: str) -> None:
    ids_D = VOCABULARIES[vocabulary]
    hidden_NH, head, logprobs_NV = _case(3)
    logprobs_NV = logprobs_NV[5:]  # every p above zero: reverse KL
    hidden_NH = hidden_NH[5:].requires_grad_()
    weight_VH = head.weight_VH.clone().requires_grad_()
    terms(
        hidden_NH, Head(weight_VH, head.bias_V), top_k(logprobs_NV, V), ids_D, find_objective(name)
    ).loss_N.sum().backward()

    hidden64_NH = hidden_NH.detach().double().requires_grad_()
    weight64_VH = head.weight_VH.double().requires_grad_()
    ids = torch.arange(V) if ids_D is None else ids_D
    log_q = (hidden64_NH @ weight64_VH.T + _bias(head))[:, ids].log_softmax(-1)
    log_p = logprobs_NV.double()[:, ids]  # not renormalised
    p, q = log_p.exp(), log_q.exp()
    overlap = torch.minimum(p, q).sum(-1)
    kl = (p * (log_p - log_q)).sum(-1)
    mixed = (0.5 * (p + q)).log()
    weight = torch.exp(-BLEND_RATE * overlap.detach())
    loss = {
        "forward_kl": kl,
        "reverse_kl": (q * (log_q - log_p)).sum(-1),
        "jsd": 0.5 * (p * (log_p - mixed)).sum(-1) + 0.5 * (q * (log_q - mixed)).sum(-1),
        "total_variation": -overlap,  # one minus it, but for a constant
        "blend": weight * kl - (1 - weight) * overlap,
    }[name]
    loss.sum().backward()
    for found, expected in ((hidden_NH.grad, hidden64_NH.grad), (weight_VH.grad, weight64_VH.grad)):
        assert found is not None and expected is not None
        assert torch.allclose(found.double(), expected, atol=2e-5 * float(expected.abs().max()) + 1e-6)


def test_refused() -> None:
    with pytest.raises(RecipeError, match="forward_kl"):
        find_objective("forward_kk")
    hidden_NH, head, logprobs_NV = _case()
    capped = Head(head.weight_VH, head.bias_V, softcap=30.0)
    with pytest.raises(ModelError, match="soft-cap"):
        acceptance(hidden_NH, capped, top_k(logprobs_NV, 4), VOCABULARIES["reduced"])
