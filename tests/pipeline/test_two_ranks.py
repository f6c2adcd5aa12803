"""`torchrun -m limbeck distill` on two CPU ranks: one training, one set of files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from limbeck.errors import RecipeError
from limbeck.pipeline import Limit, compare, distill
from limbeck.recipe import Recipe

SMALL = [
    "init=null",
    "data.train=embedded:train:32",
    "data.eval=embedded:eval:4",
    "training.max_steps=3",
    "training.per_device_train_batch_size=4",
    "lmbda=0.5",
    "sampling.max_tokens=12",
    "evaluation.prompts=4",
    "evaluation.rows=4",
]


def test_two_ranks_are_one_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "limbeck"]
    command = [*launch, "distill", "quickstart", *SMALL, f"output={out}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]  # each once: the ranks know of each other
    assert done.stdout.count("student ") == 1
    AutoModelForCausalLM.from_pretrained(out / "student")
    assert (out / "report.html").exists() and json.loads((out / "evaluation.json").read_text())["steps"] == 3


def test_what_ranks_cannot_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = Recipe.load("quickstart", [f"output={tmp_path / 'run'}"])
    with pytest.raises(RecipeError, match="init: expected one process, found 2 of torchrun"):
        distill(recipe)
    with pytest.raises(RecipeError, match="compare: expected one process"):
        compare(recipe, methods=["sft"])
    with pytest.raises(RecipeError, match="budget in seconds.*expected one process"):
        distill(recipe.replaced(init=None), limit=Limit(seconds=5.0))
    assert not (tmp_path / "run").exists()
