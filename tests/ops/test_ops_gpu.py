"""The same terms on a GPU, where torch compiles the elementwise part into a Triton kernel, as by float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.ops import DIVERGENCES, linear_terms, tiles
from limbeck.types import Head, Hidden

N, H = 40, 16
STATS = ("forward_kl", "reverse_kl", "agreement", "entropy")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("vocabulary", [tiles.COMPILE_FROM, 512])  # compiled, eager
@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_a_gpu_computes_what_float64_does(name: str, vocabulary: int, device: str = "cuda") -> None:
    hidden, weight, teacher_hidden, teacher_weight = (
        torch.randn(size, H, generator=torch.Generator().manual_seed(seed))
        for seed, size in enumerate((N, vocabulary, N, vocabulary))
    )
    tokens = torch.arange(N) * 7 % vocabulary

    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        student = [part.to(device, dtype).requires_grad_() for part in (hidden, weight)]
        teacher = Hidden(teacher_hidden.to(device, dtype), Head(teacher_weight.to(device, dtype)))
        terms = linear_terms(
            student[0], Head(student[1]), teacher, tokens.to(device), divergence=name, weights=(0.7, 0.3), stats=STATS
        )
        found = [terms.loss_N.detach(), *terms.stats.values(), *torch.autograd.grad(terms.loss_N.sum(), student)]
        return [tensor.double().cpu() for tensor in found]

    for found, expected in zip(run(device, torch.float32), run("cpu", torch.float64), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)
