"""distill(): a recipe in, a run folder out: trained, evaluated before and after, reported."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck import ranks
from limbeck.errors import CheckpointError, RecipeError
from limbeck.models import is_sharded, save_student
from limbeck.pipeline.assess import Assessor
from limbeck.pipeline.card import model_card
from limbeck.pipeline.feature_draft import check, on_features, train_on_features
from limbeck.pipeline.limit import Limit
from limbeck.recipe import Recipe
from limbeck.report import environment, write_report
from limbeck.training import Budget, Parts, build, train


@dataclass(frozen=True)
class Run:
    """What a run left behind. `metrics` is its evaluation.json."""

    folder: Path
    metrics: dict[str, Any]

    @property
    def student_path(self) -> Path:
        return self.folder / "student"

    @property
    def report_path(self) -> Path:
        return self.folder / "report.html"


def distill(
    recipe: Recipe | str | Path | dict[str, Any],
    *,
    student: Any = None,
    teacher: Any = None,
    dataset: Any = None,
    reward: Any = None,
    callbacks: tuple[Any, ...] | list[Any] = (),
    resume: bool = False,
    limit: Limit | None = None,
    memo: Path | None = None,
    quiet: bool = False,
    report: bool = True,
) -> Run:
    """Trains, evaluates, reports.

    `student` and `teacher` may be (model, tokenizer) in memory, `dataset` a datasets.Dataset or list of rows, `reward`
    a function (completion, reference) -> float; each takes the place of what the recipe names. `resume` goes on from
    the newest whole checkpoint in the recipe's `output`. `limit` (pipeline.Limit) ends training by seconds or tokens.
    `memo` is a folder that keeps the evaluations of teacher and start, so that runs which share them share that work.

    Raises LimbeckError; nothing is trained before every check has passed. A feature draft: see `train_on_features`.
    """
    recipe = _loaded(recipe)
    if on_features(recipe):
        return _feature_draft(recipe, teacher, dataset, quiet, (student, reward, callbacks, resume, limit))
    if limit is not None:
        recipe = recipe.replaced(training={**recipe.training, **limit.training()})
    folder = Path(recipe.output)
    if recipe.init is not None:
        ranks.one_process("init")
    if limit is not None and limit.seconds is not None:
        ranks.one_process("a budget in seconds, which ranks would read off their own clocks")
    _claim(folder, resume)
    if recipe.init is not None:
        start = _start(recipe, folder / "start", student=student, teacher=teacher, dataset=dataset, quiet=quiet)
        recipe = recipe.started_from(start.student_path)
        student = None
    if ranks.first():
        recipe.save(folder / "recipe.yaml")
    parts = build(
        _as_before(recipe, folder) if resume else recipe, student=student, teacher=teacher, rows=dataset, reward=reward
    )
    if ranks.first():
        _write_environment(folder, recipe, "fp32" if parts.autocast is None else "bf16")
    assessor = Assessor(recipe, parts, memo or folder / "evaluations")
    before = assessor.start()
    if ranks.first() and not quiet:
        _say(parts)
    trainer, seconds = train(
        recipe,
        parts,
        folder,
        resume=resume and any((folder / "checkpoints").glob("checkpoint-*")),
        budget=_budget(limit),
        evaluator=assessor.during,
        callbacks=tuple(callbacks),
        quiet=quiet or not ranks.first(),
    )
    after = assessor.student()
    if ranks.first() or is_sharded(parts.student):  # a sharded student is gathered by all
        save_student(parts.student, parts.tokenizer, folder / "student")
    evaluation = assessor.summary(before, after, seconds=seconds, steps=trainer.state.global_step)
    if ranks.first():
        write_json(folder / "evaluation.json", evaluation)
        (folder / "student" / "README.md").write_text(model_card(recipe, evaluation))
        if report:
            write_report(folder)
    ranks.wait()
    return Run(folder, evaluation)


def _feature_draft(recipe: Recipe, teacher: Any, dataset: Any, quiet: bool, others: tuple[Any, ...]) -> Run:
    """A run without checkpoints and report; `others`, which `distill` takes besides, must not be given."""
    for name, given in zip(("student", "reward", "callbacks", "--resume", "--budget"), others, strict=True):
        if given:
            raise RecipeError(f"{name}: a feature draft is not trained by the usual trainer; leave it out")
    check(recipe)
    folder = Path(recipe.output)
    _claim(folder, resume=False)
    recipe.save(folder / "recipe.yaml")
    _write_environment(folder, recipe, "fp32")
    evaluation = train_on_features(recipe, folder, teacher=teacher, rows=dataset, quiet=quiet)
    write_json(folder / "evaluation.json", evaluation)
    return Run(folder, evaluation)


def _write_environment(folder: Path, recipe: Recipe, dtype: str) -> None:
    command = shlex.join(["limbeck", *sys.argv[1:]])
    write_json(folder / "environment.json", environment(command, recipe.seed, dtype=dtype))


def _loaded(recipe: Recipe | str | Path | dict[str, Any]) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return Recipe.parse(dict(recipe)) if isinstance(recipe, dict) else Recipe.load(recipe, [])


def _claim(folder: Path, resume: bool) -> None:
    """A run never writes over another one."""
    if resume and not folder.is_dir():
        raise CheckpointError(
            f"output {folder}: expected a run to resume; found no such folder; start without --resume"
        )
    if not resume and (folder / "metrics.jsonl").exists():
        raise RecipeError(
            f"output {folder}: expected a new folder; found a run in it; add --resume, or set another output="
        )
    folder.mkdir(parents=True, exist_ok=True)


def _as_before(recipe: Recipe, folder: Path) -> Recipe:
    """A probe of speed may turn out otherwise the second time: a resumed run keeps its precision."""
    kept = folder / "environment.json"
    return recipe.replaced(precision=json.loads(kept.read_text())["dtype"]) if kept.exists() else recipe


def _start(recipe: Recipe, folder: Path, *, student: Any, teacher: Any, dataset: Any, quiet: bool) -> Run:
    """The SFT stage that the method goes on from; kept, and trained again only if its recipe changed."""
    stage = start_stage(recipe, recipe.seed, folder)
    done = finished(folder, stage)
    if done is not None:
        return done
    shutil.rmtree(folder, ignore_errors=True)
    return distill(stage, student=student, teacher=teacher, dataset=dataset, quiet=quiet, report=False)


def start_stage(recipe: Recipe, seed: int, folder: Path) -> Recipe:
    """The recipe of the SFT stage that `init` asks for."""
    assert recipe.init is not None
    steps = recipe.init.evaluation_steps
    # Its checkpoints follow its own evaluations, whatever the method's stage does.
    own = {"save_strategy": "steps", "save_steps": steps} if steps else {}
    training = {**own, **recipe.init.training}
    stage = recipe.with_method("sft", seed=seed, training=training, output=str(folder), init=None)
    return stage.replaced(evaluation={"prompts": 0, "steps": steps, "rows": recipe.evaluation.rows, "best": "loss"})


def finished(folder: Path, recipe: Recipe) -> Run | None:
    """The run in `folder` if it is whole and came from this very recipe."""
    saved, evaluation = folder / "recipe.yaml", folder / "evaluation.json"
    if not saved.exists() or not evaluation.exists() or saved.read_text() != recipe.yaml():
        return None
    return Run(folder, json.loads(evaluation.read_text()))


def _budget(limit: Limit | None) -> Budget | None:
    if limit is None or (limit.seconds is None and limit.tokens is None):
        return None
    return Budget(seconds=limit.seconds, tokens=limit.tokens)


def _say(parts: Parts) -> None:
    for line in (f"data  {parts.summary}", *parts.notes):
        print(line, file=sys.stderr)


def write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)
