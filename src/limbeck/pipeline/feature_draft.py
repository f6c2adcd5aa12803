"""`method: draft` for a feature draft. It is no language model that the trainer could take for a student, and it learns
from the target's hidden states: so the target answers the prompts under the engine and the buffer of `limbeck serve`,
and the draft is trained on these answers as the server's updater trains it on live ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from limbeck import ranks
from limbeck.decoding import FeatureDraft, Sampling
from limbeck.decoding.drafts.feature_files import FEATURE, feature_net, is_feature, save_feature
from limbeck.errors import RecipeError, TrainingError
from limbeck.models import eos_tokens
from limbeck.online import FeatureLearner, Training
from limbeck.online.learner import fit, optimiser_of
from limbeck.online.recording import record_answers
from limbeck.recipe import Recipe
from limbeck.training.build import load_data, load_teacher, training_arguments

_READ = (
    *("method", "teacher", "student.path", "sampling", "divergence.name", "seed", "output", "trust_remote_code"),
    *("training.learning_rate", "training.num_train_epochs", "evaluation.rows"),
    *(f"data.{name}" for name in ("train", "eval", "columns", "template", "prompt_tokens", "max_length", "rows")),
)
_LEARNING_RATE, _EPOCHS = 3e-3, 20
_BATCH = 16  # answers written at once


def on_features(recipe: Recipe) -> bool:
    """Whether the draft is a feature draft: `student: feature`, or the folder of one."""
    path = recipe.student.path
    return recipe.method == "draft" and path is not None and is_feature(path)


def check(recipe: Recipe) -> None:
    """RecipeError for a key that is set and not read here, and for training keys that are not such numbers."""
    ranks.one_process("a feature draft")
    usual = dict(_flat(Recipe.parse({"method": "draft", "student": FEATURE}).settings()))
    for key, value in _flat(recipe.settings()):
        if value != usual.get(key) and not key.startswith(_READ):
            raise RecipeError(
                f"{key}: a feature draft is trained on recorded answers, not by the usual trainer; expected no such "
                f"key, found {value!r}: leave it out (training takes learning_rate and num_train_epochs alone)"
            )
    epochs, rate = (recipe.training.get(key, 1) for key in ("num_train_epochs", "learning_rate"))
    if not isinstance(epochs, int | float) or epochs < 1 or epochs != int(epochs):
        raise RecipeError(f"training.num_train_epochs: expected 1, 2, ... for a feature draft, found {epochs!r}")
    if not isinstance(rate, int | float) or not rate > 0:
        raise RecipeError(f"training.learning_rate: expected a number above 0, found {rate!r}")


def train_on_features(
    recipe: Recipe, folder: Path, *, teacher: Any = None, rows: Any = None, quiet: bool = False
) -> dict[str, Any]:
    """Trains the draft of a recipe that has passed `check`, on the CPU, until it accepts no more of the held-out
    prompts' answers; writes `folder/student` (see `save_feature`) and `folder/metrics.jsonl`, a line a measure. Returns
    what was measured, acceptance before and after first. All answers are in memory, with two bytes for each number of
    the hidden states that are read. TrainingError for a NaN."""
    start = perf_counter()
    training = Training(
        recipe.settings()["divergence"]["name"],
        learning_rate=recipe.training.get("learning_rate", _LEARNING_RATE),
        epochs=int(recipe.training.get("num_train_epochs", _EPOCHS)),
    )
    notes: list[str] = []
    target, tokenizer = load_teacher(recipe, training_arguments(recipe), teacher, notes)
    train, held_out, summary = load_data(recipe, tokenizer, target, rows)
    sampling = Sampling(seed=recipe.seed, stop_tokens=eos_tokens(target, tokenizer), **recipe.sampling.model_dump())
    path = str(recipe.student.path)
    learner = FeatureLearner(feature_net(target, path, seed=recipe.seed), target)
    prompts = [example.prompt for example in (*train, *held_out)]
    reader = FeatureDraft(feature_net(target, path), target)
    answers = record_answers(target, tokenizer, prompts, sampling, batch=_BATCH, reader=reader)
    lessons = [trace for trace in answers if int(trace.id) < len(train)]
    stop = [trace for trace in answers if int(trace.id) >= len(train)]
    recorded_s = perf_counter() - start
    if not quiet:
        size = sum(trace.bytes for trace in answers) / 2**20
        for line in (f"data  {summary}", *notes, f"{len(answers)} answers in {recorded_s:.0f} s, {size:.0f} MiB"):
            print(line, file=sys.stderr)
    with (folder / "metrics.jsonl").open("w") as file:
        fitted = fit(
            learner,
            optimiser_of(learner, training),
            lessons,
            stop,
            training,
            torch.Generator().manual_seed(recipe.seed),
            measured=lambda step, loss, alpha: print(
                json.dumps({"step": step, "loss": loss, "alpha": alpha}), file=file, flush=True
            ),
        )
    if not fitted.finite:
        raise TrainingError(f"step {fitted.steps + 1}: expected a finite loss, found NaN: lower training.learning_rate")
    save_feature(learner.net, folder / "student")
    return {
        "alpha": {"before": fitted.before, "after": fitted.after},
        "answers": len(lessons),
        "held_out": len(stop),
        "positions": sum(trace.size for trace in lessons),
        "steps": fitted.steps,
        "seconds": {"answers": recorded_s, "training": perf_counter() - start - recorded_s},
    }


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts by their dotted keys."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value
