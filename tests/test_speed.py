"""Guards against slowness, by pytest-benchmark: ratios to the matrix products alone, in the same minute, on this
machine. Each bound is between what limbeck takes and what the plain way takes, which is measured too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import Contender, llama, measured, random_prompts
from benchmarks.divergence import contender, floor, made_inputs, ours, plain
from benchmarks.rollouts import EOS, theirs, with_eos
from benchmarks.rollouts import ours as written
from limbeck.decoding import Sampling
from limbeck.ops import tiles

ROUNDS = 3

pytestmark = [pytest.mark.slow, pytest.mark.benchmark(disable_gc=True)]


def fastest(contender: Contender, rounds: int = ROUNDS) -> float:
    """Seconds."""
    return min(measured(contender)[1] for _ in range(rounds + 1))


def over_floor(benchmark: Any, mine: Contender, plainly: Contender, least: Contender) -> tuple[float, float]:
    """(limbeck's, the plain way's) fastest time over that of the products alone, which are taken before and after."""
    before = fastest(least)
    benchmark.pedantic(mine.run, setup=lambda: ((mine.prepare(),), {}), rounds=ROUNDS, warmup_rounds=1)
    other = fastest(plainly, 1)
    seconds = min(before, fastest(least))
    found = benchmark.stats.stats.min / seconds, other / seconds
    benchmark.extra_info["limbeck_over_floor"], benchmark.extra_info["plain_over_floor"] = found
    print(f"over the products alone: limbeck {found[0]:.2f}, the plain way {found[1]:.2f}")
    return found


@pytest.mark.parametrize(("vocabulary", "bound"), [(8192, 2.2), (32_768, 1.7)], ids=["eager", "compiled"])
def test_a_divergence_costs_little_more_than_its_products(benchmark: Any, vocabulary: int, bound: float) -> None:
    assert 8192 < tiles.COMPILE_FROM <= 32_768
    inputs = made_inputs(512, 512, vocabulary, torch.float32)
    mine = contender("limbeck", "ours", ours, inputs)
    mean: Callable[..., torch.Tensor] = lambda *values: plain(*values) / 512  # noqa: E731
    found, other = over_floor(benchmark, mine, contender("plain", "peer", mean, inputs), floor(inputs))
    assert found < bound < other


def test_writing_costs_little_more_than_its_products(benchmark: Any) -> None:
    """Completions of 8 to 96 tokens, in batches of 16: what a batch waits for its longest is the plain way's cost."""
    model = with_eos(llama(width=128, layers=2, heads=4, inner=384, vocabulary=16_384, dtype=torch.float32))
    prompts = random_prompts(48, 16, 16_384)
    sampling = Sampling(96, stop_tokens=(EOS,), min_tokens=8)
    tokens = sum(map(len, written(model, prompts, sampling, 16)))
    inputs = [(layer, torch.randn(16, layer.in_features)) for layer in model.modules() if isinstance(layer, nn.Linear)]

    @torch.inference_mode()
    def products(_state: None) -> None:
        for _ in range(tokens // 16):
            for layer, input_NI in inputs:
                F.linear(input_NI, layer.weight)

    mine = Contender("limbeck", "ours", lambda _: written(model, prompts, sampling, 16))
    other = Contender("transformers", "peer", lambda _: theirs(model, prompts, sampling, 16))
    found, plainly = over_floor(benchmark, mine, other, Contender("products", "floor", products))
    assert found < 6 < plainly
