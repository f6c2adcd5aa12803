"""The comparison on the terminal: the table, then each paired difference in words."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from limbeck.evaluation import EX_ACC_ERR
from limbeck.scoring import TRAINING_REWARD

TITLES = {
    TRAINING_REWARD: "reward, training",
    EX_ACC_ERR: "ExAccErr %",
    "forward_kl": "KL(T||S)",
    "reverse_kl": "KL(S||T)",
}


def print_comparison(comparison: dict[str, Any], console: Console) -> None:
    """Means with 95 % intervals; the pairs of the main metric with a verdict."""
    names = list(dict.fromkeys(name for row in comparison["table"] for name in row["metrics"]))
    main = comparison["metric"]
    shown = [
        name
        for name in (main, f"{main}_greedy", TRAINING_REWARD, EX_ACC_ERR, "forward_kl", "reverse_kl")
        if name in names
    ]
    shown = list(dict.fromkeys(shown))
    table = Table(title=f"{comparison['title']}: {comparison['budget']}, training seeds {comparison['seeds']}")
    table.add_column("method", overflow="fold", max_width=28)
    for name in shown:
        table.add_column(TITLES.get(name, name.replace("_", " ")), justify="right")
    table.add_column("steps", justify="right")
    table.add_column("s", justify="right")
    for row in comparison["table"]:
        numbers = [_interval(row["metrics"].get(name)) for name in shown]
        steps, seconds = (f"{row[key]:.0f}" if key in row else "" for key in ("steps", "seconds"))
        table.add_row(row["label"], *numbers, steps, seconds)
    console.print(table)
    console.print(
        "recipes: " + ", ".join(row["recipe"] for row in comparison["table"] if "recipe" in row), highlight=False
    )
    labels = {row["method"]: row["label"] for row in comparison["table"]}
    console.print(f"\npaired differences in {main}, 95 % intervals:")
    for pair in comparison["pairs"]:
        if pair["metric"] == main:
            console.print(f"  {_sentence(pair, labels)}", highlight=False)


def _sentence(pair: dict[str, Any], labels: dict[str, str]) -> str:
    verdict = {"better": "better than", "worse": "worse than"}.get(pair["verdict"], "no clear difference from")
    interval = f" \\[{pair['low']:+.4f}, {pair['high']:+.4f}]" if pair["low"] is not None else ""
    return f"{labels[pair['a']]} {verdict} {labels[pair['b']]}: {pair['difference']:+.4f}{interval}"


def _interval(value: dict[str, Any] | None) -> str:
    if value is None:
        return ""
    if value["low"] is None:
        return f"{value['mean']:.3f}"
    return f"{value['mean']:.3f}\n\\[{value['low']:.3f}, {value['high']:.3f}]"
