"""Weights kept ready for products of few rows: a step of a model that writes or drafts costs what reading them costs.

`own` keeps a weight's numbers, in oneDNN's own order where that is faster on this machine (`ops.products.Packed`).
`int8` has a scale an output row (`aten::_weight_int8pack_mm`), `int4` a scale and a zero for each group of an output
row (`aten::_weight_int4pack_mm_for_cpu`). Both take bf16 activations, and pay for few rows alone: products with more
rows keep the model's own weights. Milliseconds of all products of a 0.5 B model's 24 layers, two threads of an AMD EPYC
with AVX-512 bf16 and another process beside:

    rows                              bf16 by torch   own    int8    int4
    1, weights from memory                     24.3   17.0   10.7     6.5
    8                                          28.3   19.5   22.2    17.3
    12                                         29.5   20.4   29.0    25.3
    1, weights from the cache                  21.8            4.4     4.9
    8                                          26.2           16.8    16.4
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from limbeck.errors import ModelError
from limbeck.models.linear import is_linear
from limbeck.ops import products

FEW_ROWS = {"own": 256, "int8": 8, "int4": 8}
"""Rows of a product up to which each way of keeping weights is used, by the table above; with more rows than 256
oneDNN's order saves little."""

LEAST = 1 << 16
"""Entries of a weight from which on it is worth keeping in oneDNN's order."""

WIDTHS = 16
"""Torch's int8 product wants the width of a weight to be a multiple of this: else it reads beyond its end, without a
word. Weights of other widths are kept as they are."""

GROUP, _INT4_ROWS = 32, 16
"""Entries of a row that share a scale in int4, as in most 4-bit files of models, and what torch's product wants the
number of rows to be a multiple of. Weights that do not divide so are rounded to int8."""

_aten: Any = torch.ops.aten


class Rounded:
    """hidden @ weight.T + bias, for few rows, of a weight that is rounded once, to int8 or int4, and not kept. Called
    with (..., H); in its dtype. A weight of no multiple of `WIDTHS` columns stays as it is; so does the bias."""

    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None, packing: str) -> None:
        self.whole_VH = weight_VH if weight_VH.shape[1] % WIDTHS else None
        if self.whole_VH is None:
            self.product = _rounded_product(weight_VH, packing)
        self.bias_V = bias_V

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.whole_VH is not None:
            return F.linear(hidden, self.whole_VH, self.bias_V)
        product_NV = self.product(hidden.reshape(-1, hidden.shape[-1]).to(torch.bfloat16))
        product = product_NV.view(*hidden.shape[:-1], -1).to(hidden.dtype)
        return product if self.bias_V is None else product + self.bias_V.to(hidden.dtype)


def _rounded_product(weight_VH: Tensor, packing: str) -> Callable[[Tensor], Tensor]:
    """From bf16 (N, H) to bf16 (N, V)."""
    rows, width = weight_VH.shape
    if packing == "int4" and rows % _INT4_ROWS == 0 and width % GROUP == 0:
        levels_VH, scales_GV2 = quantised4(weight_VH)
        packed_VH = _aten._convert_weight_to_int4pack_for_cpu(levels_VH, 1)
        return lambda hidden_NH: _aten._weight_int4pack_mm_for_cpu(hidden_NH, packed_VH, GROUP, scales_GV2)
    rounded_VH, scale_V = quantised(weight_VH)
    return lambda hidden_NH: _aten._weight_int8pack_mm(hidden_NH, rounded_VH, scale_V)


class Linear:
    """hidden @ weight.T + bias: packed for few rows where that pays, else with the weight given, which is kept and not
    copied. `dtype`: of the packed product, where it is not the weight's (under autocast)."""

    def __init__(
        self, weight_VH: Tensor, bias_V: Tensor | None, packing: str, dtype: torch.dtype | None = None
    ) -> None:
        self.weight_VH = weight_VH.detach()
        self.bias_V = None if bias_V is None else bias_V.detach()
        self.few = FEW_ROWS[packing]
        self.packed = packed(self.weight_VH, self.bias_V, packing, dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.packed is None or hidden.numel() > self.few * hidden.shape[-1]:
            return products.linear(hidden, self.weight_VH, self.bias_V)
        return self.packed(hidden)


def packed(
    weight_VH: Tensor, bias_V: Tensor | None, packing: str, dtype: torch.dtype | None = None
) -> Rounded | products.Packed | None:
    """The product with a weight that is kept as `packing` says; None where `own` does not pay."""
    if packing != "own":
        return Rounded(weight_VH, bias_V, packing)
    dtype = dtype or weight_VH.dtype
    plain = type(weight_VH) in (Tensor, Parameter) and weight_VH.device.type == "cpu"
    if not plain or weight_VH.numel() < LEAST or not products.packing_pays(dtype):
        return None
    return products.Packed(weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype))


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


def quantised4(weight_VH: Tensor) -> tuple[Tensor, Tensor]:
    """(levels from 0 to 15 in int32, (scale, zero) of each group in bf16 (H / GROUP, V, 2)): weight is about
    (level - 8) * scale + zero, off by half a scale at most beyond bf16's rounding of the two."""
    groups_VGE = weight_VH.float().unflatten(1, (-1, GROUP))
    low_VG1, high_VG1 = groups_VGE.aminmax(dim=-1, keepdim=True)
    scale_VG1 = ((high_VG1 - low_VG1) / 15).clamp(min=1e-12).bfloat16()
    zero_VG1 = (low_VG1 + 8 * scale_VG1).bfloat16()
    levels_VGE = ((groups_VGE - zero_VG1) / scale_VG1).round().clamp(-8, 7) + 8
    return levels_VGE.flatten(1).int(), torch.cat((scale_VG1, zero_VG1), -1).transpose(0, 1).contiguous()


def pack(
    module: nn.Module, packing: str, new: Mapping[Any, Tensor] | None = None, *, besides: bool = False
) -> dict[nn.Module, Linear]:
    """For every `nn.Linear` of the module that is better packed its packed counterpart; with `new`, weights by
    parameter, for the layers that get one, made of these. `besides`: not for layers that have such a counterpart
    installed. Changes nothing; `install` and `installed` do."""
    device = next(module.parameters()).device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    made: dict[nn.Module, Linear] = {}
    layer: Any
    for layer in module.modules():
        if not is_linear(layer) or (packing != "own" and layer.in_features % WIDTHS):
            continue
        if (besides and "forward" in layer.__dict__) or not (new is None or layer.weight in new or layer.bias in new):
            continue
        weight, bias = (own if new is None or own is None else new.get(own, own) for own in (layer.weight, layer.bias))
        assert weight is not None
        linear = Linear(weight, bias, packing, dtype)
        if linear.packed is not None:
            made[layer] = linear
    return made


def install(layers: Mapping[nn.Module, Linear]) -> None:
    """These layers compute with what `pack` has made, from now on: for modules that nobody trains."""
    for layer, linear in layers.items():
        layer.__dict__["forward"] = linear


@contextmanager
def installed(layers: Mapping[nn.Module, Linear]) -> Iterator[None]:
    """Meanwhile these layers compute with what `pack` has made; afterwards with what they did before."""
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        install(layers)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = forward


@contextmanager
def packed_weights(module: nn.Module, packing: str = "own") -> Iterator[None]:
    """Meanwhile the module's linear layers compute products of few rows with packed weights, which are made on entry,
    but for those that do so already. Its own are neither changed nor freed."""
    with installed(pack(module, packing, besides=True)):
        yield
