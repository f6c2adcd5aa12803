"""The answer that stands first: who is best, by how much, and whether that is clear."""

from __future__ import annotations

from typing import Any

from limbeck.report import units
from limbeck.report.charts import Dots, Style, dot_chart
from limbeck.report.load import Estimate, Pair, Report, Row
from limbeck.report.units import finite
from limbeck.scoring import lower_is_better

CLEAR = ("better", "worse")


def places_of(report: Report, key: str) -> int:
    """Decimals of one metric, the same on the whole page."""
    found = [row.metrics[key] for row in report.rows if key in row.metrics]
    return units.decimals((e.high - e.low) / 2 for e in found if e.low is not None and e.high is not None)


def interval(estimate: Estimate | None, places: int) -> dict[str, str]:
    """The texts of a cell: the mean, and its interval in brackets where there is one."""
    if estimate is None or estimate.mean is None:
        return {"mean": units.DASH, "interval": ""}
    bounds = ""
    if estimate.low is not None and estimate.high is not None:
        bounds = f"[{units.fixed(estimate.low, places)}, {units.fixed(estimate.high, places)}]"
    return {"mean": units.fixed(estimate.mean, places), "interval": bounds}


def results(report: Report) -> dict[str, Any]:
    """The table: a column a metric (the main one first), then seconds and steps."""
    present = list(dict.fromkeys(key for row in report.rows for key in row.metrics))
    first = [report.metric, f"{report.metric}_greedy", "forward_kl", "reverse_kl"]
    keys = [key for key in first if key in present] + [key for key in present if key not in first]
    columns: list[dict[str, str]] = []
    for key in keys:
        title = units.name(key)
        if f"{key}_greedy" in present:
            title = f"{title}, sampled"
        unit = "nats a token" if key.endswith("_kl") else ""
        columns.append({"title": title, "unit": unit})
    rows: list[dict[str, Any]] = []
    for row in report.rows:
        cells = [interval(row.metrics.get(key), places_of(report, key)) for key in keys]
        time = f"{units.significant(row.seconds)}" if row.seconds is not None else units.DASH
        steps = f"{row.steps:,.0f}".replace(",", "\u202f") if row.steps is not None else units.DASH
        rows.append({"row": row, "cells": cells, "seconds": time, "steps": steps})
    return {"columns": columns, "rows": rows}


def seed_values(report: Report) -> list[dict[str, str]]:
    """The values behind each mean, where there are several."""
    lines: list[dict[str, str]] = []
    for row in report.rows:
        for key, estimate in row.metrics.items():
            if len(estimate.values) > 1:
                texts = [units.fixed(value, places_of(report, key)) for value in estimate.values]
                lines.append({"label": row.label, "metric": units.name(key), "values": ", ".join(texts)})
    return lines


def main_dots(report: Report, styles: dict[str, Style]) -> Dots | None:
    """The main metric of every row, with its interval and seeds, beside a line at the teacher's."""
    if report.metric is None:
        return None
    places = places_of(report, report.metric)
    rows: list[tuple[dict[str, Any], Estimate]] = []
    teacher: float | None = None
    for row in report.rows:
        estimate = row.metrics.get(report.metric)
        if estimate is None or estimate.mean is None:
            continue
        if row.kind == "teacher" and teacher is None:
            teacher = estimate.mean
        rows.append(({"label": row.label, "style": styles[row.key], **interval(estimate, places)}, estimate))
        rows[-1][0]["text"] = rows[-1][0].pop("mean")
    return dot_chart(rows, reference=teacher) if rows else None


def sentence(pair: Pair, labels: dict[str, str]) -> str:
    """The verdict in words."""
    a, b = labels.get(pair.a, pair.a), labels.get(pair.b, pair.b)
    if pair.verdict not in CLEAR:
        return "no clear difference"
    return f"{a} is {pair.verdict} than {b}"


def pair_views(report: Report) -> list[dict[str, Any]]:
    """Paired differences, one chart a metric, the main metric's first."""
    labels = {row.key: row.label for row in report.rows}
    metrics = sorted(dict.fromkeys(pair.metric for pair in report.pairs), key=lambda key: key != report.metric)
    views: list[dict[str, Any]] = []
    for metric in metrics:
        pairs = [pair for pair in report.pairs if pair.metric == metric and pair.difference is not None]
        if not pairs:
            continue
        spreads = [(p.high - p.low) / 2 for p in pairs if p.low is not None and p.high is not None]
        places = units.decimals(spreads)
        rows: list[tuple[dict[str, Any], Estimate]] = []
        for pair in pairs:
            bounds = ""
            if pair.low is not None and pair.high is not None:
                bounds = f"[{units.fixed(pair.low, places, sign=True)}, {units.fixed(pair.high, places, sign=True)}]"
            text = {
                "a": labels.get(pair.a, pair.a),
                "b": labels.get(pair.b, pair.b),
                "text": units.fixed(pair.difference, places, sign=True),
                "interval": bounds,
                "verdict": sentence(pair, labels),
                "decided": pair.verdict in CLEAR,
            }
            rows.append((text, Estimate(pair.difference, pair.low, pair.high)))
        better = "lower is better" if lower_is_better(metric) else "higher is better"
        views.append({"metric": units.name(metric), "better": better, "dots": dot_chart(rows, zero=True)})
    return views


