"""Recipes: resolved, overridden, checked; every packaged one trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from limbeck.errors import RecipeError
from limbeck.pipeline import distill
from limbeck.recipe import GKD, RECIPES, Recipe
from limbeck.settings import PACKAGED, apply_overrides

BASE = {"method": "gkd", "teacher": "t", "student": "s"}


def test_overrides_are_yaml_and_reach_nested_keys() -> None:
    settings = apply_overrides(dict(BASE), ["training.max_steps=7", "student.from_teacher.layers=[0, 2]", "output=a=b"])
    assert settings["training"] == {"max_steps": 7}
    assert settings["student"]["from_teacher"] == {"layers": [0, 2]}
    assert settings["output"] == "a=b"
    assert [apply_overrides({}, [f"x={text}"])["x"] for text in ("3e-3", "-1.5E+2", "1e5", ".5e1", "e3", "1e")] == [
        0.003,
        -150.0,
        1e5,
        5.0,
        "e3",
        "1e",
    ]
    with pytest.raises(RecipeError, match="key=value"):
        apply_overrides({}, ["training.max_steps"])


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = Recipe.parse({**BASE, "lmbda": 0.25, "divergence": {"name": "skew_reverse_kl", "skew": 0.2}})
    recipe.save(tmp_path / "recipe.yaml")
    again = Recipe.load(tmp_path / "recipe.yaml", [])
    assert isinstance(again, GKD)
    assert again.settings() == recipe.settings()
    assert again.divergence.params == {"skew": 0.2}


def test_another_method_keeps_what_is_shared_and_takes_its_own() -> None:
    recipe = Recipe.parse(
        {**BASE, "lmbda": 0.5, "training": {"max_steps": 5}, "methods": {"kd": {"training": {"learning_rate": 0.1}}}}
    )
    kd = recipe.with_method("kd", seed=3, training={"max_steps": 9})
    assert (kd.method, kd.seed) == ("kd", 3)
    assert kd.training == {"max_steps": 9, "learning_rate": 0.1}
    assert not hasattr(kd, "lmbda")
    assert recipe.with_method("gkd").lmbda == 0.5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lmbda": 2}, "lmbda"),
        ({"divergence": {"name": "jsd", "beta": 1.0}}, "reverse_kl"),
        ({"divergence": {"name": "forward_kl", "beta": 0.5}}, "beta"),
        ({"divergence": {"name": "jds"}}, "did you mean 'jsd'"),
        ({"student": {"path": "a", "from_teacher": {"layers": [0]}}}, "exactly one"),
        ({"training": {"bf16": True}}, "precision"),
        ({"data": {"trian": "x"}}, "did you mean 'train'"),
        ({"sampling": {"top_p": 0}}, "top_p"),
        ({"method": "kdd"}, "did you mean 'kd'"),
    ],
)
def test_mistakes_name_key_and_fix(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.parse({**BASE, **change})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_yaml_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("method: [gkd\n")
    with pytest.raises(RecipeError, match="not valid YAML") as error:
        Recipe.load(tmp_path / "r.yaml", [])
    assert "\n" not in str(error.value)


SAMPLES = ("gkd-reward", "qwen-gsm8k")
"""Recipes whose batches hold four samples a prompt."""


@pytest.mark.parametrize("name", sorted(path.stem for path in PACKAGED.glob("*.yaml")))
def test_every_packaged_recipe_parses_and_trains_tiny(name: str, tmp_path: Path) -> None:
    """On the embedded teacher, two steps: its keys are read by something."""
    overrides = [
        "training.max_steps=2",
        f"training.per_device_train_batch_size={4 if name in SAMPLES else 2}",
        "data.train=embedded:train:8",
        "data.eval=embedded:eval:4",
        "data.template=null",
        "data.prompt_tokens=null",
        "data.max_length=128",
        "sampling.max_tokens=4",
        "evaluation.prompts=2",
        "evaluation.rows=2",
        "training.gradient_accumulation_steps=1",
        "precision=fp32",
        "teacher_precision=fp32",
        f"output={tmp_path / 'run'}",
    ]
    if name != "embedded-teacher":
        overrides += ["teacher=embedded", "student={from_teacher: {layers: [0, 2]}}"]
    else:
        overrides += ["teacher=embedded"]  # for its tokenizer alone
    if "init" in yaml.safe_load((PACKAGED / f"{name}.yaml").read_text()):
        overrides.append("init={training: {max_steps: 1}}")
    if name == "minillm":
        overrides += ["data.corpus=[{text: 'Ann has two red apples.'}]", "data.corpus_tokens=4"]
    recipe = Recipe.load(name, overrides)
    run = distill(recipe, quiet=True)
    assert run.metrics["steps"] == 2
    assert run.student_path.is_dir()
    assert run.report_path.is_file()


def test_every_method_has_a_recipe_class() -> None:
    from limbeck.methods import METHODS

    assert RECIPES.keys() == METHODS.keys()


def test_what_is_frozen_stays_frozen_after_the_start() -> None:
    student = {"from_teacher": {"layers": [0]}, "freeze": ["embed_tokens"]}
    recipe = Recipe.parse({"method": "kd", "teacher": "t", "student": student, "init": "sft"})
    started = recipe.started_from("runs/start")
    assert started.student.model_dump(exclude_none=True) == {"path": "runs/start", "freeze": ["embed_tokens"]}
    assert started.init is None


def test_writing_in_int8_belongs_to_the_method_that_writes() -> None:
    with pytest.raises(RecipeError, match="int8_rollouts"):
        Recipe.parse({"method": "kd", "teacher": "t", "student": "s", "int8_rollouts": True})


def test_a_bare_no_saves_nothing(tmp_path: Path) -> None:
    """As YAML reads it, in a file and on the command line."""
    (tmp_path / "r.yaml").write_text("method: sft\nstudent: {path: s}\ntraining: {save_strategy: no}\n")
    for recipe in (Recipe.load(tmp_path / "r.yaml", []), Recipe.load("quickstart", ["training.save_strategy=no"])):
        assert recipe.training["save_strategy"] == "no"
