"""The order of rows, budgets, what stops a run, and what is logged."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.errors import RecipeError, TrainingError
from limbeck.models.linear import FastLinear
from limbeck.pipeline import Limit, distill
from limbeck.training import Trainer, build
from limbeck.training.build import build_objective, build_source, training_arguments
from limbeck.training.order import EpochOrder


def metrics(folder: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_epoch_has_every_row_once_in_another_order() -> None:
    order = EpochOrder(50, seed=1)
    epochs: list[list[int]] = []
    for epoch in range(3):
        order.set_epoch(epoch)
        epochs.append(list(order))
    assert all(sorted(rows) == list(range(50)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(EpochOrder(50, seed=2)) != epochs[0]
    assert order.rows(40, 120) == (epochs[0] + epochs[1] + epochs[2])[40:120]
    assert EpochOrder(5, seed=1, strategy="sequential").rows(3, 8) == [3, 4, 0, 1, 2]


def test_rows_grouped_by_length_are_all_there_and_their_batches_alike() -> None:
    lengths: Any = np.random.default_rng(0).integers(10, 400, size=1003)
    order = EpochOrder(1003, seed=1, strategy="group_by_length", lengths=lengths, batch=8)
    rows = order.permutation(0)
    assert sorted(rows) == list(range(1003)) and rows == order.permutation(0) != order.permutation(1)
    batches = [lengths[rows[start : start + 8]] for start in range(0, 1000, 8)]
    spread = [int(batch.max() - batch.min()) for batch in batches]
    padding = 1 - sum(batch.sum() for batch in batches) / sum(batch.max() * len(batch) for batch in batches)
    assert max(spread[:50]) < 30 and padding < 0.05
    firsts = [int(batch[0]) for batch in batches[:50]]
    assert firsts != sorted(firsts)  # short and long ones alternate


def test_grouping_by_length_reaches_the_trainer(recipe: Any, tmp_path: Path) -> None:
    shares: dict[str, float] = {}
    for strategy in ("random", "group_by_length"):
        training = {"train_sampling_strategy": strategy, "per_device_train_batch_size": 6, "max_steps": 4}
        made = recipe("sft", output=tmp_path / strategy, training=training)
        shares[strategy] = sum(row["padding_share"] for row in metrics(distill(made, quiet=True, report=False).folder))
    assert shares["group_by_length"] < 0.7 * shares["random"]
    with pytest.raises(RecipeError, match="found batch_rebalance"):
        recipe("sft", training={"train_sampling_strategy": "batch_rebalance"})


def test_freed_memory_may_go_back_between_steps_and_after_rollouts(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    for module, what in (("limbeck.training.trainer", "step"), ("limbeck.decoding.generate", "rollout")):
        monkeypatch.setattr(sys.modules[module], "give_back", partial(looked.append, what))
    settings: dict[str, Any] = {"lmbda": 1.0, "evaluation": {"prompts": 0}}
    made = recipe("gkd", output=tmp_path, training={"max_steps": 3, "save_strategy": "no"}, **settings)
    distill(made, quiet=True, report=False)
    assert [what for what in looked if what == "step"] == ["step"] * 3
    assert "".join(looked).count("steprollout") == 3  # the rest are the evaluations'


@pytest.mark.parametrize("accumulation", [1, 3])
def test_upcoming_names_the_rows_that_training_draws(recipe: Any, accumulation: int) -> None:
    """Over an epoch's end; a partial last step of an epoch is a step of its own, so whole epochs are used here."""
    from limbeck.training.build import build_source
    from limbeck.training.trainer import Trainer

    drawn: list[list[int]] = []
    training = {"max_steps": 4, "gradient_accumulation_steps": accumulation, "save_strategy": "no"}
    made = recipe("sft", training=training)
    parts = build(made)
    source = build_source(made, parts)
    seen: list[list[int]] = []

    def watching(examples: Any, step: int) -> Any:
        drawn.append([example.index for example in examples])
        seen.append([example.index for example in trainer.upcoming(step, 1)])
        return source(examples, step)

    trainer = Trainer(
        model=parts.student,
        args=parts.args,
        examples=parts.train,
        source=watching,
        objective=build_objective(made),
        tokenizer=parts.tokenizer,
    )
    trainer.train()
    assert drawn == seen
    assert len(drawn) == 4


