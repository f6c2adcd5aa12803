"""`limbeck quickstart`: the embedded task, one teacher distilled four ways from one start."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console

from limbeck.data.embedded import TEACHER, tokenizer
from limbeck.models import build_student
from limbeck.pipeline import compare, distill
from limbeck.recipe import Recipe

METHODS = ["sft", "seqkd", "kd", "gkd"]


def quickstart(out: Path, console: Console | None = None) -> Path:
    """`compare` on the packaged recipe `quickstart`, one training seed. Returns the folder."""
    recipe = Recipe.load("quickstart", [f"output={out}"])
    return compare(recipe, methods=METHODS, seeds=[recipe.seed], name="quickstart", console=console)


def rebuild_teacher(out: Path) -> Path:
    """Trains the embedded teacher by the packaged recipe `embedded-teacher` and puts it in the package."""
    recipe = Recipe.load("embedded-teacher", [f"output={out / 'embedded-teacher'}"])
    student = build_student({"from_config": recipe.student.from_config}, None, tokenizer(), seed=recipe.seed)
    run = distill(recipe, student=student)
    TEACHER.mkdir(parents=True, exist_ok=True)
    for path in run.student_path.iterdir():
        if path.name != "README.md":
            shutil.copy(path, TEACHER / path.name)
    return TEACHER
