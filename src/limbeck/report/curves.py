"""Curves out of a run's logs: the mean over the seeds of a method, smoothed where single steps are noisy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from limbeck.report.charts import Chart, Line, Style, line_chart, running_mean, thin
from limbeck.report.load import Group, Run, records
from limbeck.report.units import finite, name

MAIN = ("loss", "forward_kl", "reverse_kl", "agreement", "student_entropy", "completion_tokens")
MORE = (
    "divergence",
    "cross_entropy",
    "length_limit_share",
    "student_share",
    "rollout_kl",
    "padding_share",
    "tokens_per_s",
    "grad_norm",
    "learning_rate",
)
UNITS = {
    "loss": "nats a token",
    "forward_kl": "nats a token",
    "reverse_kl": "nats a token",
    "divergence": "nats a token",
    "cross_entropy": "nats a token",
    "student_entropy": "nats",
    "agreement": "share of tokens, top 1",
    "completion_tokens": "tokens, mean of a step",
    "length_limit_share": "share of completions",
    "student_share": "share of sequences",
    "rollout_kl": "nats a token",
    "padding_share": "share of what is computed",
    "tokens_per_s": "tokens/s",
    "eval_loss": "nats a token",
    "eval_forward_kl": "nats a token",
    "eval_reverse_kl": "nats a token",
}
MOST_PALE = 3  # with more methods the single steps would hide the curves
Styles = dict[str, Style]


def points(rows: Sequence[dict[str, Any]], key: str) -> tuple[dict[float, float], int]:
    """{step: value} of one log, the last line of a step winning, and how many values were no finite number."""
    found: dict[float, float] = {}
    lost = 0
    for row in rows:
        step, value = finite(row.get("step")), finite(row.get(key))
        if step is None or key not in row:
            continue
        if value is None:
            lost += row[key] is not None
        else:
            found[step] = value
    return found, lost


def over_seeds(logs: Sequence[dict[float, float]]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps, and at each the mean, lowest and highest value of the logs that have it."""
    steps = sorted({step for log in logs for step in log})
    columns = [[log[step] for log in logs if step in log] for step in steps]
    return steps, [float(np.mean(c)) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def training_charts(groups: Sequence[Group], styles: Styles, keys: Sequence[str]) -> list[Chart]:
    """A chart for each key that some run logged: bold the running mean, faint the single steps of a few runs."""
    charts: list[Chart] = []
    for key in keys:
        lines, lost = _lines(groups, styles, key, lambda run: run.metrics, smoothed=True)
        if lines:
            charts.append(line_chart(name(key), lines, unit=UNITS.get(key, ""), note=_lost(lost)))
    return charts


def evaluation_charts(groups: Sequence[Group], styles: Styles, first: str | None) -> list[Chart]:
    """A chart for each `eval_...` key, `first` the first: points, and a band from the lowest to the highest seed."""
    keys = list(dict.fromkeys(key for g in groups for run in g.runs for row in run.evaluations for key in row))
    keys.sort(key=lambda key: key != f"eval_{first}")
    charts: list[Chart] = []
    for key in keys:
        if not key.startswith("eval_"):
            continue
        lines, lost = _lines(groups, styles, key, lambda run: run.evaluations, smoothed=False)
        if lines:
            charts.append(line_chart(name(key), lines, unit=UNITS.get(key, ""), note=_lost(lost)))
    return charts


def _lines(
    groups: Sequence[Group], styles: Styles, key: str, log: Callable[[Run], list[dict[str, Any]]], *, smoothed: bool
) -> tuple[list[Line], int]:
    lines: list[Line] = []
    lost = 0
    pale = len(groups) <= MOST_PALE
    for group in groups:
        logs = [points(log(run), key) for run in group.runs]
        lost += sum(number for _, number in logs)
        steps, mean, low, high = over_seeds([found for found, _ in logs])
        if not steps:
            continue
        if smoothed:
            window = max(1, len(steps) // 20) | 1
            x, y, faint = thin(steps, running_mean(mean, window), mean)
            lines.append(Line(group.label, styles[group.key], x, y, faint=faint if pale and window > 1 else ()))
        else:
            x, y, low, high = thin(steps, mean, low, high)
            band = (low, high) if len(group.runs) > 1 else None
            lines.append(Line(group.label, styles[group.key], x, y, band=band, points=len(x) <= 30))
    return lines, lost


def _lost(number: int) -> str:
    return f"{number} values were not finite and are left out." if number else ""


def position_chart(groups: Sequence[Group], styles: Styles) -> Chart | None:
    """Forward KL over the position in the completion, seeds weighted by their tokens there."""
    lines: list[Line] = []
    for group in groups:
        sums: dict[float, tuple[float, float]] = {}
        for run in group.runs:
            for row in records(run.evaluation.get("divergence_by_position")):
                position, value = finite(row.get("position")), finite(row.get("forward_kl"))
                tokens = finite(row.get("tokens")) or 0.0
                if position is None or value is None or tokens <= 0:
                    continue
                total, weight = sums.get(position, (0.0, 0.0))
                sums[position] = (total + value * tokens, weight + tokens)
        if sums:
            order = sorted(sums)
            x, y = thin(order, [sums[position][0] / sums[position][1] for position in order])
            lines.append(Line(group.label, styles[group.key], x, y, points=len(x) <= 30))
    if not lines:
        return None
    return line_chart("Forward KL by position", lines, x_label="position in the completion", unit="nats a token")