def test_a_budget_of_tokens_ends_the_run_and_the_learning_rate_follows_it(recipe: Any) -> None:
    run = distill(recipe("sft", training={"save_strategy": "no"}), limit=Limit(tokens=700), quiet=True, report=False)
    rows = metrics(run.folder)
    trained = [row["completion_tokens"] * 4 for row in rows]
    assert sum(trained) >= 700 > sum(trained[:-1])
    rates = [row["learning_rate"] for row in rows]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.5 * rates[0]


def test_a_budget_of_seconds_ends_the_run(recipe: Any) -> None:
    run = distill(recipe("sft", training={"save_strategy": "no"}), limit=Limit(seconds=1.0), quiet=True, report=False)
    assert 1.0 <= run.metrics["seconds"] < 6.0


@pytest.mark.parametrize("text", ["10", "m", "-3s", "0s"])
def test_a_budget_that_is_no_time(text: str) -> None:
    with pytest.raises(RecipeError, match="90s"):
        Limit.parse(budget=text, steps=None, tokens=None)


def test_a_nan_stops_the_run_naming_step_and_rows(recipe: Any) -> None:
    training = {"learning_rate": 1e30, "max_grad_norm": 0.0, "save_strategy": "no"}
    with pytest.raises(TrainingError, match=r"step 2: expected a finite loss.*rows \["):
        distill(recipe("sft", training=training), quiet=True, report=False)


def test_every_step_logs_what_was_promised(recipe: Any) -> None:
    run = distill(recipe("gkd", lmbda=0.5), quiet=True, report=False)
    rows = metrics(run.folder)
    wanted = {"loss", "divergence", "cross_entropy", "forward_kl", "reverse_kl", "agreement", "student_entropy"}
    wanted |= {"completion_tokens", "length_limit_share", "student_share", "rollout_s", "teacher_s", "student_s"}
    wanted |= {"tokens_per_s", "learning_rate", "grad_norm"}
    for row in rows:
        assert wanted <= row.keys()
        assert row["divergence"] == pytest.approx(row["loss"], rel=1e-5)
        assert 0 <= row["agreement"] <= 1
    assert 0 < sum(row["student_share"] for row in rows) < len(rows)
    samples = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert {row["writer"] for row in samples} <= {"student", "dataset"}


def test_divergence_temperature_is_not_the_sampling_temperature(recipe: Any) -> None:
    made = recipe("gkd", divergence={"name": "jsd", "beta": 0.3, "temperature": 2.0}, sampling={"temperature": 0.7})
    assert build_objective(made).keywords == {  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
        "name": "jsd",
        "temperature": 2.0,
        "cross_entropy_weight": 0.0,
        "beta": 0.3,
    }


def halved_kl(student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor) -> torch.Tensor:
    """A divergence of a user's own, named in a recipe as module:function."""
    return (teacher_logprobs_NV.exp() * (teacher_logprobs_NV - student_logprobs_NV)).sum(-1) / 2


def test_a_divergence_of_ones_own_by_module_and_function(recipe: Any) -> None:
    made = recipe("kd", divergence={"name": "test_training_order:halved_kl"}, training={"max_steps": 1})
    run = distill(made, quiet=True, report=False)
    (row,) = metrics(run.folder)
    assert row["loss"] == pytest.approx(row["forward_kl"] / 2, rel=1e-5)
    with pytest.raises(RecipeError, match="divergence.*PYTHONPATH"):
        build_objective(recipe("kd", divergence={"name": "nowhere:at_all"}))


