"""Weights kept ready for products of few rows: a step of a model that writes or drafts costs what reading them costs.

`own` keeps a weight's numbers, in oneDNN's own order where that is faster on this machine (`ops.products.Packed`).
`int8` has a scale an output row (`aten::_weight_int8pack_mm`). It takes bf16 activations, and pays for few rows alone:
products with more rows keep the model's own weights. Microseconds of a product with one row, two threads of an AMD EPYC
with AVX-512 bf16: of (4864, 896), which the processor's cache holds, bf16 378, int8 146; of (151936, 896) 15 771 and
9 272.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from limbeck.errors import ModelError
from limbeck.models.linear import is_linear
from limbeck.ops import products

FEW_ROWS = {"own": 256, "int8": 4}
"""Rows of a product up to which each way of keeping weights is used. On the processor above int8 is faster than bf16 up
to 4 rows and slower from 6 on; with more rows than 256 oneDNN's order saves little."""

LEAST = 1 << 16
"""Entries of a weight from which on it is worth keeping in oneDNN's order."""

WIDTHS = 16
"""Torch's int8 product wants the width of a weight to be a multiple of this: else it reads beyond its end, without a
word. Weights of other widths are kept as they are."""

_int8_product: Any = torch.ops.aten._weight_int8pack_mm


class Int8:
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
) -> Int8 | products.Packed | None:
    """The product with a weight that is kept as `packing` says; None where `own` does not pay."""
    if packing == "int8":
        return Int8(weight_VH, bias_V)
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


def pack(
    module: nn.Module, packing: str, new: Mapping[Any, Tensor] | None = None, *, besides: bool = False
) -> dict[str, Linear]:
    """For every `nn.Linear` of the module that is better packed its packed counterpart, by name; with `new`, weights by
    parameter, for the layers that get one, made of these. `besides`: not for layers that have such a counterpart
    installed. Changes nothing; `install` does."""
    device = next(module.parameters()).device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    made: dict[str, Linear] = {}
    layer: Any
    for name, layer in module.named_modules():
        if not is_linear(layer) or (packing == "int8" and layer.in_features % WIDTHS):
            continue
        if (besides and "forward" in layer.__dict__) or not (new is None or layer.weight in new or layer.bias in new):
            continue
        weight, bias = (own if new is None or own is None else new.get(own, own) for own in (layer.weight, layer.bias))
        assert weight is not None
        linear = Linear(weight, bias, packing, dtype)
        if linear.packed is not None:
            made[name] = linear
    return made


def install(module: nn.Module, layers: Mapping[str, Linear]) -> None:
    """These layers of the module compute with what `pack` has made."""
    for name, linear in layers.items():
        module.get_submodule(name).forward = linear


@contextmanager
def packed_weights(module: nn.Module, packing: str = "own") -> Iterator[None]:
    """Meanwhile the module's linear layers compute products of few rows with packed weights, which are made on entry,
    but for those that do so already. Its own are neither changed nor freed."""
    layers = pack(module, packing, besides=True)
    try:
        install(module, layers)
        yield
    finally:
        for name in layers:
            module.get_submodule(name).__dict__.pop("forward", None)
