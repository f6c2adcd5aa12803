"""`limbeck evaluate`: model folders on data sets, without a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.markup import escape

from limbeck.data import read, render
from limbeck.errors import DataError, RecipeError
from limbeck.evaluation import (
    FINAL_ANSWERS,
    Metrics,
    Scores,
    build_metrics,
    evaluate,
    final_answer,
    held_out_intervals,
    labelled,
    majority_at_k,
    mean_interval,
    paired_difference,
    pass_at_k,
    speed,
)
from limbeck.models import autocast_to, model_size
from limbeck.pipeline.cells import Cells
from limbeck.pipeline.evaluated import print_results, write_results
from limbeck.pipeline.evaluation_parts import (
    Models,
    calibration_of,
    exposure_of,
    has_reference,
    held_out_of,
    load,
    point,
    writing,
)
from limbeck.scoring import RIGHT_OR_WRONG, lower_is_better, reward_name
from limbeck.types import Example


@dataclass(frozen=True, slots=True)
class _Found:
    """Of one model on one data set. `paired[name]`, of what has a value for each prompt: values [seeds, prompts] and
    the weights [prompts] of their mean."""

    numbers: dict[str, Any]
    paired: dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, slots=True)
class _Asked:
    metrics: Metrics
    settings: dict[str, Any]
    template: str | None
    at_k: bool
    with_exposure: bool
    with_calibration: bool


def evaluate_folder(
    model: str | Path | Sequence[str | Path],
    data: str | Sequence[str],
    *,
    metrics: Sequence[str | Mapping[str, Any]],
    seeds: int | Sequence[int] | None = None,
    samples: int | None = None,
    teacher: str | None = None,
    prompts: int = 200,
    max_tokens: int = 128,
    template: str | None = None,
    no_repeat_ngram_size: int = 0,
    with_exposure: bool = False,
    with_calibration: bool = False,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    out: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Metrics with intervals (sampled at temperature 1, and greedy), held-out loss and divergences, speed.

    seeds: their number (5 unless given) or the seeds. samples: instead, that many samples a prompt, and pass@k of them
    for metrics of RIGHT_OR_WRONG, maj@k where an answer can vote (FINAL_ANSWERS). with_exposure: ExAccErr, with a
    teacher. with_calibration: ECE of the reference's tokens, and of label words where rows have `labels`. precision: of
    the products, bf16 by `auto` where the machine is faster with it (for the widest model), as in training. out: a
    folder for evaluation.json and pictures, and in `parts` each part as it ends: an evaluation that was stopped goes on
    from there, and what has other models, data or settings is computed again. Prints a line for each part, a table for
    each model and, of several, their paired differences.

    Returns {name: {mean, low, high, values, how}} and plain numbers, or with several data sets {data: {...}}; with
    several models, which are all in memory at once, {"models": {model: that}, "differences": [{a, b, data, metric,
    difference, low, high, verdict, how}]}: a - b over the same prompts and seeds. Raises RecipeError for options that
    contradict or an `out` that cannot be written, DataError, and what `build_metrics` and the metrics' `rows` raise,
    all before a model writes.
    """
    if with_exposure and teacher is None:
        raise RecipeError("exposure: expected a teacher, to compare the student's text with: add --teacher FOLDER")
    if samples is not None:
        _check_samples(metrics, seeds)
    if out is not None:
        _claim(out)
    console = console or Console()
    names = [data] if isinstance(data, str) else list(data)
    rows_of = {name: read(name)[:prompts] for name in names}
    folders, described = load([model] if isinstance(model, str | Path) else model, teacher, precision)
    console.print(described, highlight=False)
    first = next(iter(folders.values()))
    chosen = samples or (5 if seeds is None else seeds)
    settings = {"max_tokens": max_tokens, "seeds": chosen, "no_repeat_ngram_size": no_repeat_ngram_size}
    built = build_metrics(metrics, device=first.student.device)
    asked = _Asked(built, settings, template, samples is not None, with_exposure, with_calibration)
    examples_of = {name: _rendered(name, rows, folders, asked, console) for name, rows in rows_of.items()}
    cells = Cells(
        None if out is None else out / "parts", partial(console.print, style="dim", markup=False, soft_wrap=True)
    )
    found: dict[str, dict[str, _Found]] = {}
    for name, examples in examples_of.items():
        with autocast_to(first.student.device, first.autocast):
            found[name] = _measure(folders, name, rows_of[name], examples, asked, cells)
    numbers = {folder: {name: found[name][folder].numbers for name in names} for folder in folders}
    for folder, models in folders.items():
        facts = _facts(models, [example.prompt for name in names for example in examples_of[name][folder]][:2])
        for of_data in numbers[folder].values():
            of_data |= facts
    differences = [difference for name in names for difference in _differences(name, found[name])]
    print_results(numbers, differences, chosen, no_repeat_ngram_size, console)
    result: dict[str, Any] = {folder: of[names[0]] if isinstance(data, str) else of for folder, of in numbers.items()}
    result = {"models": result, "differences": differences} if len(result) > 1 else next(iter(result.values()))
    if out is not None:
        write_results(out, numbers, result, console)
    return result


