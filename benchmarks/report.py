"""Results as a table on the terminal, JSON, and a dated section of a Markdown page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import Result, Row

INTRO = """# Benchmarks

limbeck beside its peers, in one process on the same tensors and models, in turn: `make bench`. One section a run, the
newest last. `x_same_dtype` and `x_best_peer` say how many times better a line is than the best peer of its case: in the
same dtype, and in whichever dtype that peer is best. `peak_mib` is the highest resident size less that before.
"""


def with_ratios(results: Iterable[Result], row: Row) -> list[Result]:
    """Adds to our lines how many times better they are than the best peer."""
    results = list(results)
    return [replace(result, numbers={**result.numbers, **_ratios(result, results, row)}) for result in results]


def _ratios(result: Result, results: Sequence[Result], row: Row) -> dict[str, float]:
    mine = result.numbers.get(row.metric)
    if result.side != "ours" or mine is None:
        return {}
    peers = [
        other for other in results if (other.side, other.case) == ("peer", result.case) and row.metric in other.numbers
    ]
    ratios: dict[str, float] = {}
    same = [other for other in peers if other.dtype == result.dtype]
    for name, group in (("x_same_dtype", same), ("x_best_peer", peers)):
        values = [other.numbers[row.metric] for other in group]
        if values:
            ratios[name] = mine / max(values) if row.more_is_better else min(values) / mine
    return ratios


def lines(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """(headings, cells) of one row's table."""
    names = list(dict.fromkeys(name for result in results for name in result.numbers))
    headings = ["case", "dtype", "who", *names, "note"]
    cells = [
        [
            result.case,
            result.dtype,
            result.who,
            *(shown(result.numbers.get(name)) for name in names),
            result.note,
        ]
        for result in results
    ]
    return headings, cells


def shown(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def print_row(row: Row, results: Sequence[Result], console: Console) -> None:
    headings, cells = lines(results)
    table = Table(title=f"{row.name}: {row.about}", title_justify="left")
    for heading in headings:
        text = heading in ("case", "dtype", "who", "note")
        table.add_column(heading.replace("_", " "), justify="left" if text else "right", overflow="fold")
    for result, cell in zip(results, cells, strict=True):
        wrong = result.note.startswith(("MISMATCH", "failed"))
        table.add_row(*cell, style="bold red" if wrong else "bold" if result.side == "ours" else None)
    console.print(table)


def write_json(path: Path, machine: dict[str, Any], results: Sequence[Result]) -> None:
    content = {"machine": machine, "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_section(path: Path, machine: dict[str, Any], tables: Sequence[tuple[Row, Sequence[Result]]]) -> None:
    """Appends a section to the page; begins the page where there is none."""
    peers = ", ".join(f"{name} {found or 'not installed'}" for name, found in machine["peers"].items())
    text = [
        f"## {machine['date'][:16].replace('T', ' ')} UTC, {machine['cpu']}",
        "",
        f"{machine['threads']} threads, torch {machine['torch']}, transformers {machine['transformers']}, {peers}; "
        f"limbeck {machine['limbeck']}, commit {machine['commit']}; `{machine['command']}`",
    ]
    for row, results in tables:
        headings, cells = lines(results)
        text += ["", f"### {row.name}", "", f"{row.about}.", ""]
        text += [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
        text += [f"| {' | '.join(cell)} |" for cell in cells]
    before = path.read_text() if path.exists() else INTRO
    path.write_text(before.rstrip("\n") + "\n\n" + "\n".join(text) + "\n")
