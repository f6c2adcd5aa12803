"""Weights of four bits: how far they are from the model's own, and what torch's product makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from speculative_helpers import feature, half, requests_of, serve, target
from test_decoding_families import PROMPTS
from torch import Tensor, nn

from limbeck.decoding import Engine, Fixed, Sampling, generate, layers_draft
from limbeck.decoding.packed import FEW_ROWS, GROUP, Linear, Rounded, check_packing, quantised, quantised4
from limbeck.errors import ModelError


def dequantised(weight_VH: Tensor) -> Tensor:
    """In float64."""
    levels_VH, scales_GV2 = quantised4(weight_VH)
    scale_VG1, zero_VG1 = scales_GV2.double().transpose(0, 1)[..., None].unbind(2)
    return ((levels_VH.double().unflatten(1, (-1, GROUP)) - 8) * scale_VG1 + zero_VG1).flatten(1)


def test_weights_are_off_by_half_a_scale_at_most():
    torch.manual_seed(0)
    weight = torch.randn(6, 96) * torch.logspace(-3, 3, 6)[:, None]
    weight[2] += 20.0 * weight[2].abs().amax()  # its groups are far from zero
    weight[3] = 0.0
    levels, scales = quantised4(weight)
    assert levels.dtype == torch.int32 and levels.min() >= 0 and levels.max() == 15
    assert scales.shape == (3, 6, 2) and scales.dtype == torch.bfloat16
    steps = scales[..., 0].double().T[..., None]
    largest = weight.double().unflatten(1, (-1, GROUP)).abs().amax(-1, keepdim=True)
    error = (dequantised(weight) - weight).unflatten(1, (-1, GROUP)).abs()
    # bf16 has 8 bits: it rounds a zero by 2 ** -9 of it, and fifteen scales by as much of theirs.
    assert (error <= steps * (0.5 + 15 / 512) + largest / 256).all()
    inner = (levels.unflatten(1, (-1, GROUP)) > 0) & (levels.unflatten(1, (-1, GROUP)) < 15)
    assert inner[2].any() and (error <= 0.501 * steps)[inner].all() and (error[3] == 0).all()


def test_weights_that_stand_on_sixteen_levels_are_kept():
    """As those of a 4-bit file do, whose groups use the lowest and the highest."""
    levels = torch.randint(0, 16, (32, 64))
    levels[:, [0, 32]], levels[:, [1, 33]] = 0, 15
    weight = (levels - 5) * torch.tensor([0.25, 0.0625]).repeat_interleave(32)
    assert torch.equal(dequantised(weight), weight.double())
    assert torch.equal(quantised4(weight)[0], levels.int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (64, 64), (112, 160), (208, 896)])
def test_products_are_those_of_the_rounded_weights(shape: tuple[int, int], dtype: torch.dtype):
    torch.manual_seed(1)
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    linear = Linear(weight, bias, "int4")
    for rows in (1, 2, 5, FEW_ROWS["int4"]):
        hidden = torch.randn(rows, 1, shape[1]).to(dtype)
        found = linear(hidden)
        expected = hidden.bfloat16().double() @ dequantised(weight).T
        # The product is rounded to bf16, and so is its sum with the bias where the model is in bf16.
        bound = 2**-8 * (expected.abs() + (expected + bias.double()).abs()) + 1e-3
        assert found.dtype == dtype and ((found.double() - expected - bias.double()).abs() <= bound).all()
        assert 0.01 < (found - nn.functional.linear(hidden, weight, bias)).norm() / found.norm() < 0.2
    many = torch.randn(FEW_ROWS["int4"] + 1, shape[1]).to(dtype)
    assert torch.equal(linear(many), nn.functional.linear(many, weight, bias))


@pytest.mark.parametrize("shape", [(24, 64), (3, 64), (32, 48), (64, 16)])
def test_shapes_that_the_kernel_does_not_take_get_int8(shape: tuple[int, int]):
    weight, hidden = torch.randn(shape), torch.randn(2, shape[1])
    assert torch.equal(Rounded(weight, None, "int4")(hidden), Rounded(weight, None, "int8")(hidden))
    rounded, scale = quantised(weight)
    expected = hidden.bfloat16().double() @ (rounded.double() * scale.double()[:, None]).T
    assert (Rounded(weight, None, "int4")(hidden) - expected).norm() < 0.01 * expected.norm()


def test_widths_that_neither_kernel_takes_stay_as_they_are():
    weight, hidden = torch.randn(32, 40), torch.randn(2, 40)
    assert torch.equal(Rounded(weight, None, "int4")(hidden), hidden @ weight.T)


def test_it_is_for_a_cpu():
    with pytest.raises(ModelError, match="expected own on cuda, found int4"):
        check_packing("int4", torch.device("cuda"))


MADE: dict[str, Any] = {
    "layers": lambda model: layers_draft(model, [0], weights="int4", ids_D=half(model)),
    "feature": lambda model: feature(model, weights="int4"),
}


@pytest.mark.parametrize("kind", MADE)
def test_a_draft_of_four_bits_drafts_and_changes_nothing(kind: str):
    model = target(vocabulary=32)
    sampling = Sampling(24, temperature=0)
    prompts = [[token % 32 for token in prompt] for prompt in PROMPTS]
    expected = [completion.tokens for completion in generate(model, prompts, sampling)]
    draft = MADE[kind](model)
    found = serve(Engine(model, None, {"draft": draft}, Fixed("draft", 3), max_batch=4), requests_of(prompts, sampling))
    assert [event.tokens for event in found] == expected
    assert sum(event.counters.accepted for event in found if event.counters is not None) > 0
    # The head is of eight bits: its product is that of int8, bit by bit.
    hidden = torch.randn(1, 64)
    rows = slice(None) if draft.ids_D is None else draft.ids_D
    eight = Rounded(draft.head.weight_VH[rows], None, "int8")
    assert torch.equal(draft.head.project(hidden), eight(hidden))


def test_the_layers_of_a_draft_are_of_four_bits():
    model = target()
    four, eight, own = (layers_draft(model, [0], weights=weights) for weights in ("int4", "int8", "own"))
    states = []
    for draft in (four, eight, own):
        with torch.no_grad():
            draft.reader.read([0], [[5, 6, 7]], [0])
            states.append(draft.reader.read([0], [[8]], [3])[0])
    off = [(state - states[2]).norm() / states[2].norm() for state in states[:2]]
    assert 0.02 < off[0] < 0.3 and off[1] < off[0] / 4
