"""Linear layers with int8 weights while a model writes: on a CPU a step reads half the bytes of bf16.

torch's own weight-only product (`aten::_weight_int8pack_mm`: bf16 activations, one scale an output row). It pays for
few rows, where reading the weights is the whole cost; products with more rows keep the model's own weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import RolloutError
from limbeck.models import unwrap

MOST_ROWS = 4
"""Rows of a product up to which int8 weights are used: beyond, torch's int8 product is slower than its bf16 one (with
AVX-512 bf16, two threads, K = 896, N = 4864 and 151 936: faster up to 4 rows, slower from 6 on)."""

WIDTHS = 16
"""Torch's int8 product wants the width of a weight to be a multiple of this: else it reads beyond its end, without a
word. Layers of other widths keep their own weights."""


@contextmanager
def int8_weights(model: Any) -> Iterator[None]:
    """Meanwhile every `nn.Linear` of the model, output head included, computes products of few rows with weights that
    are rounded to int8 on entry. The model's own weights are neither changed nor freed.

    Raises RolloutError on another device than a CPU, which torch's product is for.
    """
    base: Any = unwrap(model)
    if base.device.type != "cpu":
        raise RolloutError(
            f"int8 weights: expected a model on a CPU, found {base.device.type}: set int8_rollouts=false"
        )
    linear = (module for module in base.modules() if type(module) is nn.Linear)
    layers: list[Any] = [layer for layer in linear if layer.in_features % WIDTHS == 0]
    try:
        for layer in layers:
            layer.forward = _Int8(layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


class _Int8:
    """The forward of one layer."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.weight_VH, self.scale_V = quantised(layer.weight.detach())

    def __call__(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        if len(rows) > MOST_ROWS:
            return nn.Linear.forward(self.layer, hidden)
        product = torch.ops.aten._weight_int8pack_mm(rows.to(torch.bfloat16), self.weight_VH, self.scale_V)
        product = product.to(hidden.dtype).reshape(*hidden.shape[:-1], -1)
        return product if self.layer.bias is None else product + self.layer.bias.to(hidden.dtype)


def quantised(weight_VH: Tensor) -> tuple[Tensor, Tensor]:
    """(weight in int8, scale of each output row in bf16): weight is about int8 * scale, off by half a scale at most
    beyond bf16's own rounding."""
    scale_V = (weight_VH.float().abs().amax(1) / 127).clamp(min=1e-12).to(torch.bfloat16)
    rounded_VH = (weight_VH.float() / scale_V.float()[:, None]).round().clamp(-127, 127)
    return rounded_VH.to(torch.int8), scale_V
