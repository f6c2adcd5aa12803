"""Which models the lean forward knows, and for which passes it is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from speculative_helpers import target
from test_decoding_families import PROMPTS, tiny

from limbeck.decoding.lean import LEAN_ROWS, is_lean
from limbeck.decoding.reader import Reader


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gemma", "olmo", "smollm3"])
def test_families_with_other_norms_or_rotations_are_read_by_their_own_forward(family: str, dtype: torch.dtype):
    model: Any = tiny(family)
    model.to(dtype)
    assert not is_lean(model.model) and Reader(model).lean is None


def test_a_model_of_such_a_family_that_does_as_the_others_is_lean():
    assert Reader(tiny("smollm3", no_rope_layers=[1] * 4)).lean is not None


def test_a_large_entry_does_not_hide_that_the_others_differ():
    """A model with one entry of its states far above the others, as they come from training, and a layer that does
    something else than its parts say."""
    model: Any = tiny("llama")
    model.to(torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0  # nobody writes to it
        model.model.embed_tokens.weight[:, 0] = 40
    assert Reader(model).lean is not None
    model.model.layers[2].mlp.register_forward_hook(lambda *arguments: arguments[-1] * 1.5)
    with torch.no_grad():
        states = model.model(input_ids=torch.tensor([PROMPTS[2]])).last_hidden_state.abs()
    assert (states[..., 0] > 4 * states[..., 1:].amax(-1)).all()
    assert Reader(model).lean is None


@torch.no_grad()
@pytest.mark.parametrize("weights", ["own", "int8", "int4"])
def test_passes_up_to_some_tokens_are_lean(weights: str):
    """A lean pass calls no hooks."""
    reader = Reader(target(max_position_embeddings=256), weights)
    whole: list[Any] = []
    reader.body.register_forward_hook(lambda *_: whole.append(1))
    most = LEAN_ROWS[weights]
    reader.read(list(range(40)), [[5, 6, 7, 8]] * 40, [0] * 40)
    assert reader.lean is not None and len(whole) == 1
    for rows, width, lean in (
        (1, most, True),
        (1, most + 1, False),
        (4, most // 4, True),
        (32, 1, most >= 32),
        (40, 1, False),
    ):
        whole.clear()
        reader.read(list(range(rows)), [[5] * width] * rows, [4] * rows)
        assert len(whole) == (0 if lean else 1), (rows, width)
