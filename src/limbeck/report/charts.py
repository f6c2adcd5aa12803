"""The geometry of the page's charts, which the template draws: places in percent, so that text keeps its size."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from limbeck.report.load import Estimate
from limbeck.report.units import fixed, significant

COLOURS = 6  # as many as style.css names; each has its own marker, and beyond them the lines are dashed
BINS = 200  # a long run is averaged into this many points
GRID = 1000  # units of a plot's own coordinates, either way


@dataclass(frozen=True, slots=True)
class Style:
    """A method's look on the whole page: `colour` and `marker` are names in style.css and the template."""

    colour: str
    marker: int
    dashed: bool = False

    @classmethod
    def of(cls, place: int) -> Style:
        return cls(f"c{place % COLOURS}", place % COLOURS, place >= COLOURS)


TEACHER = Style("ink", 6)
START = Style("quiet", 7)


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: `y` over `x`; `faint` the single steps behind a smoothed one; `band` the lowest and highest seed."""

    label: str
    style: Style
    x: Sequence[float]
    y: Sequence[float]
    faint: Sequence[float] = ()
    band: tuple[Sequence[float], Sequence[float]] | None = None
    points: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn chart: `lines` hold SVG paths in a GRID x GRID box, ticks are (percent, text)."""

    title: str
    x_label: str
    unit: str
    lines: list[dict[str, Any]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    data: str
    summary: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Dots:
    """Rows of a dot-and-interval chart; every place in percent of its width."""

    rows: list[dict[str, Any]]
    ticks: list[tuple[float, str]]
    reference: float | None = field(default=None)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2, 5 times a power of ten) inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor, below in ((1, 1.5), (2, 3.5), (5, 7.5), (10, 11)) if raw / power < below)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """One text a tick, all with as many decimals as their step needs."""
    if any(abs(value) >= 1e5 or 0 < abs(value) < 1e-4 for value in values):
        return [f"{value:g}" for value in values]
    step = values[1] - values[0] if len(values) > 1 else abs(values[0]) or 1
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    return [fixed(value, places) for value in values]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` values; at the ends over those that are there."""
    ones = np.ones(window)
    sums = np.convolve(np.asarray(values, float), ones, mode="full")
    counts = np.convolve(np.ones(len(values)), ones, mode="full")
    start = (window - 1) // 2
    return (sums / counts)[start : start + len(values)].tolist()


def thin(x: Sequence[float], *columns: Sequence[float]) -> list[list[float]]:
    """x and the columns beside it, averaged into at most BINS points."""
    if len(x) <= BINS:
        return [list(x), *map(list, columns)]
    edges = np.linspace(0, len(x), BINS + 1).astype(int)
    return [
        np.add.reduceat(np.asarray(part, float), edges[:-1]).__truediv__(np.diff(edges)).tolist()
        for part in (x, *columns)
    ]


def line_chart(title: str, lines: Sequence[Line], *, x_label: str = "step", unit: str = "", note: str = "") -> Chart:
    """A line chart. The vertical range follows the curves; single steps far outside it are cut off at the edge."""
    low_x, high_x = min(min(line.x) for line in lines), max(max(line.x) for line in lines)
    low, high = _range(lines)
    width, height = (high_x - low_x) or 1.0, high - low

    def x_place(value: float) -> float:
        return (value - low_x) / width if high_x > low_x else 0.5

    def y_place(value: float) -> float:
        return min(1.0, max(0.0, 1 - (value - low) / height))

    def path(x: Sequence[float], y: Sequence[float]) -> str:
        return "M" + "L".join(f"{GRID * x_place(a):.0f},{GRID * y_place(b):.0f}" for a, b in zip(x, y, strict=True))

    drawn: list[dict[str, Any]] = []
    for line in lines:
        places = [(100 * x_place(a), 100 * y_place(b)) for a, b in zip(line.x, line.y, strict=True)]
        band = ""
        if line.band:
            band = path([*line.x, *line.x[::-1]], [*line.band[1], *line.band[0][::-1]]) + "Z"
        drawn.append(
            {
                "label": line.label,
                "style": line.style,
                "path": path(line.x, line.y),
                "faint": path(line.x, line.faint) if line.faint else "",
                "band": band,
                "marks": places if line.points else places[-1:],
            }
        )
    x_values, y_values = ticks(low_x, high_x), ticks(low, high)
    moves = "; ".join(f"{line.label} from {significant(line.y[0])} to {significant(line.y[-1])}" for line in lines)
    return Chart(
        title=title,
        x_label=x_label,
        unit=unit,
        lines=drawn,
        x_ticks=[(100 * x_place(v), text) for v, text in zip(x_values, tick_texts(x_values), strict=True)],
        y_ticks=[(100 * y_place(v), text) for v, text in zip(y_values, tick_texts(y_values), strict=True)],
        data=_hover(lines, low_x, high_x, x_label),
        summary=f"{title} over {x_label}: {moves}.",
        note=note,
    )


def _range(lines: Sequence[Line]) -> tuple[float, float]:
    curves = np.concatenate([np.asarray(part, float) for line in lines for part in (line.y, *(line.band or ()))])
    low, high = float(curves.min()), float(curves.max())
    faint = [np.asarray(line.faint, float) for line in lines if line.faint]
    if faint:
        single = np.concatenate(faint)
        low, high = min(low, float(np.quantile(single, 0.02))), max(high, float(np.quantile(single, 0.98)))
    if low >= 0 and low < 0.4 * high:
        low = 0.0
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low if low == 0 else low - room, high + room


def _hover(lines: Sequence[Line], low: float, high: float, x_label: str) -> str:
    """What script.js shows under the pointer."""
    series = [
        {
            "label": line.label,
            "colour": line.style.colour,
            "x": [float(f"{value:.6g}") for value in line.x],
            "y": [float(f"{value:.4g}") for value in line.y],
        }
        for line in lines
    ]
    return json.dumps({"low": low, "high": high, "x": x_label, "series": series}, separators=(",", ":"))


def dot_chart(
    rows: Sequence[tuple[dict[str, Any], Estimate]], *, reference: float | None = None, zero: bool = False
) -> Dots:
    """One dot with its interval a row, beside whatever `rows` hold already; `zero`: a range even about 0."""
    numbers = [
        number
        for _, estimate in rows
        for number in (estimate.mean, estimate.low, estimate.high, *(() if zero else estimate.values))
        if number is not None
    ]
    if reference is not None:
        numbers.append(reference)
    low, high = min(numbers), max(numbers)
    if zero:
        high = max(abs(low), abs(high))
        low = -high
    room = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    low, high = low - room, high + room

    def place(value: float | None) -> float | None:
        return None if value is None else 100 * (value - low) / (high - low)

    drawn = [
        {
            **row,
            "mean": place(estimate.mean),
            "low": place(estimate.low),
            "high": place(estimate.high),
            "values": [place(value) for value in estimate.values],
        }
        for row, estimate in rows
    ]
    values = ticks(low, high)
    marks = [((place(value) or 0.0), text) for value, text in zip(values, tick_texts(values), strict=True)]
    return Dots(drawn, marks, place(reference))
