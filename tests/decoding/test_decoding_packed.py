"""Weights in oneDNN's order while a model writes: the same numbers, and gone afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from decoding_helpers import llama
from test_decoding_families import PROMPTS, tiny
from torch import nn

from limbeck.decoding import NgramDraft, Sampling, generate, int8_weights, packed, speculate
from limbeck.decoding.packed import FEW_ROWS, installed, pack, packed_weights
from limbeck.ops import products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture(autouse=True)
def _pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where packing pays, for weights as small as a test's."""
    monkeypatch.setattr(packed, "LEAST", 1)
    monkeypatch.setattr(products, "packing_pays", lambda dtype: dtype in products.packable())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_packed_layers_compute_what_they_did(bias: bool, autocast: bool):
    model: Any = nn.Sequential(nn.Linear(48, 80, bias=bias))
    few, many = torch.randn(3, 48), torch.randn(FEW_ROWS["own"] + 1, 48)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        expected = model(few), model(many)
        with packed_weights(model):
            taken = (torch.bfloat16 if autocast else torch.float32) in products.packable()
            assert ("forward" in model[0].__dict__) == taken
            found = model(few), model(many)
    close = 2e-2 if autocast else 1e-5
    for mine, right in zip(found, expected, strict=True):
        assert mine.dtype == right.dtype and (mine - right).abs().max() <= close
    assert torch.equal(found[1], expected[1])  # its own product


@torch.no_grad()
def test_layers_that_are_packed_already_stay_as_they_are():
    model = llama(hidden_size=64, intermediate_size=96)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    hidden = torch.randn(1, 64)
    with int8_weights(model):
        rounded = layer(hidden)
        with packed_weights(model):
            assert torch.equal(layer(hidden), rounded)
        with installed(pack(model, "own")):  # as a reader of the same model does
            assert not torch.equal(layer(hidden), rounded)
        assert torch.equal(layer(hidden), rounded)
    assert not torch.equal(layer(hidden), rounded)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_completions_are_the_models_own(temperature: float, monkeypatch: pytest.MonkeyPatch):
    model = llama(hidden_size=64, intermediate_size=96)
    prompts, sampling = [[5, 6, 7], [8, 9], [3]], Sampling(20, temperature=temperature)
    made: list[Any] = []
    given = packed.pack
    monkeypatch.setattr(packed, "pack", lambda *args, **options: made.append(given(*args, **options)) or made[-1])
    written = generate(model, prompts, sampling)
    assert len(made) == 1 and len(made[0]) == 15  # seven products a layer, and the head
    assert not any("forward" in module.__dict__ for module in model.modules())
    monkeypatch.setattr(products, "packing_pays", lambda dtype: False)
    expected = generate(model, prompts, sampling)
    assert not made[1] and [c.tokens for c in written] == [c.tokens for c in expected]
    for mine, right in zip(written, expected, strict=True):
        assert torch.allclose(torch.tensor(mine.logprobs), torch.tensor(right.logprobs), atol=1e-4)


def test_a_model_that_was_served_is_trained_as_any_other():
    """Gradients, and what it writes after a step of training: nothing of the packed weights is left in it."""
    served: Any = tiny("gemma2")
    untouched, inputs = copy.deepcopy(served), torch.tensor([PROMPTS[2]])
    packs: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        made = packed.products.Packed
        patch.setattr(packed.products, "Packed", lambda *weights: packs.append(1) or made(*weights))
        speculate(served, NgramDraft(size=1), PROMPTS, Sampling(8, temperature=0))
    assert len(packs) > 20  # not read by `Lean`, which would leave its layers alone
    for model in (served, untouched):
        model(input_ids=inputs, labels=inputs).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    for mine, right in zip(served.parameters(), untouched.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, right.grad)
    with torch.no_grad():
        torch.testing.assert_close(served(input_ids=inputs).logits, untouched(input_ids=inputs).logits)
