"""Guards against slowness, by pytest-benchmark: in ratios to the matrix products alone, in the same minute, on this
machine, and with a control: the plain way is measured too, and must be slower by far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.common import Contender, llama, measured, random_prompts
from benchmarks.divergence import contender, floor, made_inputs, ours, plain
from benchmarks.rollouts import EOS, theirs, with_eos
from benchmarks.rollouts import ours as written
from limbeck.decoding import Sampling
from limbeck.decoding.packed import Linear
from limbeck.ops import tiles

ROUNDS = 3

pytestmark = [pytest.mark.slow, pytest.mark.benchmark(disable_gc=True)]


def fastest(contender: Contender, rounds: int = ROUNDS) -> float:
    """Seconds."""
    return min(measured(contender)[1] for _ in range(rounds + 1))


def share_left(benchmark: Any, mine: Contender, plainly: Contender, least: Contender) -> float:
    """What limbeck takes above the products, as a share of what the plain way does: 1 is as slow as that. The products
    are taken before and after."""
    before = fastest(least)
    benchmark.pedantic(mine.run, setup=lambda: ((mine.prepare(),), {}), rounds=ROUNDS, warmup_rounds=1)
    other = fastest(plainly, 1)
    seconds = min(before, fastest(least))
    found = {"limbeck": benchmark.stats.stats.min / seconds, "the plain way": other / seconds}
    benchmark.extra_info["over_floor"] = found
    print("over the products alone:", ", ".join(f"{who} {ratio:.2f}" for who, ratio in found.items()))
    return (found["limbeck"] - 1) / (found["the plain way"] - 1)


@pytest.mark.parametrize(("vocabulary", "bound"), [(8192, 0.6), (32_768, 0.35)], ids=["eager", "compiled"])
def test_a_divergence_costs_little_more_than_its_products(benchmark: Any, vocabulary: int, bound: float) -> None:
    assert 8192 < tiles.COMPILE_FROM <= 32_768
    inputs = made_inputs(512, 512, vocabulary, torch.float32)
    mine = contender("limbeck", "ours", ours, inputs)
    mean: Callable[..., torch.Tensor] = lambda *values: plain(*values) / 512  # noqa: E731
    assert share_left(benchmark, mine, contender("plain", "peer", mean, inputs), floor(inputs)) < bound


def test_writing_costs_little_more_than_its_products(benchmark: Any) -> None:
    """Completions of 8 to 96 tokens, in batches of 16: what a batch waits for its longest is the plain way's cost."""
    model = with_eos(llama(width=128, layers=2, heads=4, inner=384, vocabulary=16_384, dtype=torch.float32))
    prompts = random_prompts(48, 16, 16_384)
    sampling = Sampling(96, stop_tokens=(EOS,), min_tokens=8)
    tokens = sum(map(len, written(model, prompts, sampling, 16)))
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    ready = [(Linear(layer.weight, None, "own"), torch.randn(16, layer.in_features)) for layer in layers]

    @torch.inference_mode()
    def products(_state: None) -> None:
        for _ in range(tokens // 16):
            for product, input_NI in ready:
                product(input_NI)

    mine = Contender("limbeck", "ours", lambda _: written(model, prompts, sampling, 16))
    other = Contender("transformers", "peer", lambda _: theirs(model, prompts, sampling, 16))
    assert share_left(benchmark, mine, other, Contender("products", "floor", products)) < 0.5
