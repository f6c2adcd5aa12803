"""Stop, resume: the same numbers bit for bit, each step once in the logs, whole checkpoints or none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from training_helpers import MINILLM_DATA
from warm import Warm

from limbeck.errors import CheckpointError
from limbeck.manifest import flaw
from limbeck.pipeline import distill
from limbeck.training.checkpoints import Checkpoints, trim_log

TIMES = ("rollout_s", "teacher_s", "student_s", "tokens_per_s")
DROPOUT = {
    "from_config": {
        "model_type": "gpt2",
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 256,
        "resid_pdrop": 0.3,
    }
}


def steps(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


RESUMED = {
    "kd": {},
    "gkd": {},
    "minillm": {"data": MINILLM_DATA, "inner_epochs": 3},  # resumed inside one: its rollouts are in the checkpoint
    "gkd-reward": {"method": "gkd", "reward": "length"},  # and the mean of all rewards so far
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_equals_the_uninterrupted_run_bit_for_bit(recipe: Any, tmp_path: Path, name: str) -> None:
    """Six steps at 12 steps an epoch (a resume inside one); dropout, so that the global RNG matters too."""
    changes = dict(RESUMED[name])
    method = changes.pop("method", name)
    settings = {
        **changes,
        "student": DROPOUT,
        "training": {"max_steps": 6, "per_device_train_batch_size": 2, "save_total_limit": 9},
    }
    whole = distill(recipe(method, output=tmp_path / "whole", **settings), quiet=True, report=False)
    cut = recipe(method, output=tmp_path / "cut", **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / name)
    shutil.rmtree(tmp_path / "cut" / "student")
    resumed = distill(cut, resume=True, quiet=True, report=False)
    assert steps(resumed.folder) == steps(whole.folder)
    assert [row["step"] for row in steps(resumed.folder)] == [1, 2, 3, 4, 5, 6]
    found, expected = (load_file(run.student_path / "model.safetensors") for run in (resumed, whole))
    assert all(found[name].equal(expected[name]) for name in expected)


def test_kill_minus_nine_then_resume(recipe: Any, tmp_path: Path) -> None:
    """A process killed in the middle of training leaves a run that goes on to the same end."""
    training = {"max_steps": 40, "per_device_train_batch_size": 2}
    whole = distill(recipe("gkd", output=tmp_path / "whole", training=training), quiet=True, report=False)
    killed = recipe("gkd", output=tmp_path / "killed", training=training)
    killed.save(tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "limbeck", "distill", str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= 11):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "evaluation.json").exists(), "the run ended before it was killed"
    resumed = distill(killed, resume=True, quiet=True, report=False)
    assert steps(resumed.folder) == steps(whole.folder)


def test_resume_takes_the_newest_whole_checkpoint(recipe: Any) -> None:
    run = distill(recipe(training={"save_total_limit": 9}), quiet=True, report=False)
    checkpoints = Checkpoints(run.folder / "checkpoints")
    newest, faults = checkpoints.newest()
    assert (newest.name, faults) == ("checkpoint-4", [])
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    newest, faults = checkpoints.newest()
    assert newest.name == "checkpoint-2"
    assert "checkpoint-4: model.safetensors has" in faults[0]
    (newest / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer.pt is missing.*start anew"):
        checkpoints.newest()


def test_a_full_disk_leaves_the_earlier_checkpoint(recipe: Any, tmp_path: Path) -> None:
    """The operating system refuses to write more than 20 kB a file: transformers' save fails in the middle."""
    distill(recipe(training={"max_steps": 2}), quiet=True, report=False)
    folder = tmp_path / "run"
    script = (
        "import resource, signal, sys; from limbeck.cli import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "sys.argv = ['limbeck', 'distill', sys.argv[1], '--resume']; main()"
    )
    recipe(training={"max_steps": 4}).save(tmp_path / "recipe.yaml")
    code, said = Warm(script, tmp_path / "recipe.yaml", output=tmp_path / "printed").done()
    assert code == 2, said[-2000:]
    assert "could not be written" in said
    assert "Traceback" not in said
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left == ["checkpoint-2"]
    assert flaw(folder / "checkpoints" / "checkpoint-2") is None
    resumed = distill(recipe(training={"max_steps": 4}), resume=True, quiet=True, report=False)
    assert [row["step"] for row in steps(resumed.folder)] == [1, 2, 3, 4]


def test_a_log_is_cut_back_with_its_half_written_line(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    trim_log(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_best_checkpoint_is_kept_and_named_by_its_final_path(recipe: Any) -> None:
    made = recipe(
        training={"max_steps": 6, "learning_rate": 0.5, "save_total_limit": 1},
        evaluation={"steps": 2, "rows": 8, "prompts": 0},
    )
    run = distill(made, quiet=True, report=False)
    rows = [json.loads(line) for line in (run.folder / "evaluations.jsonl").read_text().splitlines()]
    best = min(rows, key=lambda row: row["eval_forward_kl"])
    kept = [path.name for path in (run.folder / "checkpoints").glob("checkpoint-*")]
    assert f"checkpoint-{best['step']}" in kept
    state = json.loads((run.folder / "checkpoints" / kept[-1] / "trainer_state.json").read_text())
    assert ".partial" not in str(state["best_model_checkpoint"])
    assert run.metrics["metrics"]["forward_kl"]["mean"] == pytest.approx(best["eval_forward_kl"], rel=1e-5)
