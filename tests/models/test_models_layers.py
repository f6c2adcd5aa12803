"""Students cut from a teacher's layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_families import FAMILIES, tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

from limbeck.errors import ModelError
from limbeck.models import cut_layers

STACKS = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}


def logits(model: PreTrainedModel, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15)[None], **options).logits


def skipping(model: PreTrainedModel, family: str, kept: list[int]) -> torch.Tensor:
    """Logits of the whole model with its other layers replaced by the identity: an oracle without any cutting."""
    layers = model.get_submodule(STACKS.get(family.split("_pro")[0], "model.layers"))
    hooks = [
        layer.register_forward_hook(
            lambda _m, inputs, output: (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]
        )
        for place, layer in enumerate(layers.children())
        if place not in kept
    ]
    found = logits(model, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_is_the_model_without_the_other_layers(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    before = logits(model)
    cut = cut_layers(model, [0, 2, 3])
    torch.testing.assert_close(logits(cut), skipping(model, family, [0, 2, 3]), atol=1e-5, rtol=1e-5)
    assert (logits(cut) - before).abs().max() > 1e-2

    cut.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(cut)) and again.config.num_hidden_layers == 3

    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in cut.parameters()}
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.zero_()
    assert not shared and torch.equal(logits(model), before) and model.config.num_hidden_layers == 4


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gemma3"])
def test_a_cut_model_decodes_with_a_cache(family: str) -> None:
    """Layer numbers index the cache: with the old ones, decoding fails or reads another layer's keys."""
    cut = cut_layers(tiny(family), [1, 3])
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        cache = cut(input_ids=tokens[:, :7], use_cache=True).past_key_values
        rest = cut(input_ids=tokens[:, 7:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, logits(cut)[:, 7:], atol=1e-5, rtol=1e-5)


def test_layers_are_kept_in_the_order_asked_for() -> None:
    model = tiny("llama")
    turned = cut_layers(cut_layers(model, [3, 0]), [1, 0])
    assert torch.equal(logits(turned), logits(cut_layers(model, [0, 3])))
    assert not torch.equal(logits(turned), logits(cut_layers(model, [3, 0])))


def test_lists_of_the_configuration_are_cut_along() -> None:
    cut = cut_layers(tiny("gemma3"), [2, 3])
    assert cut.config.layer_types == ["full_attention", "sliding_attention"]
    # A list that by chance has as many entries as there are layers, but not one a layer.
    model = tiny("llama", eos_token_id=[2, 5, 6, 7])
    assert cut_layers(model, [0]).config.eos_token_id == [2, 5, 6, 7]


def test_dtype_and_generation_config_of_a_cut() -> None:
    model = tiny("llama")
    model.generation_config.eos_token_id = [2, 7]
    cut = cut_layers(model, [0, 1], dtype=torch.bfloat16)
    assert {p.dtype for p in cut.parameters()} == {torch.bfloat16}
    assert cut.get_buffer("model.rotary_emb.inv_freq").dtype == torch.float32
    assert cut.generation_config.eos_token_id == [2, 7] and not cut.training


@pytest.mark.parametrize("layers", [[], [0, 0], [4], [-1, 2]])
def test_bad_layers_are_refused(layers: list[int]) -> None:
    with pytest.raises(ModelError, match="from 0 to 3"):
        cut_layers(tiny("llama"), layers)


def test_a_layer_that_would_act_otherwise_at_its_new_place_is_refused() -> None:
    model = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ModelError, match="layer 2 cannot become layer 1: attn.scaling"):
        cut_layers(model, [0, 2])
    cut_layers(model, [0, 1])


def test_a_cut_leaves_the_global_generator_alone() -> None:
    model = tiny("llama")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    cut_layers(model, [0])
    assert torch.equal(torch.rand(1), expected)
