"""Sizes, and the probe by which a machine chooses its precision."""

from __future__ import annotations

import time

import pytest
import torch
from model_families import tiny

import limbeck.models.probe as probe
from limbeck.models import cast, model_size, probe_autocast


def test_sizes_count_tied_weights_once() -> None:
    untied = tiny("llama", tie_word_embeddings=False)
    tied = tiny("llama", tie_word_embeddings=True)
    linears = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
    assert model_size(untied) == (linears + 2 * 96 * 32, 4 * (linears + 2 * 96 * 32))
    assert model_size(tied) == (linears + 96 * 32, 4 * (linears + 96 * 32))
    assert model_size(cast(tied, torch.bfloat16)) == (linears + 96 * 32, 2 * (linears + 96 * 32))


@pytest.mark.parametrize(("half_seconds", "chosen", "text"), [
    (0.5, torch.bfloat16, "bf16 autocast: 2.0x in a probe of 256 x 512 x 2048"),
    (0.9, None, "no bf16 autocast: 1.1x in a probe of 256 x 512 x 2048"),
])  # fmt: skip
def test_bf16_must_be_clearly_faster(
    half_seconds: float, chosen: torch.dtype | None, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_seconds", lambda _width, dtype: half_seconds if dtype else 1.0)
    probe_autocast.cache_clear()
    try:
        assert probe_autocast("cpu", 512) == (chosen, text)
        assert probe_autocast("cpu", 511) == (None, "no bf16 autocast: a width of 511 is too small to gain")
        assert probe_autocast("meta", 64)[0] is None
    finally:
        probe_autocast.cache_clear()


def test_the_probe_is_short_and_tried_once() -> None:
    start = time.perf_counter()
    dtype, text = probe_autocast("cpu", 512)
    assert time.perf_counter() - start < 5
    assert (dtype is None) == text.startswith("no bf16") and "256 x 512 x 2048" in text
    assert probe_autocast("cpu", 512)[1] is text
