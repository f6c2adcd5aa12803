"""The acceptance rule by arithmetic: whatever p and q are, what comes out is p."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.decoding.verify import accepts, leading, overlap, residual, residual_of_point

SIZE = 7


def distributions(count: int, size: int, zeros: float, seed: int) -> Tensor:
    """(count, size) in float64, of which a share `zeros` of the entries is 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(count, size, generator=generator, dtype=torch.float64) ** 3
    weights[torch.rand(count, size, generator=generator) < zeros] = 0
    weights[:, 0] += weights.sum(-1) == 0
    return weights / weights.sum(-1, keepdim=True)


def outcome(p_NV: Tensor, q_ND: Tensor, ids_D: Tensor | None) -> Tensor:
    """The distribution of the token that is kept or drawn in its place, summed over what may be drafted."""
    whole = torch.zeros_like(p_NV)
    whole[:, torch.arange(SIZE) if ids_D is None else ids_D] = q_ND
    # An acceptance probability is the length of the uniforms that accept: found by bisection, from `accepts` itself.
    low, high = torch.zeros_like(p_NV), torch.ones_like(p_NV)
    for _ in range(60):
        middle = (low + high) / 2
        kept = accepts(p_NV, whole, middle)
        low, high = torch.where(kept, middle, low), torch.where(kept, high, middle)
    accepted = whole * high * (whole > 0)
    rest = residual(p_NV, q_ND, ids_D)
    rejected = 1 - accepted.sum(-1, keepdim=True)
    return accepted + rejected * rest / rest.sum(-1, keepdim=True)


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.85])
@pytest.mark.parametrize("ids", [None, [1, 4, 6], [3]])
def test_what_comes_out_is_p(zeros: float, ids: list[int] | None):
    ids_D = None if ids is None else torch.tensor(ids)
    p_NV = distributions(200, SIZE, zeros, 1)
    q_ND = distributions(200, SIZE if ids is None else len(ids), zeros, 2)
    torch.testing.assert_close(outcome(p_NV, q_ND, ids_D), p_NV, atol=1e-12, rtol=0)


def test_what_comes_out_is_p_where_q_is_p():
    p_NV = distributions(200, SIZE, 0.5, 3)
    torch.testing.assert_close(outcome(p_NV, p_NV.clone(), None), p_NV, atol=1e-12, rtol=0)
    assert torch.equal(residual(p_NV, p_NV.clone(), None), p_NV)  # and not 0 / 0
    assert accepts(p_NV[p_NV > 0], p_NV[p_NV > 0], torch.tensor([1 - 2**-52], dtype=torch.float64)).all()


def test_a_point_mass_is_a_distribution():
    p_NV = distributions(50, SIZE, 0.3, 4)
    tokens_N = torch.arange(50) % SIZE
    point_NV = torch.nn.functional.one_hot(tokens_N, SIZE).double()
    torch.testing.assert_close(residual_of_point(p_NV, tokens_N), residual(p_NV, point_NV, None))
    torch.testing.assert_close(outcome(p_NV, point_NV, None), p_NV, atol=1e-12, rtol=0)
    sure_NV = point_NV.clone()
    assert torch.equal(residual_of_point(sure_NV, tokens_N), sure_NV)


def test_impossible_tokens_are_never_kept():
    assert not accepts(torch.tensor([0.0]), torch.tensor([0.5]), torch.tensor([0.0]))
    p_NV, q_NV = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.0, 0.2, 0.8]])
    assert residual(p_NV, q_NV, None)[0, 2] == 0
    assert residual(p_NV, q_NV, None)[0].tolist() == pytest.approx([0.5, 0.3, 0.0])


def test_overlap_is_one_minus_total_variation():
    p_NV, q_NV = distributions(100, SIZE, 0.4, 5), distributions(100, SIZE, 0.4, 6)
    torch.testing.assert_close(overlap(p_NV, q_NV, None), 1 - (p_NV - q_NV).abs().sum(-1) / 2)


def test_overlap_over_some_tokens_takes_p_as_it_is():
    ids_D = torch.tensor([0, 2])
    p_NV = torch.tensor([[0.1, 0.7, 0.2]])
    # Renormalised over the two tokens p would be (1/3, 2/3), and the overlap 1.
    assert overlap(p_NV, torch.tensor([[1 / 3, 2 / 3]]), ids_D).item() == pytest.approx(0.3)
    p_NV, q_ND = distributions(100, SIZE, 0.2, 7), distributions(100, 2, 0.2, 8)
    assert (overlap(p_NV, q_ND, ids_D) <= p_NV[:, ids_D].sum(-1) + 1e-12).all()


def test_leading_counts_up_to_the_first_rejection():
    kept_BG = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    assert leading(kept_BG, [4, 4, 4, 2]) == [2, 4, 0, 2]
