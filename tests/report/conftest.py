"""A made-up comparison and a made-up run, with numbers as a real one has them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

METHODS = {"sft": "SFT", "seqkd": "SeqKD", "kd": "KD", "gkd": "GKD", "minillm": "MiniLLM"}
ACCURACY = {"teacher": 0.981, "start": 0.912, "sft": 0.931, "seqkd": 0.923, "kd": 0.930, "gkd": 0.956, "minillm": 0.949}
DIVERGENCE = {"start": 0.142, "sft": 0.118, "seqkd": 0.109, "kd": 0.071, "gkd": 0.058, "minillm": 0.063}
STEPS = 200
PROBLEMS = [
    ("Mia has 14 apples. She buys 3 bags of 6 apples and gives 9 away. How many apples does she have?", 14, 3, 6, 9),
    ("Tom has 21 stamps. He gets 4 sheets of 5 stamps and loses 8. How many stamps does he have?", 21, 4, 5, 8),
    ("Ana has 7 books. She finds 2 boxes of 12 books and sells 10. How many books does she have?", 7, 2, 12, 10),
    ("Ben has 30 coins. He wins 5 rounds of 7 coins and spends 16. How many coins does he have?", 30, 5, 7, 16),
    ("Eva has 9 shells. She picks 6 piles of 4 shells and drops 11. How many shells does she have?", 9, 6, 4, 11),
]


def estimate(mean: float, spread: float, draw: random.Random, seeds: int = 3) -> dict[str, Any]:
    values = [mean + draw.gauss(0, spread) for _ in range(seeds)]
    centre = sum(values) / seeds
    return {"mean": centre, "low": centre - 1.7 * spread, "high": centre + 1.8 * spread, "values": values}


def metrics_of(key: str, draw: random.Random) -> dict[str, Any]:
    metrics = {
        "accuracy": estimate(ACCURACY[key], 0.006, draw),
        "accuracy_greedy": estimate(ACCURACY[key] + 0.012, 0.004, draw),
    }
    if key in DIVERGENCE:
        metrics["forward_kl"] = estimate(DIVERGENCE[key], 0.003, draw)
        metrics["reverse_kl"] = estimate(DIVERGENCE[key] * 1.3, 0.004, draw)
    return metrics


def worked(a: int, b: int, c: int, d: int, slip: int = 0) -> str:
    product, total = b * c, a + b * c + slip
    return f"{b} * {c} = {product}\n{a} + {product} = {total}\n{total} - {d} = {total - d}\nanswer: {total - d}"


def samples(key: str, draw: random.Random) -> list[dict[str, Any]]:
    found = []
    for text, *numbers in PROBLEMS:
        slip = draw.choice([0, 0, 0, 10]) if key != "gkd" else 0
        before = worked(*numbers, slip=random.Random(text).choice([0, 1, -10]))
        found.append(
            {
                "prompt": text,
                "reference": worked(*numbers),
                "teacher": worked(*numbers),
                "before": before,
                "after": worked(*numbers, slip=slip),
            }
        )
    return found


def step_row(method: str, step: int, draw: random.Random) -> dict[str, Any]:
    decay = math.exp(-step / 60)
    kl = DIVERGENCE[method] + (DIVERGENCE["start"] - DIVERGENCE[method]) * decay
    written = method in ("gkd", "minillm")
    return {
        "step": step,
        "loss": (kl if method in ("kd", "gkd") else 0.31 + 0.2 * decay) * draw.uniform(0.85, 1.15),
        "forward_kl": kl * draw.uniform(0.85, 1.15),
        "reverse_kl": 1.3 * kl * draw.uniform(0.85, 1.15),
        "agreement": 1 - 0.5 * kl * draw.uniform(0.9, 1.1),
        "student_entropy": 0.34 + 0.1 * decay + draw.gauss(0, 0.01),
        "completion_tokens": int(4200 + 300 * draw.gauss(0, 1)),
        "length_limit_share": 0.03 * decay * draw.random(),
        "student_share": 0.5 + 0.05 * draw.gauss(0, 1) if written else 0.0,
        "tokens_per_s": 9000 * draw.uniform(0.9, 1.1) * (0.4 if written else 1),
        "rollout_s": draw.uniform(0.4, 0.5) if written else 0.0,
        "teacher_s": 0.0 if method in ("sft", "seqkd") else draw.uniform(0.1, 0.13),
        "student_s": draw.uniform(0.2, 0.25),
        "learning_rate": 1e-3 * (1 - step / STEPS),
        "grad_norm": 0.4 + decay * draw.random(),
        "epoch": step / 100,
    }


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder: Path, method: str = "gkd", seed: int = 0) -> Path:
    """A whole run folder."""
    draw = random.Random(f"{method}{seed}")
    folder.mkdir(parents=True)
    recipe = f"method: {method}\nteacher: embedded\nstudent: runs/start-seed{seed}\nseed: {seed}\n"
    (folder / "recipe.yaml").write_text(recipe + f"training:\n  max_steps: {STEPS}\n  learning_rate: 0.001\n")
    rows = [step_row(method, step, draw) for step in range(1, STEPS + 1)]
    write_lines(folder / "metrics.jsonl", rows)
    evaluations = []
    for step in range(0, STEPS + 1, 40):
        done = 1 - math.exp(-step / 60)
        kl = DIVERGENCE["start"] + (DIVERGENCE[method] - DIVERGENCE["start"]) * done
        accuracy = ACCURACY["start"] + (ACCURACY[method] - ACCURACY["start"]) * done + draw.gauss(0, 0.003)
        evaluations.append({"step": step, "eval_loss": 0.3 + kl, "eval_forward_kl": kl, "eval_reverse_kl": 1.3 * kl})
        evaluations[-1]["eval_accuracy"] = accuracy
    write_lines(folder / "evaluations.jsonl", evaluations)
    writer = "student" if method == "gkd" else "dataset"
    texts = [
        {
            "step": 40 * k,
            "prompt": text,
            "completion": "\n" + worked(*numbers),
            "writer": writer,
            "finish_reason": "stop",
        }
        for k, (text, *numbers) in enumerate(PROBLEMS)
    ]
    write_lines(folder / "samples.jsonl", texts)
    environment = {
        "cpu": "AMD EPYC (family 25 model 17, avx512_bf16)",
        "cores": 2,
        "memory_bytes": 8 * 1024**3,
        "python": "3.11.9",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "limbeck": "0.1.0",
        "date": "2026-11-30T10:15:00+00:00",
        "command": "limbeck quickstart",
        "commit": "4f2a9c1d",
        "seed": seed,
        "dtype": "float32",
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    seconds = sum(row["rollout_s"] + row["teacher_s"] + row["student_s"] for row in rows) + 6.5
    evaluation = {
        "method": method,
        "label": METHODS[method],
        "metrics": metrics_of(method, draw),
        "before": metrics_of("start", random.Random(1)),
        "teacher_metrics": metrics_of("teacher", random.Random(2)),
        "models": {
            "teacher": speed("teacher", 598_272, 41.3, 0.0041, 2150.0),
            "student": speed(
                "student", 135_936, 18.2, 0.0017 * draw.uniform(0.95, 1.05), 5210.0 * draw.uniform(0.95, 1.05)
            ),
        },
        "divergence_by_position": [
            {
                "position": t,
                "forward_kl": DIVERGENCE[method] * (1.6 - t / 60 + 0.2 * draw.random()),
                "tokens": 900 - 12 * t,
            }
            for t in range(60)
        ],
        "samples": samples(method, draw),
        "seconds": seconds,
        "steps": STEPS,
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def speed(name: str, parameters: int, peak_mib: float, first_s: float, rate: float) -> dict[str, Any]:
    peak = int(peak_mib * 1024**2)
    sizes = {"parameters": parameters, "bytes": 4 * parameters, "peak_memory_bytes": peak}
    return {"name": name, **sizes, "time_to_first_token_s": first_s, "tokens_per_s": rate}


def make_compare(folder: Path, seeds: int = 3) -> Path:
    """A whole compare folder: five methods, `seeds` training seeds each."""
    for method in METHODS:
        for seed in range(seeds):
            make_run(folder / "runs" / f"{method}-seed{seed}", method, seed)
    draw = random.Random(7)
    table: list[dict[str, Any]] = [
        {"method": "teacher", "label": "Teacher", "metrics": metrics_of("teacher", draw)},
        {"method": "start", "label": "Start", "metrics": metrics_of("start", draw), "seconds": 38.4, "steps": 300},
    ]
    for method, label in METHODS.items():
        row = {"method": method, "label": label, "recipe": f"runs/{method}-seed0/recipe.yaml"}
        table.append({**row, "metrics": metrics_of(method, draw), "seconds": draw.uniform(50, 160), "steps": STEPS})
    pairs = []
    names = list(METHODS)
    for first in range(len(names)):
        for second in range(first):
            a, b = names[first], names[second]
            gap = ACCURACY[a] - ACCURACY[b] + draw.gauss(0, 0.001)
            low, high = gap - 0.009, gap + 0.010
            verdict = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
            pairs.append({"a": a, "b": b, "metric": "accuracy", "difference": gap, "low": low, "high": high})
            pairs[-1]["verdict"] = verdict
    comparison = {
        "title": "Quickstart: word problems, four ways and one more",
        "budget": f"{STEPS} steps",
        "seeds": list(range(seeds)),
        "command": "limbeck compare quickstart.yaml --methods sft,seqkd,kd,gkd,minillm --steps 200 --seeds 3",
        "metric": "accuracy",
        "table": table,
        "pairs": pairs,
    }
    (folder / "comparison.json").write_text(json.dumps(comparison))
    return folder


@pytest.fixture(scope="session")
def _compare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_compare(tmp_path_factory.mktemp("report") / "compare")


@pytest.fixture
def compare_folder(_compare: Path, tmp_path: Path) -> Path:
    """A compare folder of the test's own."""
    import shutil

    return Path(shutil.copytree(_compare, tmp_path / "compare"))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder of the test's own."""
    return make_run(tmp_path / "gkd-seed0")
