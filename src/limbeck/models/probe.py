"""What a machine is good at, found by trying, as machines differ and their names say too little; and which model one
has before one, and how large it is."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Mapping

import torch
from torch import nn

from limbeck.ops.products import linear

_TOKENS = 256
_NARROW = 512  # below this width the casts of autocast cost more than its products save
_GAIN = 1.3  # bf16 must be this much faster to be worth its rounding
_ENOUGH = 1.0  # s that one dtype is tried for, about


def autocast_to(device: torch.device | str, dtype: torch.dtype | None) -> torch.autocast:
    """Meanwhile products are taken in this dtype; None: in that of their weights."""
    return torch.autocast(torch.device(device).type, dtype or torch.bfloat16, enabled=dtype is not None)


@functools.cache
def probe_autocast(device: torch.device | str, hidden_size: int = 1024) -> tuple[torch.dtype | None, str]:
    """(bf16 where it pays, else None; a line to log, such as `bf16 autocast: 2.1x in a probe of 256 x 896 x 3584`).

    On a CPU it pays where a forward and backward of 256 tokens through a layer from `hidden_size` to four times as many
    is at least 1.3 times as fast as in float32; on CUDA where it is supported. Tried once a process, device and width.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        supported = torch.cuda.is_bf16_supported()
        return torch.bfloat16 if supported else None, f"{'bf16' if supported else 'no bf16'} autocast: on CUDA"
    if kind != "cpu":
        return None, f"no bf16 autocast: not tried on {kind}"
    if hidden_size < _NARROW:
        return None, f"no bf16 autocast: a width of {hidden_size} is too small to gain"
    speedup = _seconds(hidden_size, None) / _seconds(hidden_size, torch.bfloat16)
    pays = speedup >= _GAIN
    shape = f"{_TOKENS} x {hidden_size} x {4 * hidden_size}"
    return (
        torch.bfloat16 if pays else None,
        f"{'bf16' if pays else 'no bf16'} autocast: {speedup:.1f}x in a probe of {shape}",
    )


def _seconds(hidden_size: int, dtype: torch.dtype | None, repeats: int = 5) -> float:
    """The fastest of some forward and backward passes through one linear layer; fewer where they take longer than
    `_ENOUGH`, as those in bf16 do on a processor that has no instructions for it."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(4 * hidden_size, hidden_size, generator=generator))
    hidden_NH = torch.randn(_TOKENS, hidden_size, generator=generator, requires_grad=True)
    fastest, begin = float("inf"), time.perf_counter()
    for _ in range(repeats + 1):  # the first one warms up and is slower: the minimum leaves it out
        start = time.perf_counter()
        with autocast_to("cpu", dtype):
            out_NF = linear(hidden_NH, weight)
        out_NF.backward(torch.ones_like(out_NF))
        fastest = min(fastest, time.perf_counter() - start)
        weight.grad = hidden_NH.grad = None
        if time.perf_counter() - begin > _ENOUGH:
            break
    return fastest


def model_size(model: nn.Module) -> tuple[int, int]:
    """(parameters, bytes) of a model's parameters; tied weights count once."""
    parameters = list(model.parameters())  # yields a shared parameter once
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """Which model this is: a digest of its weights' names and shapes, and of some numbers of each."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        some = tensor.detach().flatten()[:64].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + some)
    return digest.hexdigest()
