"""Products with a weight: limbeck.ops.products beside torch's own `F.linear`, which peers use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import DTYPES, Contender, Result, Row, in_turn
from limbeck.ops import products

SHAPES = [(1024, 896, 32_000), (512, 896, 4864), (64, 896, 4864), (16, 896, 4864), (1, 896, 4864)]
FEW = 64
"""Rows up to which limbeck keeps a weight in oneDNN's order: a model that writes."""

SPREAD = 256 << 20
"""Bytes of the copies of a weight that take turns, so that none is in the processor's cache, as none of a model is."""


def cases(quick: bool) -> list[str]:
    return ["2 x 16 -> 24"] if quick else [f"{rows} x {inputs} -> {outputs}" for rows, inputs, outputs in SHAPES]


def run(case: str, quick: bool) -> Iterator[Result]:
    rows, inputs, outputs = (int(part) for part in case.replace("->", "x").split("x"))
    for dtype in DTYPES:
        copies = 1 if quick else max(1, SPREAD // (inputs * outputs * DTYPES[dtype].itemsize))
        weights = [torch.randn(outputs, inputs).to(DTYPES[dtype]) for _ in range(copies)]
        hidden_NH = torch.randn(rows, inputs).to(DTYPES[dtype])
        packed = rows <= FEW and products.packing_pays(DTYPES[dtype])
        ways: dict[str, list[Any]] = {
            "limbeck": [products.Packed(weight) if packed else ours(weight) for weight in weights],
            "torch": [own(weight) for weight in weights],
        }
        sides: dict[str, Any] = {"limbeck": "ours", "torch": "peer"}
        contenders = [Contender(who, sides[who], swept(ways[who], hidden_NH)) for who in ways]
        timings = in_turn(contenders, 1 if quick else 5)
        error = (timings["limbeck"].output - timings["torch"].output).abs().max() / timings["torch"].output.abs().max()
        for who, timing in timings.items():
            milliseconds = 1e3 * timing.seconds / copies
            numbers = {"ms": milliseconds, "gflop_per_s": 2e-6 * rows * inputs * outputs / milliseconds}
            kept = "weight kept in oneDNN's order" if packed and who == "limbeck" else ""
            yield Result(
                "products", case, dtype, who, sides[who], numbers | ({"error": float(error)} if kept else {}), kept
            )


def ours(weight_VH: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda hidden_NH: products.linear(hidden_NH, weight_VH)


def own(weight_VH: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda hidden_NH: F.linear(hidden_NH, weight_VH)


def swept(ways: list[Callable[[Tensor], Tensor]], hidden_NH: Tensor) -> Callable[[Any], Tensor]:
    """One product with each copy; the last one's result."""

    @torch.no_grad()
    def run(_: Any) -> Tensor:
        for way in ways:
            found = way(hidden_NH)
        return found.float()

    return run


ROWS = [
    Row(
        "products",
        "hidden (N, H) @ weight.T (H, V) of a weight that is in no cache, N x H -> V",
        "ms",
        cases,
        run,
    )
]
