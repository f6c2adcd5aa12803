"""Writing with int8 weights: close to the model's own, for few rows alone, and gone afterwards."""

from __future__ import annotations

import pytest
import torch
from decoding_helpers import llama

from limbeck.decoding import Sampling, generate, int8_weights
from limbeck.decoding.packed import FEW_ROWS, quantised


def test_weights_are_off_by_half_a_scale_at_most() -> None:
    weight = torch.randn(7, 32) * torch.logspace(-3, 3, 7)[:, None]
    weight[3] = 0.0
    rounded, scale = quantised(weight)
    assert rounded.dtype == torch.int8 and scale.dtype == torch.bfloat16
    error = (rounded.float() * scale.float()[:, None] - weight).abs()
    # The largest entry may be clamped where bf16 has rounded the scale down: by 127 / 256 of a scale at most.
    assert (error <= 0.51 * scale.float()[:, None]).all()
    assert (rounded[3] == 0).all() and rounded.abs().amax(1)[[0, 1, 2, 4, 5, 6]].min() >= 126


def test_few_rows_use_int8_and_many_their_own_weights() -> None:
    model = llama(hidden_size=64, intermediate_size=96)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    few, many = torch.randn(1, FEW_ROWS["int8"], 64), torch.randn(1, FEW_ROWS["int8"] + 1, 64)
    own = layer(few), layer(many)
    with int8_weights(model):
        assert torch.equal(layer(many), own[1])
        error = (layer(few) - own[0]).norm() / own[0].norm()
        assert 1e-4 < error < 0.02
    assert torch.equal(layer(few), own[0]) and "forward" not in layer.__dict__


def test_completions_are_nearly_the_models_own_and_the_weights_its_own_again() -> None:
    model = llama(hidden_size=64, intermediate_size=96)
    prompts = [[5, 6, 7], [8, 9]]
    sampling = Sampling(20, n=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = generate(model, prompts, sampling)
    with int8_weights(model):
        written = generate(model, prompts, sampling)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [c.tokens for c in generate(model, prompts, sampling)] == [c.tokens for c in expected]
    gap = torch.tensor(written[0].logprobs[:1]) - torch.tensor(expected[0].logprobs[:1])
    assert written[0].logprobs != expected[0].logprobs and gap.abs().max() < 0.2


def test_the_layers_are_put_back_after_an_error() -> None:
    model = llama()
    with pytest.raises(ZeroDivisionError), int8_weights(model):
        raise ZeroDivisionError
    assert not any("forward" in module.__dict__ for module in model.modules())
