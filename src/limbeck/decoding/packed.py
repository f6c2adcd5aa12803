"""Weights of fewer bits for a model that writes or drafts: a step of one row costs what reading the weights costs.

`int8` has a scale an output row (`aten::_weight_int8pack_mm`). It takes bf16 activations, and pays for few rows alone:
products with more rows keep the model's own weights. Microseconds of a product with one row, two threads of an AMD EPYC
with AVX-512 bf16: of (4864, 896), which the processor's cache holds, bf16 378, int8 146; of (151936, 896) 15 771 and
9 272.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import ModelError

FEW_ROWS = {"own": 32, "int8": 4}
"""Rows of a product up to which each way of keeping weights is used for steps. On the same processor int8 is faster
than bf16 up to 4 rows and slower from 6 on. `own` bounds `Lean` alone, which attends row by row: it saves a fixed time
a pass, and beyond some tokens the model's own forward costs no more."""

WIDTHS = 16
"""Torch's int8 product wants the width of a weight to be a multiple of this: else it reads beyond its end, without a
word. Weights of other widths are kept as they are."""

_int8_product: Any = torch.ops.aten._weight_int8pack_mm


class Packed:
    """hidden @ weight.T + bias, for few rows, of a weight that is rounded to int8 once and not kept. Called with
    (..., H); in its dtype. A weight whose width torch's kernel does not take stays as it is; so does the bias."""

    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None) -> None:
        self.whole_VH = weight_VH if weight_VH.shape[1] % WIDTHS else None
        if self.whole_VH is None:
            self.packed_VH, self.scale_V = quantised(weight_VH)
        self.bias_V = bias_V

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.whole_VH is not None:
            return F.linear(hidden, self.whole_VH, self.bias_V)
        flat_NH = hidden.reshape(-1, hidden.shape[-1]).to(torch.bfloat16)
        product_NV = _int8_product(flat_NH, self.packed_VH, self.scale_V)
        product = product_NV.view(*hidden.shape[:-1], -1).to(hidden.dtype)
        return product if self.bias_V is None else product + self.bias_V.to(hidden.dtype)


class Linear:
    """hidden @ weight.T + bias: packed for few rows, else (and with the packing `own`) with the weight given, which is
    kept and not copied."""

    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None, packing: str) -> None:
        self.weight_VH = weight_VH.detach()
        self.bias_V = None if bias_V is None else bias_V.detach()
        self.few = FEW_ROWS[packing]
        self.packed = None if packing == "own" else Packed(self.weight_VH, self.bias_V)

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.packed is None or hidden.numel() > self.few * hidden.shape[-1]:
            return F.linear(hidden, self.weight_VH, self.bias_V)
        return self.packed(hidden)


def check_packing(packing: str, device: torch.device) -> None:
    """ModelError for a packing that is not known, or not for this device."""
    if packing not in FEW_ROWS:
        raise ModelError(f"weights: expected one of {', '.join(FEW_ROWS)}, found {packing!r}")
    if packing != "own" and device.type != "cpu":
        raise ModelError(f"weights: expected own on {device.type}, found {packing}, which is for a CPU")


def quantised(weight_VH: Tensor) -> tuple[Tensor, Tensor]:
    """(weight in int8, scale of each output row in bf16): weight is about int8 * scale, off by half a scale at most
    beyond bf16's own rounding."""
    scale_V = (weight_VH.float().abs().amax(1) / 127).clamp(min=1e-12).to(torch.bfloat16)
    rounded_VH = (weight_VH.float() / scale_V.float()[:, None]).round().clamp(-127, 127)
    return rounded_VH.to(torch.int8), scale_V


def pack(module: nn.Module, packing: str, new: Mapping[Any, Tensor] | None = None) -> dict[str, Linear]:
    """For every `nn.Linear` of the module that can be packed its packed counterpart, by name; with `new`, weights by
    parameter, for the layers that get one, made of these. Changes nothing; `install` does."""
    made: dict[str, Linear] = {}
    for name, layer in module.named_modules():
        if type(layer) is not nn.Linear or layer.in_features % WIDTHS:
            continue
        if not (new is None or layer.weight in new or layer.bias in new):
            continue
        weight, bias = (own if new is None or own is None else new.get(own, own) for own in (layer.weight, layer.bias))
        assert weight is not None
        made[name] = Linear(weight, bias, packing)
    return made


def install(module: nn.Module, layers: Mapping[str, Linear]) -> None:
    """These layers of the module compute with what `pack` has made."""
    for name, linear in layers.items():
        module.get_submodule(name).forward = linear
