"""The methods that sample, on every tiny family, each with the next one as its teacher: no family is a special case."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import CORPUS, METHODS, assert_both_log_probabilities, tiny_recipe

from limbeck.data.embedded import TEACHER
from limbeck.models import load_tokenizer
from limbeck.pipeline import distill
from limbeck.training import build
from limbeck.training.build import build_source
from limbeck.training.trainer import Trainer
from limbeck.types import Hidden
from tests.models.model_families import FAMILIES, tiny

ROWS = [{"prompt": f"Ann has {number} pears.", "completion": f"answer: {number}"} for number in range(12)]
PAIRS = list(zip(FAMILIES, [*list(FAMILIES)[1:], next(iter(FAMILIES))], strict=True))


def in_memory(student: str, teacher: str) -> dict[str, Any]:
    tokenizer = load_tokenizer(TEACHER)
    models = [tiny(family, len(tokenizer), seed=seed) for seed, family in enumerate((student, teacher))]
    return {"student": (models[0], tokenizer), "teacher": (models[1], tokenizer)}


def recipe(output: Path, method: str) -> Any:
    changes = {**METHODS[method], "data": {"corpus": CORPUS, "corpus_tokens": 16} if method == "minillm" else {}}
    training = {"max_steps": 2, "save_strategy": "no", "gradient_accumulation_steps": 2}
    return tiny_recipe(output, changes.pop("method", method), **changes, training=training)


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_a_pair_of_families_writes_together_what_each_would_say_of_it(
    student: str, teacher: str, tmp_path: Path
) -> None:
    """The log-probabilities that the lockstep's caches gave are those of whole forward passes."""
    made = recipe(tmp_path, "minillm")
    parts = build(made, **in_memory(student, teacher), rows=ROWS)
    for rollout in build_source(made, parts)(parts.train[:3], 0):
        assert_both_log_probabilities(parts, rollout)


@pytest.mark.parametrize("method", ["minillm", "gkd-reward"])
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_a_pair_of_families_is_trained(student: str, teacher: str, method: str, tmp_path: Path) -> None:
    given = in_memory(student, teacher)
    before = {name: value.clone() for name, value in given["student"][0].state_dict().items()}
    distill(recipe(tmp_path, method), **given, dataset=ROWS, quiet=True, report=False)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)
    assert all(math.isfinite(step["policy_gradient"]) for step in steps)
    moved = [name for name, value in given["student"][0].state_dict().items() if not torch.equal(value, before[name])]
    assert moved and len(moved) >= len(before) // 2


def test_what_inner_epochs_keep_does_not_grow_with_the_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers kept a token of text, all of them: the teacher's hidden state, its head as it is, and the columns."""
    from limbeck.training import run

    trainers: list[Trainer] = []

    def watched(**kwargs: Any) -> Trainer:
        trainers.append(Trainer(**kwargs))
        return trainers[-1]

    monkeypatch.setattr(run, "Trainer", watched)
    tokenizer, kept = load_tokenizer(TEACHER), list[float]()
    for factor in (1, 8):
        student, teacher = (tiny("llama", factor * len(tokenizer), seed=seed) for seed in (0, 1))
        made = recipe(tmp_path / str(factor), "minillm")
        given: dict[str, Any] = {"student": (student, tokenizer), "teacher": (teacher, tokenizer), "dataset": ROWS}
        distill(made, **given, quiet=True, report=False)
        trainer = trainers[-1]
        signals = [signal for signal in trainer._signals.values() if isinstance(signal, Hidden)]
        texts = [rollout for rollout in trainer.rollouts if rollout.columns]
        assert len(signals) == 2 and len(texts) == 8
        assert all(s.head.weight_VH.data_ptr() == teacher.lm_head.weight.data_ptr() for s in signals)
        numbers = sum(s.hidden_NH.numel() for s in signals) + sum(len(c) for t in texts for c in t.columns.values())
        kept.append(numbers / sum(rollout.completion for rollout in texts))
    assert kept[0] == kept[1] < len(tokenizer)