def test_a_lora_student_on_its_teacher_is_one_copy_and_trains(recipe: Any) -> None:
    made = recipe("kd", student={"path": "embedded", "lora": {"r": 4}})
    parts = build(made)
    bases = {parameter.data_ptr() for name, parameter in parts.student.named_parameters() if "lora" not in name}
    assert parts.teacher == "adapters"
    trained = [name for name, parameter in parts.student.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    assert len(bases) == len({name for name, _ in parts.student.named_parameters() if "lora" not in name})
    run = distill(made, quiet=True, report=False)
    assert metrics(run.folder)[0]["forward_kl"] == pytest.approx(0.0, abs=1e-6)
    assert run.metrics["metrics"]["forward_kl"]["mean"] >= 0


def test_unsaved_arguments_of_transformers_pass_through(recipe: Any) -> None:
    args = training_arguments(recipe(training={"report_to": "none", "optim": "adafactor", "weight_decay": 0.25}))
    assert (args.optim, args.weight_decay) == ("adafactor", 0.25)
    with pytest.raises(RecipeError, match="training"):
        training_arguments(recipe(training={"lr_scheduler_type": "nonsense"}))


@pytest.mark.parametrize(
    ("best", "greater"), [("agreement", True), ("accuracy_greedy", True), ("repetition", False), ("reverse_kl", False)]
)
def test_the_best_checkpoint_is_the_highest_or_lowest_as_its_number_says(recipe: Any, best: str, greater: bool) -> None:
    made = recipe(evaluation={"steps": 2, "best": best, "metrics": ["accuracy", "repetition"]})
    assert training_arguments(made).greater_is_better is greater


def test_mixtures_need_a_held_out_set_of_their_own(recipe: Any) -> None:
    parts = [{"path": "embedded:train:8", "weight": 1}, {"path": "embedded:eval:4", "weight": 1}]
    with pytest.raises(RecipeError, match=r"data\.eval"):
        build(recipe("sft", data={"train": parts}))


def test_data_and_models_in_memory(recipe: Any) -> None:
    from limbeck.data.embedded import TEACHER, rows
    from limbeck.models import load_model, load_tokenizer

    made = recipe("kd", data={}, teacher=None, student="nowhere")
    tokenizer = load_tokenizer(TEACHER)
    student: Any = load_model(TEACHER)
    teacher = load_model(TEACHER)
    torch.nn.init.normal_(student.get_output_embeddings().weight)
    run = distill(
        made,
        student=(student, tokenizer),
        teacher=(teacher, tokenizer),
        dataset=rows("train", 24),
        quiet=True,
        report=False,
    )
    assert run.metrics["metrics"]["forward_kl"]["mean"] < run.metrics["before"]["forward_kl"]["mean"]


def test_how_far_the_writer_is_from_the_student_is_logged(recipe: Any, tmp_path: Path) -> None:
    """Nothing apart in float32 whoever shares the writing, no number where the student wrote nothing; int8 shows."""

    def logged(name: str, **changes: Any) -> list[dict[str, Any]]:
        return metrics(distill(recipe("gkd", output=tmp_path / name, **changes), quiet=True, report=False).folder)

    for lmbda in (1.0, 0.5):
        assert all(abs(step.get("rollout_kl", 0.0)) < 1e-5 for step in logged(f"own-{lmbda}", lmbda=lmbda))
    assert all("rollout_kl" not in step for step in logged("none", lmbda=0.0))
    one_by_one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    int8 = logged("int8", lmbda=1.0, int8_rollouts=True, training=one_by_one)
    assert any(1e-5 < abs(step["rollout_kl"]) < 0.5 for step in int8)


def test_models_that_the_user_gives_take_the_faster_products_too(recipe: Any) -> None:
    made = recipe()
    parts = build(made)
    models = [parts.student, parts.teacher]
    for module in [module for model in models for module in model.modules()]:
        if isinstance(module, FastLinear):
            setattr(module, "__class__", nn.Linear)  # noqa: B010 (pyright)
    Trainer(
        model=parts.student,
        args=parts.args,
        examples=parts.train,
        source=build_source(made, parts),
        objective=build_objective(made),
        teacher=parts.teacher,
        tokenizer=parts.tokenizer,
    )
    kinds = {type(module) for model in models for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {FastLinear}
