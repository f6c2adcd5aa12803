"""What `limbeck evaluate` shows and keeps: tables, paired differences, evaluation.json, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from limbeck.evaluation import EX_ACC_ERR
from limbeck.pipeline.distilling import write_json
from limbeck.report import exposure_figure, reliability_figure, units

UNITS = {
    "loss": "nats",
    "forward_kl": "nats",
    "reverse_kl": "nats",
    "length": "characters",
    "length_greedy": "characters",
    EX_ACC_ERR: "%",
}


def print_results(
    numbers_of: Mapping[str, Mapping[str, dict[str, Any]]],
    differences: Sequence[Mapping[str, Any]],
    seeds: int | Sequence[int],
    no_repeat_ngram_size: int,
    console: Console,
) -> None:
    """A table for each model, one of paired differences for each data set, and how all of it was drawn."""
    for model, numbers in numbers_of.items():
        _print_numbers(model, numbers, console)
    for data in dict.fromkeys(each["data"] for each in differences):
        _print_differences(data, [each for each in differences if each["data"] == data], console)
    banned = f", no {no_repeat_ngram_size}-gram twice" if no_repeat_ngram_size else ""
    drawn = f"{seeds} seeds" if isinstance(seeds, int) else f"seeds {', '.join(map(str, seeds))}"
    paired = "; differences over the same prompts and seeds, bold where the interval holds no 0" if differences else ""
    console.print(
        f"sampled at temperature 1, {drawn}{banned}; _greedy: the likeliest token each time; in brackets: 95 % "
        f"intervals over prompts{paired}",
        highlight=False,
    )


def _print_numbers(model: str, found: Mapping[str, dict[str, Any]], console: Console) -> None:
    """A row for each measure, a column for each data set."""
    titles = short_names(list(found))
    table = Table(title=escape(model))
    table.add_column("measure")
    for name in found:
        table.add_column(escape(titles[name]), justify="right")
    measures = dict.fromkeys(key for numbers in found.values() for key, value in numbers.items() if _is_number(value))
    for measure in measures:
        table.add_row(_measure(measure), *[_cell(numbers.get(measure)) for numbers in found.values()])
    console.print(table)
    facts = next(iter(found.values()))
    console.print(
        f"{units.count(facts['parameters'])} parameters, {units.size(facts['bytes'])}; one user: "
        f"{units.significant(facts['tokens_per_s'])} tokens/s, first token after "
        f"{units.seconds(facts['time_to_first_token_s'])}, peak memory {units.size(facts['peak_memory_bytes'])}",
        highlight=False,
    )


def _print_differences(data: str, differences: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A row for each measure, a column for each pair of models."""
    models = short_names(list(dict.fromkeys(model for each in differences for model in (each["b"], each["a"]))))
    cells = {(each["metric"], each["a"], each["b"]): _difference_cell(each) for each in differences}
    pairs = list(dict.fromkeys((each["a"], each["b"]) for each in differences))
    table = Table(title=f"paired differences on {escape(Path(data).name)}")
    table.add_column("measure")
    for a, b in pairs:
        table.add_column(f"{escape(models[a])} - {escape(models[b])}", justify="right")
    for measure in dict.fromkeys(each["metric"] for each in differences):
        table.add_row(_measure(measure), *[cells.get((measure, a, b), "") for a, b in pairs])
    console.print(table)


def write_results(
    out: Path, numbers_of: Mapping[str, dict[str, dict[str, Any]]], result: dict[str, Any], console: Console
) -> None:
    """evaluation.json and, where they were measured, the curves of each model and data set as SVG."""
    write_json(out / "evaluation.json", result)
    written = ["evaluation.json"]
    tables = [(model, name, numbers) for model, of in numbers_of.items() for name, numbers in of.items()]
    models = short_names(list(numbers_of))
    for place, (model, name, numbers) in enumerate(tables):
        where = f"{models[model]} on {Path(name).name}"
        suffix = f"-{place}" if len(tables) > 1 else ""
        pictures = {
            f"reliability-{part}{suffix}.svg": reliability_figure(f"Reliability of {part}: {where}", values)
            for part, values in numbers.get("calibration", {}).items()
        }
        if "exposure" in numbers:
            pictures[f"exposure{suffix}.svg"] = exposure_figure(f"Excess error: {where}", numbers["exposure"])
        for file, text in pictures.items():
            (out / file).write_text(text, encoding="utf-8")
        written += pictures
    console.print(f"wrote {', '.join(written)} to {escape(str(out))}", highlight=False)


def _difference_cell(difference: Mapping[str, Any]) -> str:
    text = f"{difference['difference']:+.4f}"
    if difference["low"] is not None:
        text += f" \\[{difference['low']:+.4f}, {difference['high']:+.4f}]"
    return f"[bold]{text}[/bold]" if difference["verdict"] in ("better", "worse") else text


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each path by as many of its last parts as tell all of them apart."""
    parts = {name: Path(name).parts or (name,) for name in names}
    for count in range(1, max(map(len, parts.values()), default=1)):
        short = {name: str(Path(*parts[name][-count:])) for name in names}
        if len(set(short.values())) == len(names):
            return short
    return {name: name for name in names}


def _measure(name: str) -> str:
    return f"{name}, {UNITS[name]}" if name in UNITS else name


def _is_number(value: Any) -> bool:
    return isinstance(value, dict) and "mean" in value


def _cell(value: dict[str, Any] | None) -> str:
    if value is None:
        return ""

    def text(number: float) -> str:
        return f"{number:.4f}" if abs(number) < 10 else f"{number:.1f}"

    if value["low"] is None:
        return text(value["mean"])
    return f"{text(value['mean'])} \\[{text(value['low'])}, {text(value['high'])}]"
