"""Weights of fewer bits for a model that drafts: a step of one row costs what reading the weights costs.

`int8` is torch's weight-only product with a scale an output row (see `int8`); `int4` has a scale and an offset for
every 32 weights (`aten::_weight_int4pack_mm_for_cpu`). Both take bf16 activations, and pay for few rows alone: products
with more rows keep the model's own weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.decoding.int8 import MOST_ROWS, WIDTHS, quantised
from limbeck.errors import ModelError

FEW_ROWS = {"own": 32, "int8": MOST_ROWS, "int4": 8}
"""Rows of a product up to which each way of keeping weights is used for steps (`int4` is faster than bf16 up to 8)."""

_GROUP = 32
_ROWS = 64  # output rows that torch's int4 kernel wants a multiple of


class Packed:
    """hidden @ weight.T + bias, for few rows, of a weight that is rounded once. Called with (..., H); in its dtype.

    A shape that torch's int4 kernel does not take is packed as int8, and one that neither takes is kept as it is.
    ModelError for another packing or device.
    """

    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None, packing: str) -> None:
        check_packing(packing, weight_VH.device)
        rows, width = weight_VH.shape
        self.groups = packing == "int4" and rows % _ROWS == 0 and width % _GROUP == 0
        self.whole_VH = weight_VH if width % WIDTHS else None
        if self.whole_VH is None:
            self.packed, self.scales = (int4 if self.groups else quantised)(weight_VH)
        self.bias_V = None if bias_V is None else bias_V.detach().to(torch.bfloat16)

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.whole_VH is not None:
            product = F.linear(hidden, self.whole_VH)
            return product if self.bias_V is None else product + self.bias_V.to(product.dtype)
        flat_NH = hidden.reshape(-1, hidden.shape[-1]).to(torch.bfloat16)
        if self.groups:
            product_NV = _int4_product(flat_NH, self.packed, _GROUP, self.scales)
        else:
            product_NV = _int8_product(flat_NH, self.packed, self.scales)
        if self.bias_V is not None:
            product_NV += self.bias_V
        return product_NV.view(*hidden.shape[:-1], -1).to(hidden.dtype)


_int4_product: Any = torch.ops.aten._weight_int4pack_mm_for_cpu
_int8_product: Any = torch.ops.aten._weight_int8pack_mm


class Linear:
    """hidden @ weight.T + bias: packed for few rows, else (and with the packing `own`) with the weight given, which is
    kept and not copied."""

    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None, packing: str) -> None:
        self.weight_VH = weight_VH.detach()
        self.bias_V = None if bias_V is None else bias_V.detach()
        self.packed = None if packing == "own" else Packed(self.weight_VH, self.bias_V, packing)
        self.few = FEW_ROWS[packing]

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


def int4(weight_VH: Tensor) -> tuple[Tensor, Tensor]:
    """(weights in torch's packed order, scale and offset of each group (H / 32, V, 2) in bf16): weight is about
    (level - 8) * scale + offset with levels 0 to 15, off by half a scale at most beyond bf16's own rounding."""
    groups_VGK = weight_VH.float().unflatten(1, (-1, _GROUP))
    low_VG, high_VG = groups_VGK.amin(-1), groups_VGK.amax(-1)
    scale_VG = ((high_VG - low_VG) / 15).clamp(min=1e-12).to(torch.bfloat16)
    offset_VG = (low_VG + 8 * scale_VG.float()).to(torch.bfloat16)
    level_VGK = (groups_VGK - offset_VG.float()[..., None]) / scale_VG.float()[..., None] + 8
    level_VH = level_VGK.round().clamp(0, 15).flatten(1).to(torch.int32)
    scales_GV2 = torch.stack((scale_VG, offset_VG), -1).transpose(0, 1).contiguous()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(level_VH, 1), scales_GV2


def pack(module: nn.Module, packing: str, new: Mapping[Any, Tensor] | None = None) -> dict[str, Linear]:
    """For every `nn.Linear` of the module its packed counterpart, by name; with `new`, weights by parameter, for the
    layers that get one, made of these. Changes nothing; `install` does."""
    made: dict[str, Linear] = {}
    for name, layer in module.named_modules():
        if type(layer) is not nn.Linear or not (new is None or layer.weight in new or layer.bias in new):
            continue
        weight, bias = (own if new is None or own is None else new.get(own, own) for own in (layer.weight, layer.bias))
        assert weight is not None
        made[name] = Linear(weight, bias, packing)
    return made


def install(module: nn.Module, layers: Mapping[str, Linear]) -> None:
    """These layers of the module compute with what `pack` has made."""
    for name, linear in layers.items():
        module.get_submodule(name).forward = linear
