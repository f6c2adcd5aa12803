"""`limbeck evaluate`: a model folder on a data set, without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from limbeck.data import read, render
from limbeck.evaluation import evaluate, held_out, mean_interval, speed
from limbeck.models import eos_tokens, load_model, load_tokenizer, model_size, preflight, set_vocabulary
from limbeck.training.build import teacher_path


def evaluate_folder(
    model: str | Path,
    data: str,
    *,
    metrics: list[str],
    seeds: int = 5,
    teacher: str | None = None,
    prompts: int = 200,
    max_tokens: int = 128,
    template: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Metrics with intervals (sampled at temperature 1 over `seeds`, and greedy), held-out loss and divergences, speed.
    Prints a table; returns {name: {mean, low, high}} and the speeds as plain numbers."""
    loaded, tokenizer = load_model(teacher_path(str(model))), load_tokenizer(teacher_path(str(model)))
    judge = None
    if teacher is not None:
        judge = load_model(teacher_path(teacher))
        rows = preflight(loaded, tokenizer, judge, load_tokenizer(teacher_path(teacher)))
        for one in (loaded, judge):
            set_vocabulary(one, rows)
    context = getattr(loaded.config, "max_position_embeddings", None)
    examples, _ = render(read(data)[:prompts], tokenizer, template=template, context=context)
    stops = eos_tokens(loaded, tokenizer)
    pad_id: Any = tokenizer.pad_token_id
    scores = evaluate(
        loaded, tokenizer, examples, metrics=metrics, seeds=seeds, max_tokens=max_tokens, stop_tokens=stops
    )
    numbers: dict[str, Any] = {}
    for name, values_SP in scores.values.items():
        interval = mean_interval(values_SP, seeds="evaluation")
        numbers[name] = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    if any(any(example.mask) for example in examples):
        held = held_out(loaded, judge, examples, pad_id)
        for name in ("loss", "forward_kl", "reverse_kl", "agreement"):
            if name in held:
                numbers[name] = {"mean": held[name], "low": None, "high": None}
    parameters, size = model_size(loaded)
    numbers |= {"parameters": parameters, "bytes": size}
    numbers |= speed(loaded, tokenizer, [example.prompt for example in examples[:2]], max_tokens=32)
    _print(str(model), data, numbers, console or Console())
    return numbers


def _print(model: str, data: str, numbers: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{model} on {data}")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, value in numbers.items():
        if isinstance(value, dict):
            low, high = value["low"], value["high"]
            table.add_row(name, f"{value['mean']:.4f}", "" if low is None else f"{low:.4f} to {high:.4f}")
        else:
            table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}", "")
    console.print(table)
