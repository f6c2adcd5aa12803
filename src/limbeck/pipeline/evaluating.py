"""`limbeck evaluate`: model folders on data sets, without a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape

from limbeck.data import read, render
from limbeck.errors import DataError, RecipeError
from limbeck.evaluation import (
    EX_ACC_ERR,
    FINAL_ANSWERS,
    Metrics,
    Scores,
    build_metrics,
    evaluate,
    exposure,
    final_answer,
    held_out_intervals,
    held_out_together,
    label_calibration,
    labelled,
    majority_at_k,
    mean_interval,
    paired_difference,
    pass_at_k,
    speed,
    token_calibration,
)
from limbeck.models import (
    autocast_to,
    cast,
    context_length,
    eos_tokens,
    load_model,
    load_tokenizer,
    model_size,
    preflight,
    probe_autocast,
    set_vocabulary,
)
from limbeck.pipeline.evaluated import print_results, write_results
from limbeck.scoring import RIGHT_OR_WRONG, lower_is_better, reward_name
from limbeck.training.build import teacher_path
from limbeck.types import Example


@dataclass(frozen=True, slots=True)
class _Models:
    student: Any
    tokenizer: Any
    teacher: Any
    stops: tuple[int, ...]
    context: int | None
    autocast: torch.dtype | None


@dataclass(frozen=True, slots=True)
class _Found:
    """Of one model on one data set. `paired[name]`, of what has a value for each prompt: values [seeds, prompts] and
    the weights [prompts] of their mean."""

    numbers: dict[str, Any]
    paired: dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, slots=True)
class _Asked:
    metrics: Metrics
    writing: dict[str, Any]
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
    folder for evaluation.json and pictures. Prints a table for each model and, of several, their paired differences.

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
    folders, described = _load([model] if isinstance(model, str | Path) else model, teacher, precision)
    console.print(described, highlight=False)
    first = next(iter(folders.values()))
    chosen = samples or (5 if seeds is None else seeds)
    writing = {"max_tokens": max_tokens, "seeds": chosen, "no_repeat_ngram_size": no_repeat_ngram_size}
    built = build_metrics(metrics, device=first.student.device)
    asked = _Asked(built, writing, template, samples is not None, with_exposure, with_calibration)
    examples_of = {name: _rendered(name, rows, folders, asked, console) for name, rows in rows_of.items()}
    found: dict[str, dict[str, _Found]] = {}
    for name, examples in examples_of.items():
        status = console.status(f"{escape(name)}: writing and scoring")
        with status, autocast_to(first.student.device, first.autocast):
            found[name] = _measure(folders, rows_of[name], examples, asked)
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


def _load(folders: Sequence[str | Path], teacher: str | None, precision: str) -> tuple[dict[str, _Models], str]:
    """Also a line that says in which precision they are."""
    names = [str(folder) for folder in folders]
    if not names or len(set(names)) < len(names):
        raise RecipeError(f"expected models that differ from each other, found {', '.join(names) or 'none'}")
    loaded = [(load_model(teacher_path(name)), load_tokenizer(teacher_path(name))) for name in names]
    autocast, described = torch.bfloat16 if precision == "bf16" else None, f"precision {precision}, as asked for"
    if precision == "auto":
        widest = max(student.config.get_text_config().hidden_size for student, _ in loaded)
        autocast, described = probe_autocast(loaded[0][0].device, widest)
    judge = None
    if teacher is not None:
        judge, judges = load_model(teacher_path(teacher)), load_tokenizer(teacher_path(teacher))
        for student, tokenizer in loaded:
            rows = preflight(student, tokenizer, judge, judges)
            for one in (student, judge):
                set_vocabulary(one, rows)
        judge = judge if autocast is None else cast(judge, autocast)
    models = {
        name: _Models(student, tokenizer, judge, eos_tokens(student, tokenizer), context_length(student), autocast)
        for name, (student, tokenizer) in zip(names, loaded, strict=True)
    }
    return models, described


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
    name: str, rows: list[dict[str, Any]], folders: Mapping[str, _Models], asked: _Asked, console: Console
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
            elif not _learnt(examples):
                raise DataError(
                    f"{name}: calibration: expected rows with a completion or with labels, found prompts alone"
                )
        examples_of[folder] = examples
        summaries[str(summary)] = None
    for summary in summaries:
        console.print(f"{escape(name)}: {summary}", highlight=False)
    return examples_of


def _measure(
    folders: Mapping[str, _Models],
    rows: list[dict[str, Any]],
    examples_of: Mapping[str, list[Example]],
    asked: _Asked,
) -> dict[str, _Found]:
    """By model, all that was asked for on one data set."""
    held_of = _held_out(folders, examples_of)
    found: dict[str, _Found] = {}
    for folder, models in folders.items():
        examples = examples_of[folder]
        scores = evaluate(
            models.student,
            models.tokenizer,
            examples,
            metrics=asked.metrics,
            stop_tokens=models.stops,
            **asked.writing,
        )
        values = _values(scores, at_k=asked.at_k)
        numbers: dict[str, Any] = {name: _interval(values_SP) for name, values_SP in values.items()}
        numbers["length_limit_share"] = _point(scores.length_limit_share)
        whole = asked.metrics.specs.keys() - asked.metrics.rewards.keys()  # of all completions together
        ones_P = np.ones(len(examples))
        paired = {name: (values[name], ones_P) for name in values if name.removesuffix("_greedy") not in whole}
        if folder in held_of:
            intervals = held_out_intervals(held_of[folder])
            numbers |= {name: asdict(interval) for name, interval in intervals.items()}
            rows_of = {name: np.array(each) for name, each in held_of[folder]["per_example"].items()}
            paired |= {name: (rows_of[name][None], rows_of["tokens"]) for name in intervals}
        if asked.with_exposure:
            numbers |= _exposure(models, examples, asked.writing["max_tokens"])
        if asked.with_calibration:
            numbers |= _calibration(models, rows, examples, asked.template)
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


def _held_out(folders: Mapping[str, _Models], examples_of: Mapping[str, list[Example]]) -> dict[str, dict[str, Any]]:
    """By model what `held_out` finds, where there is a reference text. A teacher reads the rows once for all models
    that read the same tokens."""
    groups: dict[tuple[tuple[int, ...], ...], list[str]] = {}
    for folder, examples in examples_of.items():
        if _learnt(examples):
            groups.setdefault(tuple(tuple(example.tokens) for example in examples), []).append(folder)
    found: dict[str, dict[str, Any]] = {}
    for group in groups.values():
        first = folders[group[0]]
        students = [folders[folder].student for folder in group]
        examples = examples_of[group[0]]
        held = held_out_together(students, first.teacher, examples, first.tokenizer.pad_token_id)
        found |= dict(zip(group, held, strict=True))
    return found


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


def _facts(models: _Models, prompts: list[list[int]]) -> dict[str, Any]:
    parameters, size = model_size(models.student)
    with autocast_to(models.student.device, models.autocast):
        measured = speed(models.student, models.tokenizer, prompts, max_tokens=32)
    return {"parameters": parameters, "bytes": size, **measured}


def _learnt(examples: list[Example]) -> bool:
    return any(any(example.mask) for example in examples)


def _exposure(models: _Models, examples: list[Example], max_tokens: int) -> dict[str, Any]:
    """The whole curve, and its end."""
    pad_id = models.tokenizer.pad_token_id
    settings: dict[str, Any] = {"max_tokens": max_tokens, "stop_tokens": models.stops}
    curve = exposure(models.student, models.teacher, examples, pad_id=pad_id, **settings)
    return {EX_ACC_ERR: curve.end, "exposure": asdict(curve)}


def _calibration(
    models: _Models, rows: list[dict[str, Any]], examples: list[Example], template: str | None
) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    if _learnt(examples):
        parts["tokens"] = asdict(token_calibration(models.student, examples, models.tokenizer.pad_token_id))
    if any("labels" in row for row in rows):
        parts["labels"] = asdict(
            label_calibration(models.student, models.tokenizer, rows, template=template, context=models.context)
        )
    numbers = {f"ece_{name}": _point(part["ece"]) for name, part in parts.items()}
    numbers |= {f"accuracy_{name}": _point(part["accuracy"]) for name, part in parts.items()}
    return {**numbers, "calibration": parts}


def _interval(values_SP: np.ndarray) -> dict[str, Any]:
    return asdict(mean_interval(values_SP, seeds="evaluation"))


def _point(value: float) -> dict[str, Any]:
    return {"mean": value, "low": None, "high": None}