def _best(report: Report) -> Row | None:
    metric = report.metric
    scored = [(row.metrics[metric].mean, row) for row in report.methods if metric and metric in row.metrics]
    known = [(mean, row) for mean, row in scored if mean is not None]
    if not known or metric is None:
        return None
    choose = min if lower_is_better(metric) else max
    return choose(known, key=lambda item: item[0])[1]


def _short(report: Report, kind: str) -> str | None:
    """The main metric's mean of the teacher or the start, as text."""
    for row in report.rows:
        estimate = row.metrics.get(report.metric or "")
        if row.kind == kind and estimate is not None and estimate.mean is not None:
            return units.fixed(estimate.mean, places_of(report, report.metric or ""))
    return None


def headline(report: Report) -> dict[str, str]:
    """One sentence with the result, and one on how clear it is."""
    best = _best(report)
    if best is None or report.metric is None:
        missing = (
            "comparison.json has no table" if report.compared else "there is no final evaluation (evaluation.json)"
        )
        return {"first": f"Nothing was scored: {missing}.", "second": "The curves below are all there is so far."}
    cell = interval(best.metrics[report.metric], places_of(report, report.metric))
    score = f"{cell['mean']} {cell['interval']}".strip()
    metric = units.name(report.metric)
    if metric[1:2].islower():
        metric = metric[0].lower() + metric[1:]
    teacher, start = _short(report, "teacher"), _short(report, "start")
    if len(report.methods) == 1:
        way = f"takes {metric} from {start} to {score}" if start else f"reaches {metric} {score}"
        second = f"The teacher has {teacher}." if teacher else "No teacher was evaluated beside it."
        return {"first": f"{best.label} {way}.", "second": second}
    others = [f"teacher {teacher}" if teacher else "", f"start {start}" if start else ""]
    beside = ", ".join(text for text in others if text)
    extreme = "lowest" if lower_is_better(report.metric) else "highest"
    first = f"{best.label} has the {extreme} {metric}: {score}{f' ({beside})' if beside else ''}."
    return {"first": first, "second": _clarity(report, best)}


def _clarity(report: Report, best: Row) -> str:
    """Against whom the best row's lead is clear, by the paired verdicts."""
    labels = {row.key: row.label for row in report.methods}
    ahead: dict[str, list[str]] = {"better": [], "worse": [], "": []}
    opposite = {"better": "worse", "worse": "better"}
    for pair in report.pairs:
        if pair.metric != report.metric or best.key not in (pair.a, pair.b):
            continue
        other = pair.b if pair.a == best.key else pair.a
        verdict = pair.verdict if pair.a == best.key else opposite.get(pair.verdict, "")
        if other in labels:
            ahead[verdict if verdict in CLEAR else ""].append(labels[other])
    if not any(ahead.values()):
        return "Its lead was not tested: there is no paired comparison."
    if not ahead["better"] and not ahead["worse"]:
        return f"There is no clear difference to {_listed(ahead[''])}."
    parts = [f"clearly {verdict} than {_listed(ahead[verdict])}" for verdict in CLEAR if ahead[verdict]]
    text = f"It is {' and '.join(parts)}, pair by pair"
    return f"{text}; there is no clear difference to {_listed(ahead[''])}." if ahead[""] else f"{text}."


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def tiles(report: Report) -> list[dict[str, str]]:
    """Key figures of the best student (else the first) beside its teacher."""
    best = _best(report)
    groups = [group for group in report.groups if best is None or group.key == best.key] or report.groups
    entry = next(
        (run.evaluation.get("models") for group in groups for run in group.runs if run.evaluation.get("models")), None
    )
    if not isinstance(entry, dict) or not isinstance(entry.get("student"), dict):
        return []
    student, teacher = entry["student"], entry.get("teacher") if isinstance(entry.get("teacher"), dict) else {}
    found: list[dict[str, str]] = []

    def tile(key: str, show: Any, title: str, less: str, more: str) -> None:
        own, base = finite(student.get(key)), finite((teacher or {}).get(key))
        if own is None:
            return
        if base and own:
            factor = max(own / base, base / own)
            alike = factor < 1.05
            words = f"the same {title}" if alike else f"{less if own < base else more} {title}"
            big = "1×" if alike else f"{units.significant(factor, 2)}×"
            found.append({"big": big, "title": words, "small": f"{show(own)}, teacher {show(base)}"})
        else:
            found.append({"big": show(own), "title": title, "small": "no teacher beside it"})

    tile("parameters", units.count, "parameters", "fewer", "more")
    tile("tokens_per_s", lambda v: f"{units.significant(v)} tokens/s", "generation", "slower", "faster")
    tile("time_to_first_token_s", units.seconds, "wait for the first token", "shorter", "longer")
    return found
