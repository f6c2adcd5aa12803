"""Attention of one new token a row, in bf16 on a CPU.

Torch's kernel for it is made for many queries to the same keys. With one query a key head it took 2.0 ms where the two
products that it stands for took .36 (64 rows, 6 heads of width 48, 97 columns, two threads of an AMD EPYC); where
several query heads share a key head, as in most newer models, it is about as fast, and stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from limbeck.models import unwrap

NAME = "limbeck_step"


@contextmanager
def step_attention(model: Any) -> Iterator[None]:
    """Meanwhile steps of the model attend by two products, where that is faster; else nothing changes."""
    base: Any = unwrap(model)
    if base.config._attn_implementation != "sdpa" or not _pays(base) or not base._can_set_attn_implementation():
        yield
        return
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    base.set_attn_implementation(NAME)
    try:
        yield
    finally:
        base.set_attn_implementation("sdpa")


def _pays(base: Any) -> bool:
    config = base.config.get_text_config()
    weight: Tensor = base.get_input_embeddings().weight
    heads = config.num_attention_heads
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    single = getattr(config, "num_key_value_heads", None) in (None, heads)
    return single and weight.device.type == "cpu" and dtype == torch.bfloat16


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa_attention_forward`: query (B, heads, Q, D), key and value (B, heads, T, D), mask
    (B, 1, Q, T), True where a query sees a key; (B, Q, heads, D). Scores are rounded to bf16, softmax is in float32."""
    usual = all(kwargs.get(name) is None for name in ("position_bias", "softcap"))
    usual &= attention_mask is None or attention_mask.dtype == torch.bool
    if query.shape[2] > 1 or key.shape[1] != query.shape[1] or query.dtype != torch.bfloat16 or not usual:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scores_BA1T = torch.matmul(key, query.transpose(2, 3)).transpose(2, 3).float()
    scores_BA1T *= query.shape[3] ** -0.5 if scaling is None else scaling
    if attention_mask is not None:
        scores_BA1T.masked_fill_(~attention_mask, -torch.inf)
    return torch.matmul(scores_BA1T.softmax(-1).to(value.dtype), value).transpose(1, 2), None
