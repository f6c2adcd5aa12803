"""Pictures that stand for themselves: a chart as an SVG file, which needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.report.charts import START, Chart, Line, Style, line_chart
from limbeck.report.load import load
from limbeck.report.page import MARKERS, templates
from limbeck.report.sweep import sweep_charts
from limbeck.report.units import fixed


def reliability_figure(title: str, calibration: Mapping[str, Any]) -> str:
    """A reliability diagram (Guo et al. 2017) as SVG: accuracy over confidence, a point a bin, beside the diagonal of
    perfect calibration, and the share of the predictions in each bin. `calibration`: the fields of a `Calibration`."""
    bins = calibration["bins"]
    steps_x = [edge for one in bins for edge in (one["low"], one["high"])]
    shares = [one["count"] / calibration["count"] for one in bins for _ in range(2)]
    lines = [
        Line("perfect", Style(START.colour, START.marker, dashed=True), [0.0, 1.0], [0.0, 1.0]),
        Line("share of predictions", Style.of(2), steps_x, shares),
        Line("accuracy", Style.of(0), [b["confidence"] for b in bins], [b["accuracy"] for b in bins], points=True),
    ]
    note = f"ECE {fixed(calibration['ece'], 3)} over {calibration['count']:,} predictions in bins of equal width"
    return figure(line_chart(title, lines, x_label="confidence", unit="fraction", note=note))


def exposure_figure(title: str, exposure: Mapping[str, Any]) -> str:
    """ExAccErr over the length as SVG, with its 95 % interval. `exposure`: the fields of an `Exposure`."""
    lengths = list(range(1, len(exposure["percent"]) + 1))
    band = None if exposure["low"] is None else (exposure["low"], exposure["high"])
    line = Line("ExAccErr", Style.of(0), lengths, exposure["percent"], band=band)
    note = f"{exposure['prompts'][0]} prompts, {exposure['prompts'][-1]} of them at the end; band: 95 % interval"
    return figure(line_chart(title, [line], x_label="length, tokens", unit="percent", note=note))


def sweep_figure(folder: Path) -> str | None:
    """The main metric of a compare folder over the one number in which its variants differ, as SVG; None where they
    differ otherwise."""
    charts = sweep_charts(load([folder]))
    return figure(charts[0]) if charts else None


def figure(chart: Chart) -> str:
    return templates().get_template("figure.svg.j2").render(chart=chart, markers=MARKERS)
