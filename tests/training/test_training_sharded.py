"""A student sharded over two CPU ranks (FSDP2, as transformers shards at load time)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_helpers import TINY, tiny_recipe
from warm import two_ranks

from limbeck.data.embedded import tokenizer
from limbeck.models import build_student, load_model, save_student
from limbeck.pipeline import distill


def test_a_sharded_student_trains_and_saves_as_one_process_does(tmp_path: Path) -> None:
    """The script asserts DTensor parameters. Resume is refused upstream (transformers 5.23: "Resuming is not supported
    for models sharded at load time"), so the checkpoints hold the model alone."""
    student = build_student({"from_config": TINY}, None, tokenizer(), seed=0)
    save_student(*student, tmp_path / "student")
    script = Path(__file__).with_name("run_sharded.py")
    two_ranks(script, tmp_path / "student", tmp_path / "sharded", output=tmp_path / "printed")
    recipe = tiny_recipe(
        tmp_path / "one",
        "kd",
        student=str(tmp_path / "student"),
        training={"max_steps": 4, "per_device_train_batch_size": 8},
    )
    one = distill(recipe, quiet=True, report=False)
    expected = [json.loads(line)["loss"] for line in (one.folder / "metrics.jsonl").read_text().splitlines()]
    losses = json.loads((tmp_path / "sharded" / "losses.json").read_text())
    assert losses == pytest.approx(expected, rel=1e-4)
    saved = load_model(tmp_path / "sharded" / "checkpoints" / "checkpoint-4")
    trained = load_model(one.student_path)
    for name, parameter in trained.named_parameters():
        assert saved.get_parameter(name).allclose(parameter, atol=1e-4), name
