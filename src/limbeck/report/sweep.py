"""Variants of one method that differ in one number (`gkd:distill_weight=0.5`): what was measured, over that number."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.report.charts import Chart, Line, Style, line_chart
from limbeck.report.curves import UNITS
from limbeck.report.load import Report, Row
from limbeck.report.units import name
from limbeck.scoring import TRAINING_REWARD

LEAST = 3  # variants that make a curve


def sweep(rows: Sequence[Row]) -> tuple[str, list[tuple[float, Row]]] | None:
    """(the option, its values in order with their rows) where all rows are one method with the same changes but for one
    number; None for any other set of rows."""
    settings: list[dict[str, str]] = []
    for row in rows:
        method, _, changes = row.key.partition(":")
        pairs = [change.partition("=") for change in changes.split("+") if change]
        settings.append({"method": method, **{key: value for key, _, value in pairs}})
    if len(rows) < LEAST or any(setting.keys() != settings[0].keys() for setting in settings):
        return None
    differing = [key for key in settings[0] if len({setting[key] for setting in settings}) > 1]
    if len(differing) != 1:
        return None
    try:
        values = [float(setting[differing[0]]) for setting in settings]
    except ValueError:
        return None
    return differing[0], sorted(zip(values, rows, strict=True), key=lambda pair: pair[0])


def sweep_charts(report: Report) -> list[Chart]:
    """The main metric, sampled and greedy, with the reward of training where there is one; then the other metrics, a
    chart each. Bands: 95 % intervals. None where the methods are no sweep."""
    found = sweep(report.methods)
    if found is None or report.metric is None:
        return []
    option, points = found
    known = list(dict.fromkeys(key for _, row in points for key in row.metrics))
    first = [key for key in (report.metric, f"{report.metric}_greedy", TRAINING_REWARD) if key in known]
    charts: list[Chart] = []
    for keys in (first, *([key] for key in known if key not in first)):
        lines = [line for place, key in enumerate(keys) if (line := _line(key, points, place)) is not None]
        if lines:
            charts.append(line_chart(name(keys[0]), lines, x_label=option, unit=UNITS.get(keys[0], "")))
    return charts


def _line(key: str, points: Sequence[tuple[float, Row]], place: int) -> Line | None:
    known = [(value, estimate) for value, row in points if (estimate := row.metrics.get(key)) is not None]
    x = [value for value, estimate in known if estimate.mean is not None]
    y = [estimate.mean for _, estimate in known if estimate.mean is not None]
    if len(y) < LEAST:
        return None
    low = [estimate.low for _, estimate in known if estimate.low is not None]
    high = [estimate.high for _, estimate in known if estimate.high is not None]
    band = (low, high) if len(low) == len(high) == len(x) else None
    return Line(name(key), Style.of(place), x, y, band=band, points=True)
