"""Products with a weight by the faster of two libraries that torch ships: the one it takes by itself, and oneDNN.

On a CPU torch takes float32 products to MKL. On an AMD processor MKL leaves half of the machine unused, while oneDNN
computes the same sums in half the time (both were measured, docs/benchmarks.md). A probe of this machine, tried once a
process, decides; where oneDNN does not win nothing changes. For products of few rows, those of a model that writes,
either library spends most of its time on rearranging the weight: `Packed` keeps it arranged.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

_LEAST = 1 << 22
"""Multiplications from which on a product saves more than the way to oneDNN costs (some microseconds of Python)."""

_LEAST_OUTER = 1 << 16
"""Entries of a weight from which on its gradient is faster by oneDNN: it rearranges both factors first."""

BLOCK = 2048
"""Rows of a weight that oneDNN is given at once where the result goes into other memory."""

HEAD_BLOCK = 16_384
"""Rows of a weight up to which a gradient is taken at once: that by the input, and that by the weight itself by torch's
own product where it is summed in another dtype than the product's."""

_ROWS = 8
"""Rows that oneDNN is told to expect when it arranges a weight, those of a verifying pass. The order it chooses for 1
takes as long for one row (float32, AVX2) and up to twice as long for 2 to 8."""

_GAIN = 1.2  # oneDNN must be this much faster to be taken