def _check_samples(metrics: Sequence[str | Mapping[str, Any]], seeds: int | Sequence[int] | None) -> None:
    if seeds is not None:
        raise RecipeError("expected seeds or samples, found both: n samples a prompt are n seeds")
    names = [reward_name(metric) for metric in metrics]
    if not any(name in RIGHT_OR_WRONG for name in names):
        raise RecipeError(
            f"samples: expected a metric that says right or wrong ({', '.join(RIGHT_OR_WRONG)}), found "
            f"{', '.join(names) or 'none'}: add one to the metrics"
        )


def _claim(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise RecipeError(f"expected to write to {out}, found {error.strerror}; name another --out") from error


def _rendered(
    name: str, rows: list[dict[str, Any]], folders: Mapping[str, Models], asked: _Asked, console: Console
) -> dict[str, list[Example]]:
    """By model the rows as tokens, with all that metrics and calibration read from them."""
    examples_of: dict[str, list[Example]] = {}
    summaries: dict[str, None] = {}
    for folder, models in folders.items():
        examples, summary = render(rows, models.tokenizer, template=asked.template, context=models.context)
        asked.metrics.rows(examples, models.tokenizer)
        if asked.with_calibration:
            if any("labels" in row for row in rows):
                labelled(models.tokenizer, rows, template=asked.template, context=models.context)
            elif not has_reference(examples):
                raise DataError(
                    f"{name}: calibration: expected rows with a completion or with labels, found prompts alone"
                )
        examples_of[folder] = examples
        summaries[str(summary)] = None
    for summary in summaries:
        console.print(f"{escape(name)}: {summary}", highlight=False)
    return examples_of


def _measure(
    folders: Mapping[str, Models],
    data: str,
    rows: list[dict[str, Any]],
    examples_of: Mapping[str, list[Example]],
    asked: _Asked,
    cells: Cells,
) -> dict[str, _Found]:
    """By model, all that was asked for on one data set."""
    held_of = held_out_of(folders, examples_of, data, cells)
    found: dict[str, _Found] = {}
    for folder, models in folders.items():
        examples = examples_of[folder]
        scores = evaluate(
            models.student,
            models.tokenizer,
            examples,
            metrics=asked.metrics,
            stop_tokens=models.stops,
            write=writing(models, data, cells),
            **asked.settings,
        )
        values = _values(scores, at_k=asked.at_k)
        numbers: dict[str, Any] = {name: _interval(values_SP) for name, values_SP in values.items()}
        numbers["length_limit_share"] = point(scores.length_limit_share)
        whole = asked.metrics.specs.keys() - asked.metrics.rewards.keys()  # of all completions together
        ones_P = np.ones(len(examples))
        paired = {name: (values[name], ones_P) for name in values if name.removesuffix("_greedy") not in whole}
        if folder in held_of:
            intervals = held_out_intervals(held_of[folder])
            numbers |= {name: asdict(interval) for name, interval in intervals.items()}
            rows_of = {name: np.array(each) for name, each in held_of[folder]["per_example"].items()}
            paired |= {name: (rows_of[name][None], rows_of["tokens"]) for name in intervals}
        if asked.with_exposure:
            numbers |= exposure_of(models, examples, asked.settings["max_tokens"], data, cells)
        if asked.with_calibration:
            numbers |= calibration_of(models, rows, examples, asked.template, data, cells)
        found[folder] = _Found(numbers, paired)
    return found


def _values(scores: Scores, *, at_k: bool) -> dict[str, np.ndarray]:
    """By name [seeds, prompts], or [seeds, 1] of a metric of all completions together."""
    values = dict(scores.values)
    for name in RIGHT_OR_WRONG if at_k else ():
        if name in scores.values:
            values |= _at_k(name, scores)
    return values


def _at_k(name: str, scores: Scores) -> dict[str, np.ndarray]:
    correct_SP = (scores.values[name] == 1).astype(float)  # a verifier's small share is not right
    n = len(correct_SP)
    ks = sorted({*(2**power for power in range(1, n.bit_length())), n} - {1})
    values = {f"{name}_pass@{k}": pass_at_k(correct_SP, k)[None] for k in ks}
    if name in FINAL_ANSWERS:
        answers = [[final_answer(name, completion) for completion in of_seed] for of_seed in scores.completions]
        values |= {f"{name}_maj@{k}": majority_at_k(correct_SP, answers, k)[None] for k in ks}
    return values


def _differences(data: str, found: Mapping[str, _Found]) -> list[dict[str, Any]]:
    """a - b for every later model a and earlier model b, in all that has a value for each prompt; means over tokens
    where both read the same number of them in each row."""
    differences: list[dict[str, Any]] = []
    for b, a in combinations(found, 2):
        for name, (of_a, weights) in found[a].paired.items():
            of_b, weights_b = found[b].paired[name]
            if not np.array_equal(weights, weights_b):
                continue
            difference = paired_difference(
                of_a, of_b, seeds="evaluation", weights=weights, lower_is_better=lower_is_better(name)
            )
            differences.append({"a": a, "b": b, "data": data, "metric": name, **asdict(difference)})
    return differences


def _facts(models: Models, prompts: list[list[int]]) -> dict[str, Any]:
    parameters, size = model_size(models.student)
    with autocast_to(models.student.device, models.autocast):
        measured = speed(models.student, models.tokenizer, prompts, max_tokens=32)
    return {"parameters": parameters, "bytes": size, **measured}


def _interval(values_SP: np.ndarray) -> dict[str, Any]:
    return asdict(mean_interval(values_SP, seeds="evaluation"))
