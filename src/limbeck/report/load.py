"""Run folders and compare folders, read as far as they go: what is missing or broken becomes a note, never a crash."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from limbeck.errors import DataError
from limbeck.report.units import finite

RUN_FILES = ("recipe.yaml", "metrics.jsonl", "evaluation.json", "environment.json", "evaluations.jsonl")
Kind = Literal["teacher", "start", "method"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval and the values (one a seed) behind it; None where not finite or not known."""

    mean: float | None
    low: float | None = None
    high: float | None = None
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: the teacher, the student at the start, or a method."""

    key: str
    label: str
    kind: Kind
    metrics: dict[str, Estimate]
    recipe: str | None = None
    seconds: float | None = None
    steps: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Row `a` less row `b` in `metric`, paired; `verdict` is a's: better, worse, or no clear difference."""

    a: str
    b: str
    metric: str
    difference: float | None
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Run:
    """One run folder. Files that were missing are empty here."""

    folder: Path
    name: str
    method: str
    label: str
    recipe: str
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    evaluation: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Group:
    """The runs of one method (one a training seed), or one run of its own."""

    key: str
    label: str
    runs: list[Run]


@dataclass(frozen=True, slots=True)
class Report:
    """All that a page shows. `metric` is the main one, None where nothing was evaluated."""

    title: str
    metric: str | None
    rows: list[Row]
    groups: list[Group]
    pairs: list[Pair] = field(default_factory=list[Pair])
    budget: str = ""
    seeds: tuple[int, ...] = ()
    command: str = ""
    notes: list[str] = field(default_factory=list[str])
    compared: bool = False

    @property
    def methods(self) -> list[Row]:
        return [row for row in self.rows if row.kind == "method"]


def load(folders: list[Path]) -> Report:
    """A compare folder, a run folder, or several run folders side by side (a compare folder among them gives its runs).

    Raises DataError where a folder is missing or holds nothing of a run.
    """
    notes: list[str] = []
    if len(folders) == 1 and (folders[0] / "comparison.json").exists():
        table = _object(folders[0] / "comparison.json", notes)
        if table:
            return _comparison(folders[0], table, notes)
    runs = [_run(folder, notes) for given in folders for folder in _run_folders(given)]
    if not runs:
        raise DataError("expected at least one run folder, found none; name the folder that `output` of a recipe names")
    return _side_by_side(runs, notes)


def _run_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(
            f"expected a run folder at {folder}, found none; name the folder that `output` of a recipe names"
        )
    if any((folder / file).exists() for file in RUN_FILES):
        return [folder]
    if (folder / "runs").is_dir():
        return _subfolders(folder / "runs")
    raise DataError(
        f"expected one of {', '.join(RUN_FILES)} in {folder}, found none; name a run folder or a compare folder"
    )


def _subfolders(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if path.is_dir()), key=_natural) if folder.is_dir() else []


def _without_seed(path: Path) -> str:
    """A cell's folder holds its variant in letters that a file system takes, and its seed."""
    return re.sub(r"-seed\d+$", "", path.name)


def _natural(path: Path) -> list[str | int]:
    """Sorts seed10 after seed9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        notes.append(f"{path.parent.name}/{path.name} is not JSON ({error}) and was left out.")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.parent.name}/{path.name} holds no JSON object and was left out.")
        return {}
    return value


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number == last:
            notes.append(f"The last line of {path.parent.name}/{path.name} is half-written and was left out.")
        else:
            notes.append(f"Line {number} of {path.parent.name}/{path.name} is no JSON object and was left out.")
    return rows


def _run(folder: Path, notes: list[str]) -> Run:
    recipe_file = folder / "recipe.yaml"
    recipe = recipe_file.read_text(encoding="utf-8", errors="replace") if recipe_file.exists() else ""
    evaluation = _object(folder / "evaluation.json", notes)
    name = folder.resolve().name
    method = str(evaluation.get("method") or _recipe_method(recipe) or _without_seed(folder.resolve()))
    return Run(
        folder=folder,
        name=name,
        method=method,
        label=str(evaluation.get("label") or method),
        recipe=recipe,
        environment=_object(folder / "environment.json", notes),
        metrics=_lines(folder / "metrics.jsonl", notes),
        evaluations=_lines(folder / "evaluations.jsonl", notes),
        samples=_lines(folder / "samples.jsonl", notes),
        evaluation=evaluation,
    )


def _recipe_method(recipe: str) -> str | None:
    try:
        keys = yaml.safe_load(recipe)
    except yaml.YAMLError:
        return None
    return keys.get("method") if isinstance(keys, dict) else None


def records(value: object) -> list[dict[str, Any]]:
    """The objects in a list that was read from JSON; none where it is no list."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def estimates(metrics: object) -> dict[str, Estimate]:
    """`metrics` of an evaluation or a table row; a plain number is a mean without interval."""
    if not isinstance(metrics, dict):
        return {}
    found: dict[str, Estimate] = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            listed = value.get("values")
            items = listed if isinstance(listed, list) else []
            values = tuple(number for item in items if (number := finite(item)) is not None)
            found[key] = Estimate(*(finite(value.get(part)) for part in ("mean", "low", "high")), values=values)
        elif value is None or isinstance(value, (int, float)):
            found[key] = Estimate(finite(value))
    return found


