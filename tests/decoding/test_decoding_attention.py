"""One new token a row attends by two products: what torch's kernel gives, and only where it pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decoding_helpers import llama
from torch import Tensor, nn

from limbeck.decoding import Sampling, generate
from limbeck.decoding.attention import NAME, _attend, step_attention


def tensors(queries: int, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query = torch.randn(3, 4, queries, 24).bfloat16()
    key, value = (torch.randn(3, heads, 9, 24).bfloat16() for _ in range(2))
    mask = torch.ones(3, 1, queries, 9, dtype=torch.bool)
    mask[0, ..., :5] = mask[2, ..., :1] = False
    return query, key, value, mask


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_steps_attend_as_torchs_kernel_does(queries: int, heads: int, masked: bool, scaling: float | None):
    module: Any = nn.Module()
    module.num_key_value_groups, module.is_causal = 4 // heads, False
    query, key, value, mask = tensors(queries, heads)
    found, none = _attend(module, query, key, value, mask if masked else None, scaling=scaling)
    wide = [tensor.repeat_interleave(4 // heads, 1).double() for tensor in (key, value)]
    exact = F.scaled_dot_product_attention(query.double(), *wide, attn_mask=mask if masked else None, scale=scaling)
    assert none is None and found.shape == (3, queries, 4, 24) and found.dtype == torch.bfloat16
    assert (found.transpose(1, 2) - exact).abs().max() < 0.03


@pytest.mark.parametrize(("heads", "dtype", "used"), [(2, "bfloat16", True), (1, "bfloat16", False), (2, "float32", 0)])
def test_the_model_attends_as_before_afterwards(heads: int, dtype: str, used: bool):
    model = llama(num_key_value_heads=heads).to(getattr(torch, dtype))
    with pytest.raises(ZeroDivisionError), step_attention(model):
        assert (model.config._attn_implementation == NAME) == bool(used)
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"


def test_what_is_written_in_bf16_has_the_log_probabilities_of_a_full_forward():
    model = llama(num_key_value_heads=2, hidden_size=64).bfloat16()
    prompts = [[5, 6, 7, 3, 9], [8, 9], [3]]
    for prompt, completion in zip(prompts, generate(model, prompts, Sampling(20)), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion.tokens])).logits[0, len(prompt) - 1 : -1].float()
        full = logits.log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        assert (full - torch.tensor(completion.logprobs)).abs().max() < 0.06


def test_what_two_products_do_not_know_goes_to_torchs_kernel():
    """A mask that is added, and a soft-cap, which transformers refuses here."""
    module: Any = nn.Module()
    module.num_key_value_groups, module.is_causal = 1, False
    query, key, value, mask = tensors(1, 4)
    added = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, -torch.inf)
    found, _ = _attend(module, query, key, value, added)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=added)
    assert torch.equal(found.transpose(1, 2), expected)
    with pytest.raises(ValueError, match="softcap"):
        _attend(module, query, key, value, mask, softcap=30.0)
