"""`limbeck evaluate`: a model folder on data sets, without a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
    held_out,
    held_out_intervals,
    label_calibration,
    labelled,
    majority_at_k,
    mean_interval,
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
from limbeck.pipeline.distilling import write_json
from limbeck.report import exposure_figure, reliability_figure, units
from limbeck.scoring import RIGHT_OR_WRONG, reward_name
from limbeck.training.build import teacher_path
from limbeck.types import Example

UNITS = {
    "loss": "nats",
    "forward_kl": "nats",
    "reverse_kl": "nats",
    "length": "characters",
    "length_greedy": "characters",
    EX_ACC_ERR: "%",
}


@dataclass(frozen=True, slots=True)
class _Models:
    student: Any
    tokenizer: Any
    teacher: Any
    stops: tuple[int, ...]
    context: int | None
    autocast: torch.dtype | None


def evaluate_folder(
    model: str | Path,
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
    the products, bf16 by `auto` where the machine is faster with it, as in training. out: a folder for evaluation.json
    and pictures. Prints a table. Returns {name: {mean, low, high, values, how}} and plain numbers,
    or with several data sets {data: {...}}. Raises RecipeError for options that contradict or an `out` that cannot be
    written, DataError, and what `build_metrics` and the metrics' `rows` raise, all before a model writes.
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
    models, described = _load(str(model), teacher, precision)
    console.print(described, highlight=False)
    built = build_metrics(metrics, device=models.student.device)
    examples_of = {
        name: _rendered(name, rows, models, built, template, with_calibration, console)
        for name, rows in rows_of.items()
    }
    chosen = samples or (5 if seeds is None else seeds)
    found: dict[str, dict[str, Any]] = {}
    for name, examples in examples_of.items():
        settings: dict[str, Any] = {"max_tokens": max_tokens, "stop_tokens": models.stops}
        writing = {**settings, "seeds": chosen, "no_repeat_ngram_size": no_repeat_ngram_size}
        status = console.status(f"{escape(name)}: writing and scoring")
        with status, autocast_to(models.student.device, models.autocast):
            scores = evaluate(models.student, models.tokenizer, examples, metrics=built, **writing)
            found[name] = _scores(scores, at_k=samples is not None) | _held_out(models, examples)
            if with_exposure:
                found[name] |= _exposure(models, examples, settings)
            if with_calibration:
                found[name] |= _calibration(models, rows_of[name], examples, template)
    parameters, size = model_size(models.student)
    facts: dict[str, Any] = {"parameters": parameters, "bytes": size}
    first = [example.prompt for examples in examples_of.values() for example in examples][:2]
    with autocast_to(models.student.device, models.autocast):
        facts |= speed(models.student, models.tokenizer, first, max_tokens=32)
    for numbers in found.values():
        numbers |= facts
    _print(str(model), found, facts, chosen, no_repeat_ngram_size, console)
    result = found[names[0]] if isinstance(data, str) else found
    if out is not None:
        _write(out, str(model), found, result, console)
    return result


def _load(model: str, teacher: str | None, precision: str) -> tuple[_Models, str]:
    """Also a line that says in which precision they are."""
    student, tokenizer = load_model(teacher_path(model)), load_tokenizer(teacher_path(model))
    autocast, described = torch.bfloat16 if precision == "bf16" else None, f"precision {precision}, as asked for"
    if precision == "auto":
        autocast, described = probe_autocast(student.device, student.config.get_text_config().hidden_size)
    judge = None
    if teacher is not None:
        judge = load_model(teacher_path(teacher))
        rows = preflight(student, tokenizer, judge, load_tokenizer(teacher_path(teacher)))
        for one in (student, judge):
            set_vocabulary(one, rows)
        judge = judge if autocast is None else cast(judge, autocast)
    stops, context = eos_tokens(student, tokenizer), context_length(student)
    return _Models(student, tokenizer, judge, stops, context, autocast), described


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
    name: str,
    rows: list[dict[str, Any]],
    models: _Models,
    metrics: Metrics,
    template: str | None,
    with_calibration: bool,
    console: Console,
) -> list[Example]:
    """The rows as tokens, with all that metrics and calibration read from them."""
    examples, summary = render(rows, models.tokenizer, template=template, context=models.context)
    console.print(f"{escape(name)}: {summary}", highlight=False)
    metrics.rows(examples, models.tokenizer)
    if with_calibration:
        if any("labels" in row for row in rows):
            labelled(models.tokenizer, rows, template=template, context=models.context)
        elif not _learnt(examples):
            raise DataError(f"{name}: calibration: expected rows with a completion or with labels, found prompts alone")
    return examples


def _scores(scores: Scores, *, at_k: bool) -> dict[str, Any]:
    numbers: dict[str, Any] = {name: _interval(values_SP) for name, values_SP in scores.values.items()}
    for name in RIGHT_OR_WRONG if at_k else ():
        if name in scores.values:
            numbers |= _at_k(name, scores)
    numbers["length_limit_share"] = _point(scores.length_limit_share)
    return numbers


def _at_k(name: str, scores: Scores) -> dict[str, Any]:
    correct_SP = (scores.values[name] == 1).astype(float)  # a verifier's small share is not right
    n = len(correct_SP)
    ks = sorted({*(2**power for power in range(1, n.bit_length())), n} - {1})
    numbers = {f"{name}_pass@{k}": _interval(pass_at_k(correct_SP, k)[None]) for k in ks}
    if name in FINAL_ANSWERS:
        answers = [[final_answer(name, completion) for completion in of_seed] for of_seed in scores.completions]
        numbers |= {f"{name}_maj@{k}": _interval(majority_at_k(correct_SP, answers, k)[None]) for k in ks}
    return numbers


def _held_out(models: _Models, examples: list[Example]) -> dict[str, Any]:
    if not _learnt(examples):
        return {}
    held = held_out(models.student, models.teacher, examples, models.tokenizer.pad_token_id)
    return {name: asdict(interval) for name, interval in held_out_intervals(held).items()}


def _learnt(examples: list[Example]) -> bool:
    return any(any(example.mask) for example in examples)


def _exposure(models: _Models, examples: list[Example], settings: dict[str, Any]) -> dict[str, Any]:
    """The whole curve, and its end."""
    pad_id = models.tokenizer.pad_token_id
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


def _print(
    model: str,
    found: dict[str, dict[str, Any]],
    facts: dict[str, float],
    seeds: int | Sequence[int],
    no_repeat_ngram_size: int,
    console: Console,
) -> None:
    titles = {name: Path(name).name for name in found}
    if len(set(titles.values())) < len(titles):
        titles = {name: name for name in found}
    table = Table(title=escape(model))
    table.add_column("measure")
    for name in found:
        table.add_column(escape(titles[name]), justify="right")
    measures = dict.fromkeys(key for numbers in found.values() for key, value in numbers.items() if _is_number(value))
    for measure in measures:
        table.add_row(
            f"{measure}, {UNITS[measure]}" if measure in UNITS else measure,
            *[_cell(numbers.get(measure)) for numbers in found.values()],
        )
    console.print(table)
    banned = f", no {no_repeat_ngram_size}-gram twice" if no_repeat_ngram_size else ""
    drawn = f"{seeds} seeds" if isinstance(seeds, int) else f"seeds {', '.join(map(str, seeds))}"
    console.print(
        f"sampled at temperature 1, {drawn}{banned}; _greedy: the likeliest token each time; in brackets: 95 % "
        "intervals over prompts",
        highlight=False,
    )
    console.print(
        f"{units.count(facts['parameters'])} parameters, {units.size(facts['bytes'])}; one user: "
        f"{units.significant(facts['tokens_per_s'])} tokens/s, first token after "
        f"{units.seconds(facts['time_to_first_token_s'])}, peak memory {units.size(facts['peak_memory_bytes'])}",
        highlight=False,
    )


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


def _write(out: Path, model: str, found: dict[str, dict[str, Any]], result: dict[str, Any], console: Console) -> None:
    """evaluation.json and, where they were measured, the curves of each data set as SVG."""
    write_json(out / "evaluation.json", result)
    written = ["evaluation.json"]
    for place, (name, numbers) in enumerate(found.items()):
        where = f"{Path(model).name} on {Path(name).name}"
        suffix = f"-{place}" if len(found) > 1 else ""
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