def linear(hidden: Tensor, weight_VH: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """`F.linear`: hidden (..., H) @ weight.T + bias (..., V), differentiable, in less time where oneDNN is faster."""
    if not _by_onednn(hidden, weight_VH):
        return F.linear(hidden, weight_VH, bias_V)
    needed = (hidden.requires_grad, weight_VH.requires_grad, bias_V is not None and bias_V.requires_grad)
    if torch.is_grad_enabled() and any(needed):
        return cast(Any, _Linear).apply(hidden, weight_VH, bias_V)
    return _onednn(hidden, weight_VH, bias_V)


def linear_into(out_NV: Tensor, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
    """`out_NV`, filled with hidden @ weight.T; no gradients. oneDNN writes into new memory alone: by blocks, which stay
    in the processor's cache until they are copied."""
    if not _by_onednn(hidden_NH, weight_VH):
        return torch.mm(hidden_NH, weight_VH.T, out=out_NV)
    for rows in _blocks(len(weight_VH)):
        out_NV[:, rows] = _onednn(hidden_NH, weight_VH[rows])
    return out_NV


def back(grad_NV: Tensor, weight_VH: Tensor) -> Tensor:
    """grad @ weight (N, H): what a product's gradient is by its input. No gradient of its own."""
    if not _by_onednn(grad_NV, weight_VH.T):
        return grad_NV @ weight_VH
    if len(weight_VH) <= HEAD_BLOCK:
        return _onednn(grad_NV, weight_VH.T)
    total_NH = grad_NV.new_zeros(len(grad_NV), weight_VH.shape[1])
    for rows in _blocks(len(weight_VH)):  # oneDNN rearranges a weight first: a block of it stays in the cache
        total_NH += _onednn(grad_NV[:, rows], weight_VH[rows].T)
    return total_NH


def outer(grad_NV: Tensor, hidden_NH: Tensor) -> Tensor:
    """grad.T @ hidden (V, H): what a product's gradient is by its weight. No gradient of its own."""
    if grad_NV.shape[1] * hidden_NH.shape[1] >= _LEAST_OUTER and _by_onednn(grad_NV, hidden_NH.T):
        return _onednn(grad_NV.T.contiguous(), hidden_NH.T.contiguous())
    return grad_NV.T @ hidden_NH


def outer_into(total_VH: Tensor, grad_NV: Tensor, hidden_NH: Tensor, *, add: bool) -> None:
    """`outer`, put into `total_VH` or added to it, whatever its dtype. What stood there is not read unless added to."""
    own = not _by_onednn(grad_NV, hidden_NH.T)
    if own and total_VH.dtype == grad_NV.dtype:
        total_VH.addmm_(grad_NV.T, hidden_NH, beta=1 if add else 0)
        return
    hidden_HN = hidden_NH.T if own else hidden_NH.T.contiguous()
    for rows in _blocks(len(total_VH), HEAD_BLOCK if own else BLOCK):
        grad_BN = grad_NV[:, rows].T
        part_BH = grad_BN @ hidden_NH if own else _onednn(grad_BN.contiguous(), hidden_HN)
        if add:
            total_VH[rows] += part_BH
        else:
            total_VH[rows] = part_BH


def _blocks(size: int, block: int = BLOCK) -> Iterator[slice]:
    return (slice(start, min(start + block, size)) for start in range(0, size, block))


class Packed:
    """hidden (..., H) @ weight.T + bias, in the weight's dtype, without gradients, from a copy of the weight in
    oneDNN's own order. Takes any number of rows; what it saves is the greater the fewer they are."""

    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None = None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_VH.detach(), _ROWS)
        self.bias_V = None if bias_V is None else bias_V.detach()
        self.dtype = weight_VH.dtype

    def __call__(self, hidden: Tensor) -> Tensor:
        return _onednn(hidden.to(self.dtype), self.packed, self.bias_V)


def packable() -> tuple[torch.dtype, ...]:
    """The dtypes that `Packed` takes on this machine: bf16 needs instructions that processors of AVX2 alone lack."""
    if not _has_onednn():
        return ()
    return (torch.float32, torch.bfloat16) if _has_bf16() else (torch.float32,)


@functools.cache
def packing_pays(dtype: torch.dtype) -> bool:
    """Whether `Packed` beats `F.linear` on this machine for a few rows in a dtype of `packable`."""
    if dtype not in packable():
        return False
    weight_VH, hidden_NH = _probe(4096, 2048, _ROWS, dtype)
    packed = Packed(weight_VH)
    return _wins(lambda: packed(hidden_NH), lambda: F.linear(hidden_NH, weight_VH), 40)


@functools.cache
def onednn_wins() -> bool:
    """Whether oneDNN beats torch's own choice on this machine for float32 products of many rows."""
    if not _has_onednn():
        return False
    weight_VH, hidden_NH = _probe(1024, 1024, 256, torch.float32)
    return _wins(lambda: _onednn(hidden_NH, weight_VH, None), lambda: F.linear(hidden_NH, weight_VH), 15)


class _Linear(torch.autograd.Function):
    """`linear` by oneDNN, with both its gradients. A second derivative goes by torch's own products."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight_VH)
        return _onednn(hidden, weight_VH, bias_V)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight_VH = ctx.saved_tensors
        grad_NV = grad_outputs[0].reshape(-1, weight_VH.shape[0])
        hidden_NH = hidden.reshape(-1, weight_VH.shape[1])
        again = torch.is_grad_enabled()
        hidden_grad = weight_grad_VH = None
        if ctx.needs_input_grad[0]:
            product_NH = grad_NV @ weight_VH if again else back(grad_NV, weight_VH)
            hidden_grad = product_NH.view(hidden.shape)
        if ctx.needs_input_grad[1]:
            weight_grad_VH = grad_NV.T @ hidden_NH if again else outer(grad_NV, hidden_NH)
        return hidden_grad, weight_grad_VH, grad_NV.sum(0) if ctx.needs_input_grad[2] else None


def _onednn(hidden: Tensor, weight_VH: Tensor, bias_V: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(hidden, weight_VH, bias_V, "none", [], "")


def _by_onednn(hidden: Tensor, weight_VH: Tensor) -> bool:
    """Sharded weights and other kinds of tensors keep torch's own way, as does autocast."""
    return (
        hidden.dtype is torch.float32
        and weight_VH.dtype is torch.float32
        and hidden.numel() * weight_VH.shape[0] >= _LEAST
        and type(hidden) in _PLAIN
        and type(weight_VH) in _PLAIN
        and hidden.device.type == weight_VH.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and onednn_wins()
    )


_PLAIN = (Tensor, Parameter)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _has_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _probe(outputs: int, inputs: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weight (V, H), hidden (N, H)) of a probe, the same each time."""
    generator = torch.Generator().manual_seed(0)
    weight_VH, hidden_NH = (torch.randn(size, inputs, generator=generator).to(dtype) for size in (outputs, rows))
    return weight_VH, hidden_NH


def _wins(new: Callable[[], Tensor], own: Callable[[], Tensor], most: int) -> bool:
    """Whether `new` gives the same as `own` in less time, by the fastest of some tries of each in turn: of five, and
    where those do not say so of up to `most`, for other processes may have had the machine meanwhile."""
    with torch.no_grad():
        expected, found = own(), new()  # and warm
        tolerance = 1e-4 if expected.dtype == torch.float32 else 2e-2
        if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
            return False
        fastest = [float("inf"), float("inf")]
        for tries in range(1, most + 1):
            for way, product in enumerate((own, new)):
                start = time.perf_counter()
                product()
                fastest[way] = min(fastest[way], time.perf_counter() - start)
            if tries >= 5 and fastest[0] >= _GAIN * fastest[1]:
                return True
    return False
