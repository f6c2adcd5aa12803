"""compare: one start, cells that are not run again, pairs, files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.data import read, render
from limbeck.data.embedded import TEACHER
from limbeck.errors import RecipeError
from limbeck.evaluation import exposure
from limbeck.models import load_model, load_tokenizer
from limbeck.pipeline import Limit, compare, distill, evaluate_folder
from limbeck.recipe import Recipe
from limbeck.report.load import load

QUIET = Console(quiet=True)


def recipe(folder: Path, **changes: Any) -> Recipe:
    settings = {
        "method": "gkd",
        "teacher": "embedded",
        "student": {"from_teacher": {"layers": [0, 3]}},
        "data": {"train": "embedded:train:16", "eval": "embedded:eval:6"},
        "sampling": {"max_tokens": 8},
        "init": {"training": {"max_steps": 2}},
        "training": {"max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no"},
        "evaluation": {
            "metrics": [{"name": "accuracy", "column": "completion"}, "ex_acc_err"],
            "prompts": 4,
            "rows": 4,
        },
        "precision": "fp32",
        "teacher_precision": "fp32",
        "output": str(folder),
        **changes,
    }
    return Recipe.parse(settings)


def test_a_start_saves_where_it_evaluates_whatever_the_method_does(tmp_path: Path) -> None:
    """Its best checkpoint is chosen at its own steps; the method's `save_steps` (or none) are not the start's."""
    start = {"training": {"max_steps": 4}, "evaluation_steps": 2}
    training = {"max_steps": 3, "per_device_train_batch_size": 4, "save_steps": 3}
    run = distill(recipe(tmp_path, init=start, training=training), quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "start" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all("eval_forward_kl" in line for line in lines)  # known too, but the loss decides
    state = json.loads((tmp_path / "start" / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_metric"] == min(line["eval_loss"] for line in lines)
    assert run.metrics["steps"] == 3


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("*/*/metrics.jsonl")}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    return compare(recipe(folder), methods=["sft", "gkd"], limit=Limit(steps=2), seeds=[0, 1], console=QUIET)


def test_a_comparison_leaves_table_pairs_numbers_and_report(done: Path) -> None:
    comparison = json.loads((done / "comparison.json").read_text())
    assert [row["method"] for row in comparison["table"]] == ["teacher", "start", "sft", "gkd"]
    assert all(row["steps"] == 2 for row in comparison["table"][2:])
    main = [pair for pair in comparison["pairs"] if pair["metric"] == "accuracy"]
    (pair,) = main
    means = {row["method"]: row["metrics"]["accuracy"]["mean"] for row in comparison["table"]}
    assert (pair["a"], pair["b"]) == ("gkd", "sft")
    assert pair["difference"] == pytest.approx(means["gkd"] - means["sft"])
    (pair,) = [pair for pair in comparison["pairs"] if pair["metric"] == "forward_kl"]
    means = {row["method"]: row["metrics"]["forward_kl"]["mean"] for row in comparison["table"][1:]}
    assert pair["difference"] == pytest.approx(means["gkd"] - means["sft"])
    assert abs(pair["difference"]) > 1e-6
    (pair,) = [pair for pair in comparison["pairs"] if pair["metric"] == "ex_acc_err"]
    teacher, *others = comparison["table"]
    means = {row["method"]: row["metrics"]["ex_acc_err"]["mean"] for row in others}
    assert "ex_acc_err" not in teacher["metrics"]
    assert pair["difference"] == pytest.approx(means["gkd"] - means["sft"])
    with (done / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["study", "method", "seed", "metric", "value", "seconds", "command", "commit"]
    assert {(row["method"], row["seed"]) for row in rows} == {
        ("teacher", ""),
        *((method, seed) for method in ("start", "sft", "gkd") for seed in ("0", "1")),
    }
    assert "GKD" in (done / "report.html").read_text()


def test_excess_accumulated_error_is_that_of_the_student(done: Path) -> None:
    teacher, tokenizer = load_model(TEACHER), load_tokenizer(done / "runs/gkd-seed1/student")
    assert isinstance(tokenizer.pad_token_id, int) and isinstance(tokenizer.eos_token_id, int)
    examples, _ = render(read("embedded:eval:4"), tokenizer)
    options: dict[str, Any] = {"max_tokens": 8, "stop_tokens": (tokenizer.eos_token_id,), "samples": 3}
    student = load_model(done / "runs/gkd-seed1/student")
    found = exposure(student, teacher, examples, pad_id=tokenizer.pad_token_id, **options)
    run = json.loads((done / "runs/gkd-seed1/evaluation.json").read_text())
    assert run["metrics"]["ex_acc_err"]["mean"] == pytest.approx(found.percent[-1], rel=1e-4)


def test_excess_accumulated_error_needs_a_teacher(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="expected a teacher for ex_acc_err"):
        distill(recipe(tmp_path / "run", method="sft", teacher=None, student="embedded", init=None), quiet=True)


def test_all_methods_of_a_seed_begin_where_its_start_ended(done: Path) -> None:
    runs = {path.parent.name: json.loads(path.read_text()) for path in done.glob("runs/*/evaluation.json")}
    for seed in (0, 1):
        assert runs[f"sft-seed{seed}"]["before"] == runs[f"gkd-seed{seed}"]["before"]
    assert runs["sft-seed0"]["before"] != runs["sft-seed1"]["before"]


def test_cells_that_are_done_are_not_run_again(done: Path) -> None:
    before = stamps(done)
    compare(recipe(done), methods=["sft", "gkd"], limit=Limit(steps=2), seeds=[0, 1], console=QUIET)
    assert stamps(done) == before
    compare(
        recipe(done, methods={"gkd": {"lmbda": 0.5}}),
        methods=["sft", "gkd"],
        limit=Limit(steps=2),
        seeds=[0, 1],
        console=QUIET,
    )
    changed = {name for name, stamp in stamps(done).items() if before.get(name) != stamp}
    assert changed == {"runs/gkd-seed0/metrics.jsonl", "runs/gkd-seed1/metrics.jsonl"}


def test_the_student_folder_loads_with_transformers(done: Path) -> None:
    folder = done / "runs" / "gkd-seed0" / "student"
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("Tom has 3 apples.", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    assert "GKD" in (folder / "README.md").read_text()


def test_evaluate_prints_what_the_run_measured(done: Path) -> None:
    folder = done / "runs" / "sft-seed0"
    numbers = evaluate_folder(
        folder / "student",
        "embedded:eval:4",
        metrics=["accuracy"],
        seeds=3,
        teacher="embedded",
        max_tokens=8,
        console=QUIET,
    )
    kept = json.loads((folder / "evaluation.json").read_text())["metrics"]
    for name in ("accuracy", "accuracy_greedy", "forward_kl", "loss"):
        assert numbers[name]["mean"] == pytest.approx(kept[name]["mean"], rel=1e-5), name


def test_an_unknown_method_and_two_budgets(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'seqkd'"):
        compare(recipe(tmp_path), methods=["seqdk"], seeds=[0], console=QUIET)
    with pytest.raises(RecipeError, match="one budget"):
        Limit.parse(budget="3m", steps=5, tokens=None)


def test_a_method_with_changes_is_a_cell_of_its_own(tmp_path: Path) -> None:
    """An ablation: two variants of one method and the method itself, from one start."""
    variants = ["gkd", "gkd:lmbda=0", "gkd:divergence={name: reverse_kl}+lmbda=0.5"]
    folder = compare(recipe(tmp_path), methods=variants, limit=Limit(steps=1), seeds=[0], console=QUIET)
    comparison = json.loads((folder / "comparison.json").read_text())
    rows = comparison["table"][2:]
    assert [row["method"] for row in rows] == variants
    assert rows[1]["label"] == "GKD, lmbda=0"
    found = [Recipe.load(folder / row["recipe"], []) for row in rows]
    assert [(made.lmbda, made.divergence.name) for made in found] == [  # pyright: ignore[reportAttributeAccessIssue]
        (1.0, "jsd"),
        (0.0, "jsd"),
        (0.5, "reverse_kl"),
    ]
    with pytest.raises(RecipeError, match="gkd:lmda=0: lmda: no such key; did you mean 'lmbda'"):
        compare(recipe(tmp_path), methods=["gkd:lmda=0"], limit=Limit(steps=1), seeds=[0], console=QUIET)


def test_a_sweep_over_one_number_has_a_picture_and_the_reward_of_training(tmp_path: Path) -> None:
    """Variants that differ in one number alone: what all share stands in the title, the rest over that number."""
    reward = "reward={name: accuracy, column: completion}+samples=2"
    variants = [f"gkd:{reward}+distill_weight={alpha}" for alpha in (1, 0.5, 0)]
    evaluation = {"metrics": [{"name": "accuracy", "column": "completion"}], "prompts": 2, "rows": 2, "seeds": 1}
    training = {"max_steps": 20, "per_device_train_batch_size": 2, "save_strategy": "no"}
    made = recipe(tmp_path, training=training, evaluation=evaluation)
    folder = compare(made, methods=variants, limit=Limit(steps=20), seeds=[0, 1], console=QUIET)
    comparison = json.loads((folder / "comparison.json").read_text())
    assert [row["label"] for row in comparison["table"][2:]] == [
        f"GKD, distill_weight={alpha}" for alpha in (1, 0.5, 0)
    ]
    assert comparison["title"].endswith(
        "from one start; all with reward={name: accuracy, column: completion}, samples=2"
    )
    for row, alpha in zip(comparison["table"][2:], (1, 0.5, 0), strict=True):
        found: list[float] = []
        for seed in (0, 1):
            (log,) = folder.glob(f"runs/*distill_weight={alpha}-seed{seed}/metrics.jsonl")
            steps = [json.loads(line)["reward"] for line in log.read_text().splitlines()]
            assert len(steps) == 20
            found.append(sum(steps[18:]) / 2)
        assert row["metrics"]["training_reward"]["values"] == pytest.approx(found)
    assert [pair["metric"] for pair in comparison["pairs"]].count("training_reward") == 3
    assert ",training_reward," in (folder / "results.csv").read_text()
    assert "Reward while training" in (folder / "sweep.svg").read_text()
    assert "Over distill_weight" in (folder / "report.html").read_text()
    report = load([folder])
    assert [group.key for group in report.groups] == variants == [row.key for row in report.methods]
    assert all(len(group.runs) == 2 for group in report.groups)
