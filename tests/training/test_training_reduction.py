"""The loss and its gradients do not change when the same sequences are cut into other micro-batches, padded otherwise,
reordered, or spread over ranks: one owner divides by the count of learnt tokens of the whole optimiser step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import METHODS, gradients
from warm import two_ranks

from limbeck.types import Rollout


@pytest.mark.parametrize("method", METHODS)
def test_gradient_accumulation_changes_nothing(tmp_path: Path, method: str) -> None:
    whole, loss = gradients(tmp_path / "a", method, batch=8, accumulation=1)
    least = METHODS[method].get("samples", 1)  # a prompt's samples stay together
    for batch, accumulation in ((4, 2), (least, 8 // least)):
        split, split_loss = gradients(tmp_path / f"b{batch}", method, batch=batch, accumulation=accumulation)
        assert split_loss == pytest.approx(loss, rel=1e-6)
        assert_same(split, whole)


@pytest.mark.parametrize("method", METHODS)
def test_order_changes_nothing(tmp_path: Path, method: str) -> None:
    whole, loss = gradients(tmp_path / "a", method, batch=4, accumulation=2)
    turned, turned_loss = gradients(tmp_path / "b", method, batch=4, accumulation=2, reverse=True)
    assert turned_loss == pytest.approx(loss, rel=1e-6)
    assert_same(turned, whole)


@pytest.mark.parametrize("method", METHODS)
def test_padding_changes_nothing(tmp_path: Path, method: str) -> None:
    whole, loss = gradients(tmp_path / "a", method, batch=8, accumulation=1)
    padded, padded_loss = gradients(tmp_path / "b", method, batch=8, accumulation=1, extra_padding=7)
    assert padded_loss == pytest.approx(loss, rel=1e-6)
    assert_same(padded, whole)


def test_the_loss_is_the_mean_over_tokens_not_over_sequences(recipe: Any, tmp_path: Path) -> None:
    """Against transformers' own cross-entropy, whose `labels` loss is the mean over the tokens of one batch."""
    from limbeck.training import build

    _, loss = gradients(tmp_path / "a", "sft", batch=2, accumulation=4)
    parts = build(recipe("sft"))
    model = parts.student.double()
    total, count = 0.0, 0
    for example in parts.train[:8]:
        ids = torch.tensor([example.tokens])
        labels = torch.tensor([[t if m else -100 for t, m in zip(example.tokens, example.mask, strict=True)]])
        total += model(input_ids=ids, labels=labels).loss.item() * example_count(example)
        count += example_count(example)
    assert loss == pytest.approx(total / count, rel=1e-6)


def test_two_ranks_change_nothing(tmp_path: Path) -> None:
    """DDP over gloo against one process: methods that write or do not, a second term, samples, whitening."""
    two_ranks(Path(__file__).with_name("run_two_ranks.py"), tmp_path, output=tmp_path / "printed")
    for method in ("kd", "gkd", "minillm", "minillm-reference", "gkd-reward"):
        whole, loss = gradients(tmp_path / f"one-{method}", method, batch=8, accumulation=1)
        found = torch.load(tmp_path / f"{method}.pt", weights_only=True)
        assert json.loads((tmp_path / f"{method}.json").read_text()) == pytest.approx(loss, rel=1e-6)
        assert_same(found, whole)


def test_the_count_is_of_learnt_tokens_alone() -> None:
    rollout = Rollout([5, 6, 7, 8], [True, False, True, True], 2, "dataset")
    assert rollout.learnt == 2
    assert replace(rollout, mask=[False] * 4).learnt == 0


def example_count(example: Any) -> int:
    return sum(example.mask[1:])


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-12)
        assert error <= 1e-6, (
            f"{name}: relative error {error:.1e}"
        )  # RMSNorm computes in float32 inside a float64 model
