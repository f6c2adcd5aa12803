"""compare(): several methods from one start under one budget, over training seeds; one table, one report."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import sys
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from limbeck import ranks
from limbeck.errors import RecipeError, did_you_mean
from limbeck.evaluation import EX_ACC_ERR, HELD_OUT, mean_interval, paired_difference
from limbeck.methods import METHODS
from limbeck.pipeline.distilling import Run, distill, finished, start_stage, write_json
from limbeck.pipeline.limit import Limit
from limbeck.pipeline.table import print_comparison
from limbeck.recipe import RECIPES, Recipe
from limbeck.report import environment, sweep_figure, write_report
from limbeck.scoring import TRAINING_REWARD, lower_is_better, reward_name
from limbeck.settings import apply_overrides

CSV_COLUMNS = ("study", "method", "seed", "metric", "value", "seconds", "command", "commit")


def compare(
    recipe: Recipe | str | Path,
    *,
    methods: list[str],
    limit: Limit | None = None,
    seeds: list[int] | None = None,
    name: str = "compare",
    console: Console | None = None,
) -> Path:
    """Trains every method with every seed from that seed's start, evaluates alike, and writes comparison.json,
    results.csv and report.html into the recipe's `output`, which is returned; and sweep.svg where the methods are one
    method with different values of one number.

    A method may carry changes of its recipe, `minillm:length_norm=false+teacher_mix=0`: an ablation, or a sweep.

    The start is the recipe's `init` (an SFT stage, one a seed, shared by the methods) or the student as it is. A cell
    whose recipe and limit are unchanged is not run again. Raises LimbeckError before anything is trained.
    """
    ranks.one_process("compare")
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, [])
    limit, seeds, console = limit or Limit(), seeds or [recipe.seed], console or Console()
    for method in (variant.partition(":")[0] for variant in methods):
        if method not in RECIPES:
            raise RecipeError(
                f"--methods: expected some of {', '.join(RECIPES)}; found {method!r}{did_you_mean(method, RECIPES)}"
            )
    folder = Path(recipe.output)
    cells = {(method, seed): _cell(recipe, method, seed, limit, folder) for seed in seeds for method in methods}
    runs: dict[tuple[str, int], Run] = {}
    for (method, seed), cell in cells.items():
        if recipe.init is not None:
            cell = cell.started_from(_start(recipe, seed, folder).student_path)
        runs[method, seed] = _with_training_reward(_run_cell(cell, limit, folder, console), cell)
    comparison = _comparison(recipe, methods, seeds, limit, runs, folder)
    write_json(folder / "comparison.json", comparison)
    _write_csv(folder / "results.csv", name, comparison, runs)
    report = write_report(folder)
    picture = sweep_figure(folder)
    if picture is not None:
        (folder / "sweep.svg").write_text(picture, encoding="utf-8")
    print_comparison(comparison, console)
    console.print(f"\nreport   {report}\nnumbers  {folder / 'results.csv'}", soft_wrap=True)
    return folder


def _cell(recipe: Recipe, variant: str, seed: int, limit: Limit, folder: Path) -> Recipe:
    method, _, changes = variant.partition(":")
    place = re.sub(r"[^\w.=+-]", "_", variant)
    cell = recipe.with_method(
        method, seed=seed, training=limit.training(), output=str(folder / "runs" / f"{place}-seed{seed}"), init=None
    )
    settings = {**cell.model_dump(exclude_unset=True), "method": method}
    return Recipe.parse(apply_overrides(settings, changes.split("+")), where=variant) if changes else cell


def _labels(variants: list[str]) -> tuple[dict[str, str], list[str]]:
    """({variant: its name in the table}, the changes that all have, which are left out of the names)."""
    changes_of = {variant: [part for part in variant.partition(":")[2].split("+") if part] for variant in variants}
    common = [part for part in changes_of[variants[0]] if all(part in changes for changes in changes_of.values())]
    common = common if len(variants) > 1 else []
    labels = {
        variant: ", ".join(
            [METHODS[variant.partition(":")[0]].label, *(part for part in changes if part not in common)]
        )
        for variant, changes in changes_of.items()
    }
    return labels, common


def _start(recipe: Recipe, seed: int, folder: Path) -> Run:
    stage = start_stage(recipe, seed, folder / f"start-seed{seed}")
    done = finished(folder / f"start-seed{seed}", stage)
    if done is None:
        shutil.rmtree(folder / f"start-seed{seed}", ignore_errors=True)
        done = distill(stage, report=False)
    return done


def _run_cell(cell: Recipe, limit: Limit, folder: Path, console: Console) -> Run:
    place = Path(cell.output)
    mark = place / "limit.json"
    done = finished(place, cell)
    if done is not None and mark.exists() and json.loads(mark.read_text()) == asdict(limit):
        console.print(f"{place.name}: done before")
        return done
    shutil.rmtree(place, ignore_errors=True)
    run = distill(cell, limit=limit, memo=folder / "evaluations", report=False)
    write_json(mark, asdict(limit))
    return run


def _with_training_reward(run: Run, cell: Recipe) -> Run:
    """The run with TRAINING_REWARD among its metrics, where its recipe has a reward."""
    if getattr(cell, "reward", None) is None:
        return run
    steps = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rewards = [step["reward"] for step in steps if "reward" in step]
    if not rewards:  # the student wrote nothing
        return run
    last = float(np.mean(rewards[-max(1, len(rewards) // 10) :]))
    metrics = {**run.metrics["metrics"], TRAINING_REWARD: asdict(mean_interval(np.array([last])))}
    per_prompt = {**run.metrics["per_prompt"], TRAINING_REWARD: [last]}
    return replace(run, metrics={**run.metrics, "metrics": metrics, "per_prompt": per_prompt})


def _comparison(
    recipe: Recipe, methods: list[str], seeds: list[int], limit: Limit, runs: dict[tuple[str, int], Run], folder: Path
) -> dict[str, Any]:
    first = runs[methods[0], seeds[0]].metrics
    named = [reward_name(metric) for metric in recipe.evaluation.metrics]
    metric = named[0] if named else "forward_kl" if recipe.teacher else "loss"
    rows = [{"method": "teacher", "label": "Teacher", "metrics": first["teacher_metrics"]}] if recipe.teacher else []
    starts = [runs[methods[0], seed].metrics for seed in seeds]
    labels, common = _labels(methods)
    rows.append({"method": "start", "label": "Start", "metrics": _over_seeds(starts, "before")})
    for method in methods:
        own = [runs[method, seed].metrics for seed in seeds]
        rows.append(
            {
                "method": method,
                "label": labels[method],
                "recipe": str((runs[method, seeds[0]].folder / "recipe.yaml").relative_to(folder)),
                "metrics": _over_seeds(own, "metrics"),
                "seconds": float(np.mean([run["seconds"] for run in own])),
                "steps": float(np.mean([run["steps"] for run in own])),
            }
        )
    compared = dict.fromkeys([metric, f"{metric}_greedy", TRAINING_REWARD, EX_ACC_ERR, "forward_kl", "loss"])
    compared = [name for name in compared if all(name in run.metrics["per_prompt"] for run in runs.values())]
    pairs = [_pair(a, b, name, seeds, runs) for name in compared for b, a in combinations(methods, 2)]
    return {
        "title": f"{', '.join(labels.values())} from one start" + (f"; all with {', '.join(common)}" if common else ""),
        "budget": str(limit),
        "seeds": seeds,
        "command": shlex.join(["limbeck", *sys.argv[1:]]),
        "metric": metric,
        "table": rows,
        "pairs": pairs,
        "environment": environment(shlex.join(["limbeck", *sys.argv[1:]]), seeds[0]),
    }


def _over_seeds(runs: list[dict[str, Any]], part: str) -> dict[str, Any]:
    """One interval a metric: over training seeds where there are enough, else the one over prompts."""
    per_prompt = "per_prompt" if part == "metrics" else "before_per_prompt"
    if len(runs) == 1:
        return runs[0][part]
    table: dict[str, Any] = {}
    for name in runs[0][part]:
        values_SP = np.array([run[per_prompt][name] for run in runs])
        table[name] = asdict(mean_interval(values_SP, seeds="training", weights=_weights(runs[0], per_prompt, name)))
    return table


def _pair(a: str, b: str, name: str, seeds: list[int], runs: dict[tuple[str, int], Run]) -> dict[str, Any]:
    values = [np.array([runs[method, seed].metrics["per_prompt"][name] for seed in seeds]) for method in (a, b)]
    weights = _weights(runs[a, seeds[0]].metrics, "per_prompt", name)
    difference = paired_difference(
        values[0], values[1], seeds="training", weights=weights, lower_is_better=lower_is_better(name)
    )
    return {"a": a, "b": b, "metric": name, **asdict(difference)}


def _weights(run: dict[str, Any], per_prompt: str, name: str) -> np.ndarray | None:
    """Held-out numbers are means over tokens; a task's metric is a mean over prompts."""
    tokens = run[per_prompt].get("tokens")
    return np.array(tokens) if name in HELD_OUT and tokens is not None else None


def _write_csv(path: Path, name: str, comparison: dict[str, Any], runs: dict[tuple[str, int], Run]) -> None:
    """One line a method, training seed and metric, the teacher as `teacher`."""
    shared = (comparison["command"], comparison["environment"]["commit"] or "")
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(CSV_COLUMNS)
        for method in ("teacher", "start"):
            for (_, seed), run in list(runs.items())[: 1 if method == "teacher" else None]:
                part = run.metrics["teacher_metrics" if method == "teacher" else "before"]
                if method == "start" and run is not next(r for (_, s), r in runs.items() if s == seed):
                    continue
                for metric, value in part.items():
                    out.writerow([name, method, "" if method == "teacher" else seed, metric, value["mean"], 0, *shared])
        for (method, seed), run in runs.items():
            for metric, value in run.metrics["metrics"].items():
                out.writerow([name, method, seed, metric, value["mean"], f"{run.metrics['seconds']:.1f}", *shared])
