"""A feature draft by `limbeck distill`: answers recorded, trained on, saved; and what does not go with it refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.data.embedded import TEACHER
from limbeck.decoding.drafts.feature_files import feature_net
from limbeck.errors import LimbeckError, RecipeError
from limbeck.models import load_model
from limbeck.pipeline import Run, distill
from limbeck.recipe import Recipe
from limbeck.training import build


def settings(output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "method": "draft",
        "teacher": "embedded",
        "student": "feature",
        "data": {"train": "embedded:train:48", "eval": "embedded:eval:12"},
        "sampling": {"max_tokens": 24},
        "training": {"learning_rate": 3e-3, "num_train_epochs": 4},
        "teacher_precision": "fp32",
        "output": str(output),
        **changes,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return distill(settings(tmp_path_factory.mktemp("feature") / "run"), quiet=True)


def test_it_accepts_more_of_answers_that_it_has_not_seen(run: Run) -> None:
    alpha, counts = run.metrics["alpha"], run.metrics
    assert alpha["after"] > alpha["before"] + 0.05, alpha
    assert counts["answers"] == 48 and counts["held_out"] == 12 and counts["positions"] > 500
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert max(line["alpha"] for line in lines) == pytest.approx(alpha["after"])
    assert lines[-1]["step"] == counts["steps"] and lines[-1]["loss"] < lines[0]["loss"]
    assert json.loads((run.folder / "evaluation.json").read_text()) == counts
    assert json.loads((run.folder / "environment.json").read_text())["seed"] == 0
    assert Recipe.load(run.folder / "recipe.yaml").student.path == "feature"


def test_what_was_saved_goes_on_from_where_it_ended(run: Run, tmp_path: Path) -> None:
    """The same answers, written again: what is measured before training is what was measured after."""
    saved = feature_net(load_model(TEACHER), run.student_path)
    assert not torch.equal(saved.fuse.weight, feature_net(load_model(TEACHER)).fuse.weight)
    more = distill(settings(tmp_path / "more", student=str(run.student_path)), quiet=True)
    assert more.metrics["alpha"]["before"] == pytest.approx(run.metrics["alpha"]["after"], abs=1e-5)
    with pytest.raises(RecipeError, match="expected a new folder; found a run in it"):
        distill(settings(run.folder), quiet=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"max_steps": 9}}, "training.max_steps: a feature draft is trained on recorded answers"),
        ({"training": {"num_train_epochs": 1.5}}, "training.num_train_epochs: expected 1, 2, ..."),
        ({"training": {"num_train_epochs": "x"}}, "training.num_train_epochs: expected 1, 2, ..."),
        ({"training": {"learning_rate": 0}}, "training.learning_rate: expected a number above 0"),
        ({"training": {"num_train_epoch": 1}}, "num_train_epochs"),
        ({"divergence": {"name": "jsd", "beta": 0.3}}, "divergence.beta: "),
        ({"cross_entropy_weight": 0.5}, "cross_entropy_weight: "),
        ({"student": {"path": "feature", "freeze": ["fuse"]}}, "student.freeze: "),
        ({"evaluation": {"metrics": ["rouge_l"]}}, "evaluation.metrics: "),
        ({"data": {"train": "embedded:train:9", "corpus": "x"}}, "data.corpus: "),
        ({"init": "sft"}, "init.method: "),
        ({"precision": "bf16"}, "precision: "),
        ({"teacher": None}, "method draft needs one"),
    ],
)
def test_keys_that_it_does_not_read_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LimbeckError, match=message):
        distill(settings(tmp_path / "run", **changes), quiet=True)
    assert not (tmp_path / "run" / "student").exists()


def test_the_usual_trainer_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--resume: a feature draft is not trained by the usual trainer"):
        distill(settings(tmp_path / "run"), resume=True)
    with pytest.raises(RecipeError, match="student feature: expected a language model, found a feature draft"):
        build(Recipe.parse(settings(tmp_path / "run", training={"max_steps": 1})))
