"""What a study writes: NAME.md with its tables, NAME.csv with every number, NAME.png with its curves."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import numpy as np

from limbeck.evaluation import mean_interval
from limbeck.pipeline.cells import Cell
from limbeck.pipeline.comparing import CSV_COLUMNS


@dataclass(frozen=True)
class Series:
    """One curve of one seed: panel, line, and (x, y)."""

    panel: str
    line: str
    seed: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Number:
    method: str
    seed: int
    metric: str
    value: float
    cell: Cell


@dataclass
class Result:
    """title, about: of the page. `remarks`: sentences below the table, made of numbers. x, y: names of the axes."""

    title: str
    about: str
    numbers: list[Number] = field(default_factory=list[Number])
    series: list[Series] = field(default_factory=list[Series])
    remarks: list[str] = field(default_factory=list[str])
    x: str = "requests served"
    y: str = "alpha"

    def add(self, method: str, seed: int, values: Mapping[str, float], cell: Cell) -> None:
        self.numbers += [Number(method, seed, metric, value, cell) for metric, value in values.items()]


def write(name: str, result: Result, folder: Path) -> Path:
    """The page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / f"{name}.csv", name, result)
    lines = [f"# {name}: {result.title}", "", f"{result.about}.", ""]
    if result.series:
        _draw(folder / f"{name}.png", result)
        lines += [f"![{result.title}]({name}.png)", ""]
    lines += [*table(result), "", *[f"- {remark}" for remark in result.remarks], *([""] if result.remarks else [])]
    machines = {f"{cell.environment['cpu']}, {cell.environment['cores']} cores" for cell in _cells(result)}
    dates = sorted({str(cell.environment["date"])[:10] for cell in _cells(result)})
    commands = dict.fromkeys(cell.environment["command"] for cell in _cells(result))
    lines += [f"Measured on {'; '.join(sorted(machines))}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. By", ""]
    lines += ["```", *commands, "```", "", f"Every number: [{name}.csv]({name}.csv).", ""]
    path = folder / f"{name}.md"
    path.write_text("\n".join(lines))
    return path


def _cells(result: Result) -> list[Cell]:
    return [number.cell for number in result.numbers]


def table(result: Result) -> list[str]:
    """Markdown: a line a metric, a column a method; means over seeds with 95 % intervals where there are several."""
    methods = list(dict.fromkeys(number.method for number in result.numbers))
    metrics = list(dict.fromkeys(number.metric for number in result.numbers))
    lines = [f"| | {' | '.join(methods)} |", f"|---|{'---|' * len(methods)}"]
    for metric in metrics:
        cells: list[str] = []
        for method in methods:
            values = [n.value for n in result.numbers if (n.method, n.metric) == (method, metric)]
            cells.append(_cell(values))
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    return lines


def _cell(values: Sequence[float]) -> str:
    if len(values) < 3:
        return f"{mean(values):.3f}" if values else ""
    interval = mean_interval(np.array(values), seeds="training")
    return f"{mean(values):.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _write_csv(path: Path, name: str, result: Result) -> None:
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(CSV_COLUMNS)
        for number in result.numbers:
            facts = number.cell.environment
            shared = (f"{number.cell.seconds:.1f}", facts["command"], facts["commit"] or "")
            out.writerow([name, number.method, number.seed, number.metric, number.value, *shared])
        for series in result.series:
            for x, y in series.points:
                metric = f"{series.panel}: {result.y} after {x:g} {result.x}"
                out.writerow([name, series.line, series.seed, metric, y, "", "", ""])


def _draw(path: Path, result: Result) -> None:
    """A panel for each name, a line for each method: its mean over seeds, the seeds thin behind it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys(series.panel for series in result.series))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels) + 1, 3.6), squeeze=False, sharey=True)
    for panel, axis in zip(panels, axes[0], strict=True):
        own = [series for series in result.series if series.panel == panel]
        for place, line in enumerate(dict.fromkeys(series.line for series in own)):
            seeds = [series.points for series in own if series.line == line]
            for points in seeds:
                axis.plot(*zip(*points, strict=True), color=f"C{place}", alpha=0.25, linewidth=1)
            middle = [(column[0][0], mean(y for _, y in column)) for column in zip(*seeds, strict=False)]
            axis.plot(*zip(*middle, strict=True), color=f"C{place}", label=line)
        axis.set(title=panel, xlabel=result.x)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(result.y)
    axes[0][-1].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
