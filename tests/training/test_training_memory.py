"""The forecast of a run's memory against what torch's own profiler counts, and what is said where it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import tiny_recipe

from limbeck.models import autocast_to, hidden_and_head
from limbeck.training import build, memory
from tests.models.model_families import tiny

ACTIVATIONS = "activations, at most"


def counted(model: Any, autocast: torch.dtype | None, tokens: int) -> int:
    """Net bytes that a forward leaves allocated while its graph lives, by torch's profiler."""
    input_ids_1T = torch.zeros(1, tokens, dtype=torch.long)
    with torch.profiler.profile(profile_memory=True) as profile, autocast_to("cpu", autocast):
        kept = hidden_and_head(model, input_ids_1T)
    assert kept[0].requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.events() or ())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_tokens_activations_are_what_the_profiler_counts(family: str, autocast: torch.dtype | None) -> None:
    model = tiny(family, 40, seed=0).eval()
    expected = (counted(model, autocast, 24) - counted(model, autocast, 8)) / 16
    assert memory.activation_bytes(model, autocast) == pytest.approx(expected, rel=0.1)


def test_the_largest_micro_batch_counts(tmp_path: Path) -> None:
    built = {
        rows: build(tiny_recipe(tmp_path, "gkd", training={"per_device_train_batch_size": rows})) for rows in (2, 6)
    }
    sizes = {rows: memory.memory_forecast(parts) for rows, parts in built.items()}
    assert sizes[6][ACTIVATIONS] == 3 * sizes[2][ACTIVATIONS] > 0
    parts = built[2]
    weights = sum(weight.numel() for weight in parts.student.parameters()) * 4
    assert sizes[2]["student"] == sizes[2]["gradients"] == sizes[2]["optimiser (Adam)"] / 2 == weights
    saving = build(tiny_recipe(tmp_path, "gkd", training={"activation_checkpointing": True}))
    assert memory.memory_forecast(saving)[ACTIVATIONS] == 0


def test_the_longest_row_is_a_text_or_a_prompt_with_what_may_be_written(tmp_path: Path) -> None:
    parts = build(tiny_recipe(tmp_path, "kd", sampling={"max_tokens": 100}))
    texts = max(len(example.tokens) for example in parts.train)
    prompts = max(example.prompt_tokens for example in parts.train)
    assert parts.longest == texts < prompts + 100
    assert build(tiny_recipe(tmp_path, "gkd", sampling={"max_tokens": 100})).longest == prompts + 100
    assert build(tiny_recipe(tmp_path, "gkd", sampling={"max_tokens": 1})).longest == texts > prompts + 1


def test_what_does_not_fit_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = build(tiny_recipe(tmp_path))
    assert not any("memory" in note for note in parts.notes)
    sizes = memory.memory_forecast(parts)
    coming = sizes["sum"] - sizes["student"] - sizes["teacher"]
    for free, said in ((coming, False), (coming - 1, True)):
        monkeypatch.setattr(memory, "_free_bytes", lambda device, free=free: free)
        assert any(note.startswith("memory may not do") for note in build(tiny_recipe(tmp_path)).notes) == said
