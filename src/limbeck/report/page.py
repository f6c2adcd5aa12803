"""`write_report`: one self-contained HTML file. Every view is a plain dict or list that page.html.j2 draws."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from limbeck.errors import DataError
from limbeck.report import units
from limbeck.report.answer import headline, main_dots, pair_views, results, seed_values, tiles
from limbeck.report.charts import START, TEACHER, Style
from limbeck.report.completions import cards, rollouts
from limbeck.report.curves import MAIN, MORE, Styles, evaluation_charts, position_chart, training_charts
from limbeck.report.load import Group, Report, load
from limbeck.report.sweep import sweep_charts
from limbeck.report.units import finite

CARDS = 24  # prompts on a page
OPEN = 3  # of which stand open
# One marker a colour, in a box of -6..6: shape tells methods apart where colour does not.
MARKERS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "M-3.7,-3.7h7.4v7.4h-7.4z",
    "M0,-4.8L4.8,3.7H-4.8z",
    "M0,-5.2L5.2,0L0,5.2L-5.2,0z",
    "M0,4.8L4.8,-3.7H-4.8z",
    "M-1.7,-5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
    "M-5.2,0L-2.6,-4.5H2.6L5.2,0L2.6,4.5H-2.6z",
    "M-4.6,0a4.6,4.6 0 1,0 9.2,0a4.6,4.6 0 1,0 -9.2,0zM-2.6,0a2.6,2.6 0 1,1 5.2,0a2.6,2.6 0 1,1 -5.2,0z",
)
MEASURES: dict[str, Callable[[float | None], str]] = {
    "parameters": units.count,
    "bytes": units.size,
    "peak_memory_bytes": units.size,
    "time_to_first_token_s": units.seconds,
    "tokens_per_s": units.significant,
}
PARTS = (("rollout_s", "Rollouts"), ("teacher_s", "Teacher"), ("student_s", "Student"))


def write_report(folder: Path | list[Path], out: Path | None = None) -> Path:
    """Write the report of a run folder, of several, or of a compare folder, and return its path.

    `out` is the HTML file, or a folder to put `report.html` into; by default the folder reported on, for several
    their common parent. What a folder lacks is left out of the page with a word why. Raises DataError where a folder
    is missing or holds nothing of a run.
    """
    folders = [Path(path) for path in (folder if isinstance(folder, list) else [folder])]
    report = load(folders)
    if out is None:
        out = Path(os.path.commonpath([path.resolve() for path in folders])) if len(folders) > 1 else folders[0]
    target = Path(out)
    if target.is_dir() or not target.suffix:
        target = target / "report.html"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate out of a broken escape cannot be written as UTF-8.
        target.write_text(render(report), encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(
            f"expected to write the report to {target}, found {error.strerror}; name another `out`"
        ) from error
    return target


def templates() -> jinja2.Environment:
    """The templates of this folder, by file name."""
    package = files("limbeck.report")
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda file: package.joinpath(file).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def render(report: Report) -> str:
    """The page as text."""
    package = files("limbeck.report")
    styles = styles_of(report)
    shown = cards(report.groups)
    return (
        templates()
        .get_template("page.html.j2")
        .render(
            report=report,
            styles=styles,
            markers=MARKERS,
            css=package.joinpath("style.css").read_text(encoding="utf-8"),
            script=package.joinpath("script.js").read_text(encoding="utf-8"),
            lead=headline(report),
            tiles=tiles(report),
            facts=facts(report),
            table=results(report),
            swept=sweep_charts(report),
            dots=main_dots(report, styles),
            pairs=pair_views(report),
            every_seed=seed_values(report),
            models=models(report),
            training=training_charts(report.groups, styles, MAIN),
            more=training_charts(report.groups, styles, MORE),
            evaluations=evaluation_charts(report.groups, styles, report.metric),
            position=position_chart(report.groups, styles),
            times=times(report.groups),
            cards=shown[:CARDS],
            all_cards=len(shown),
            open_cards=OPEN,
            rollouts=rollouts(report.groups),
            recipes=recipes(report),
            environment=machine(report.groups),
            units=units,
        )
    )


def styles_of(report: Report) -> Styles:
    """One look a row and group for the whole page."""
    keys = dict.fromkeys([*(row.key for row in report.methods), *(group.key for group in report.groups)])
    styles = {key: Style.of(place) for place, key in enumerate(keys)}
    for row in report.rows:
        if row.kind != "method":
            styles[row.key] = TEACHER if row.kind == "teacher" else START
    return styles


def facts(report: Report) -> list[str]:
    """The line under the title: what was run, when, on what."""
    found: list[str] = []
    if len(report.groups) == 1 and not report.compared:
        found.append(report.groups[0].runs[0].name)
    if report.budget:
        found.append(f"{report.budget} a method")
    if report.seeds:
        found.append(f"{len(report.seeds)} training seed{'s' if len(report.seeds) > 1 else ''}")
    environments = [run.environment for group in report.groups for run in group.runs if run.environment]
    cpus = list(dict.fromkeys(f"{e.get('gpu') or e.get('cpu')}, {e.get('cores')} cores" for e in environments))
    if cpus:
        found.append(cpus[0] if len(cpus) == 1 else f"{len(cpus)} different machines")
    dates = sorted(str(e["date"])[:10] for e in environments if e.get("date"))
    if dates:
        found.append(dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}")
    return found


def models(report: Report) -> list[dict[str, Any]]:
    """Size and speed of each teacher and student, mean over its runs; a student's with the ratio to its teacher's."""
    teachers: dict[str, list[dict[str, Any]]] = {}
    for entry in (entry for group in report.groups for entry in _measured(group, "teacher")):
        teachers.setdefault(str(entry.get("name") or ""), []).append(entry)
    means = {name: _mean_model(entries) for name, entries in teachers.items()}
    rows = [_model_row("Teacher", None, name, mean, None) for name, mean in means.items()]
    for group in report.groups:
        students = _measured(group, "student")
        if students:
            own = next((str(entry.get("name") or "") for entry in _measured(group, "teacher")), None)
            base = None if own is None else means[own]
            rows.append(
                _model_row(group.label, group.key, str(students[0].get("name") or ""), _mean_model(students), base)
            )
    return rows


def _measured(group: Group, part: str) -> list[dict[str, Any]]:
    found = [run.evaluation.get("models") for run in group.runs]
    return [entry[part] for entry in found if isinstance(entry, dict) and isinstance(entry.get(part), dict)]


def _mean_model(entries: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    mean: dict[str, float | None] = {}
    for key in MEASURES:
        numbers = [number for entry in entries if (number := finite(entry.get(key))) is not None]
        mean[key] = sum(numbers) / len(numbers) if numbers else None
    return mean


def _model_row(
    label: str, key: str | None, name: str, mean: dict[str, float | None], base: dict[str, float | None] | None
) -> dict[str, Any]:
    cells = [
        {"text": show(mean[measure]), "ratio": units.ratio(mean[measure], base[measure]) if base else None}
        for measure, show in MEASURES.items()
    ]
    return {"label": label, "key": key, "name": name, "cells": cells}


def times(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Seconds of a run (mean over a method's runs) split by what they went to; bars in percent of the longest."""
    rows: list[dict[str, Any]] = []
    for group in groups:
        split = {key: 0.0 for key, _ in PARTS}
        totals: list[float] = []
        runs = [run for run in group.runs if any(key in row for row in run.metrics for key, _ in PARTS)]
        for run in runs:
            for key, _ in PARTS:
                split[key] += sum(finite(row.get(key)) or 0.0 for row in run.metrics) / len(runs)
            totals.append(finite(run.evaluation.get("seconds")) or 0.0)
        if not runs or not sum(split.values()):
            continue
        parts = [(name, split[key]) for key, name in PARTS if split[key] > 0]
        rest = sum(totals) / len(totals) - sum(split.values())
        if rest > 0.01 * sum(split.values()):
            parts.append(("Other", rest))
        rows.append({"label": group.label, "key": group.key, "parts": parts, "total": sum(value for _, value in parts)})
    longest = max((row["total"] for row in rows), default=1.0)
    for row in rows:
        row["parts"] = [
            {
                "name": name,
                "width": 100 * value / longest,
                "seconds": units.seconds(value),
                "share": f"{100 * value / row['total']:.0f} %",
            }
            for name, value in row["parts"]
        ]
        row["total"] = units.seconds(row["total"])
    return rows


def recipes(report: Report) -> list[dict[str, str]]:
    """The recipe of each method (its first run's)."""
    rows = {row.key: row for row in report.rows}
    found: list[dict[str, str]] = []
    for group in report.groups:
        run = next((run for run in group.runs if run.recipe), None)
        if run is None:
            continue
        row = rows.get(group.key)
        path = (row.recipe if row else None) or f"{run.name}/recipe.yaml"
        found.append({"key": group.key, "label": group.label, "path": path, "text": run.recipe})
    return found


def machine(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Each key of environment.json with the values that the runs have, most often one."""
    runs = [run for group in groups for run in group.runs if run.environment]
    keys = dict.fromkeys(key for run in runs for key in run.environment)
    rows: list[tuple[str, list[str]]] = []
    for key in keys:
        values: dict[str, list[str]] = {}
        for run in runs:
            value = run.environment.get(key)
            if value is not None:
                text = units.size(finite(value)) if key == "memory_bytes" else str(value)
                values.setdefault(text, []).append(run.name)
        if len(values) == 1:
            rows.append((key.removesuffix("_bytes"), list(values)))
        elif values:
            rows.append((key, [f"{text} ({', '.join(names)})" for text, names in values.items()]))
    return rows