def _comparison(folder: Path, table: dict[str, Any], notes: list[str]) -> Report:
    rows = [_table_row(entry) for entry in records(table.get("table"))]
    keys_of = {_without_seed(Path(row.recipe).parent): row.key for row in rows if row.recipe}
    runs: dict[str, list[Run]] = {}
    for path in _subfolders(folder / "runs"):
        runs.setdefault(keys_of.get(_without_seed(path), _without_seed(path)), []).append(_run(path, notes))
    labels = {row.key: row.label for row in rows}
    known = [row.key for row in rows if row.kind == "method"]
    keys = [key for key in known if key in runs] + [key for key in runs if key not in labels]
    pairs = [
        Pair(
            a=str(pair.get("a")),
            b=str(pair.get("b")),
            metric=str(pair.get("metric")),
            difference=finite(pair.get("difference")),
            low=finite(pair.get("low")),
            high=finite(pair.get("high")),
            verdict=str(pair.get("verdict")),
        )
        for pair in records(table.get("pairs"))
    ]
    seeds = table.get("seeds")
    return Report(
        title=str(table.get("title") or folder.resolve().name),
        metric=str(table["metric"]) if table.get("metric") else main_metric(rows),
        rows=rows,
        groups=[Group(key, labels.get(key, runs[key][0].label), runs[key]) for key in keys],
        pairs=pairs,
        budget=_budget(table.get("budget")),
        seeds=tuple(seed for seed in seeds if isinstance(seed, int)) if isinstance(seeds, list) else (),
        command=str(table.get("command") or ""),
        notes=notes,
        compared=True,
    )


def _budget(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{number} {unit}" for unit, number in value.items())
    return "" if value is None else str(value)


def _table_row(entry: dict[str, Any]) -> Row:
    key = str(entry.get("method"))
    return Row(
        key=key,
        label=str(entry.get("label") or key),
        kind="teacher" if key == "teacher" else "start" if key == "start" else "method",
        metrics=estimates(entry.get("metrics")),
        recipe=str(entry["recipe"]) if entry.get("recipe") else None,
        seconds=finite(entry.get("seconds")),
        steps=finite(entry.get("steps")),
    )


def main_metric(rows: list[Row]) -> str | None:
    """`accuracy`, else the first metric that is a task's own, else the first."""
    keys = list(dict.fromkeys(key for row in rows for key in row.metrics))
    own = [key for key in keys if not key.endswith("_greedy") and key not in ("forward_kl", "reverse_kl")]
    return "accuracy" if "accuracy" in keys else next(iter(own + keys), None)


def _side_by_side(runs: list[Run], notes: list[str]) -> Report:
    groups: list[Group] = []
    for number, run in enumerate(runs):
        shared = sum(other.label == run.label for other in runs) > 1
        groups.append(Group(f"run{number}", f"{run.label} ({run.name})" if shared else run.label, [run]))
    rows: list[Row] = []
    shared_rows: tuple[tuple[Kind, str, str], ...] = (
        ("teacher", "teacher_metrics", "Teacher"),
        ("start", "before", "Start"),
    )
    for kind, part, label in shared_rows:
        seen: list[dict[str, Estimate]] = []
        for group in groups:
            metrics = estimates(group.runs[0].evaluation.get(part))
            if metrics and metrics not in seen:
                seen.append(metrics)
                own = f"{label} of {group.label}" if len(seen) > 1 else label
                rows.append(Row(f"{kind}{len(seen)}", own, kind, metrics))
    for group in groups:
        run = group.runs[0]
        rows.append(
            Row(
                key=group.key,
                label=group.label,
                kind="method",
                metrics=estimates(run.evaluation.get("metrics")),
                recipe=f"{run.name}/recipe.yaml" if run.recipe else None,
                seconds=finite(run.evaluation.get("seconds")),
                steps=finite(run.evaluation.get("steps"))
                or finite(max((_step(row) for row in run.metrics), default=None)),
            )
        )
    title = groups[0].label if len(groups) == 1 else " · ".join(group.label for group in groups)
    commands = {str(run.environment["command"]) for run in runs if run.environment.get("command")}
    return Report(
        title=title,
        metric=main_metric(rows),
        rows=rows,
        groups=groups,
        command=commands.pop() if len(commands) == 1 else "",
        notes=notes,
    )


def _step(row: dict[str, Any]) -> float:
    return finite(row.get("step")) or 0.0
