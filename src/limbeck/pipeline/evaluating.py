"""`limbeck evaluate`: a model folder on data sets, without a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from limbeck.data import read, render
from limbeck.errors import DataError, RecipeError
from limbeck.evaluation import (
    Scores,
    evaluate,
    exposure,
    final_answer,
    held_out,
    label_calibration,
    majority_at_k,
    mean_interval,
    pass_at_k,
    speed,
    token_calibration,
)
from limbeck.models import eos_tokens, load_model, load_tokenizer, model_size, preflight, set_vocabulary
from limbeck.pipeline.distilling import write_json
from limbeck.report import exposure_figure, reliability_figure, units
from limbeck.scoring import CORPUS_SCORES, RIGHT_OR_WRONG, SCORES
from limbeck.training.build import teacher_path
from limbeck.types import Example

UNITS = {
    "loss": "nats",
    "forward_kl": "nats",
    "reverse_kl": "nats",
    "length": "characters",
    "length_greedy": "characters",
    "ex_acc_err": "%",
}
HELD_OUT = ("loss", "forward_kl", "reverse_kl", "agreement")


@dataclass(frozen=True, slots=True)
class _Models:
    student: Any
    tokenizer: Any
    teacher: Any
    stops: tuple[int, ...]
    context: int | None


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
    out: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Metrics with intervals (sampled at temperature 1, and greedy), held-out loss and divergences, speed.

    seeds: their number (5 unless given) or the seeds. samples: instead, that many samples a prompt, and pass@k and
    maj@k of them for metrics that say right or wrong. with_exposure: ExAccErr, with a teacher. with_calibration: ECE of
    the reference's tokens, and of label words where rows have `labels`. out: a folder for evaluation.json and pictures.
    Prints a table. Returns {name: {mean, low, high, values}} and plain numbers, or with several data sets
    {data: {...}}. Raises RecipeError for options that contradict, and what the parts raise.
    """
    if samples is not None and seeds is not None:
        raise RecipeError("expected seeds or samples, found both: n samples a prompt are n seeds")
    if with_exposure and teacher is None:
        raise RecipeError(
            "exposure: expected a teacher, whose text the student's is compared with: add --teacher FOLDER"
        )
    console = console or Console()
    models = _load(str(model), teacher)
    names = [data] if isinstance(data, str) else list(data)
    chosen = samples or (5 if seeds is None else seeds)
    found: dict[str, dict[str, Any]] = {}
    prompts_of: list[list[int]] = []
    for name in names:
        rows = read(name)[:prompts]
        examples, summary = render(rows, models.tokenizer, template=template, context=models.context)
        console.print(f"{escape(name)}: {summary}", highlight=False)
        prompts_of += [example.prompt for example in examples]
        settings: dict[str, Any] = {"max_tokens": max_tokens, "stop_tokens": models.stops}
        writing = {**settings, "seeds": chosen, "no_repeat_ngram_size": no_repeat_ngram_size}
        with console.status(f"{escape(name)}: writing and scoring"):
            scores = evaluate(models.student, models.tokenizer, examples, metrics=metrics, **writing)
            found[name] = _scores(scores, at_k=samples is not None) | _held_out(models, examples)
            if with_exposure:
                found[name] |= _exposure(models, examples, settings)
            if with_calibration:
                found[name] |= _calibration(models, rows, examples, template)
    parameters, size = model_size(models.student)
    facts: dict[str, Any] = {"parameters": parameters, "bytes": size}
    facts |= speed(models.student, models.tokenizer, prompts_of[:2], max_tokens=32)
    for numbers in found.values():
        numbers |= facts
    _print(str(model), found, facts, chosen, no_repeat_ngram_size, console)
    result = found[names[0]] if isinstance(data, str) else found
    if out is not None:
        _write(out, str(model), found, result, console)
    return result


def _load(model: str, teacher: str | None) -> _Models:
    student, tokenizer = load_model(teacher_path(model)), load_tokenizer(teacher_path(model))
    judge = None
    if teacher is not None:
        judge = load_model(teacher_path(teacher))
        rows = preflight(student, tokenizer, judge, load_tokenizer(teacher_path(teacher)))
        for one in (student, judge):
            set_vocabulary(one, rows)
    context = getattr(student.config, "max_position_embeddings", None)
    return _Models(student, tokenizer, judge, eos_tokens(student, tokenizer), context)


def _scores(scores: Scores, *, at_k: bool) -> dict[str, Any]:
    numbers: dict[str, Any] = {name: _interval(values_SP) for name, values_SP in scores.values.items()}
    right = {name: values_SP for name, values_SP in scores.values.items() if _right_or_wrong(name, values_SP)}
    if at_k and not right:
        raise RecipeError(
            f"samples: expected a metric that says right (1) or wrong (0), as accuracy or exact_match, found "
            f"{', '.join(scores.values)}: add one to the metrics"
        )
    for name, correct_SP in right.items() if at_k else ():
        answers = [[final_answer(name, completion) for completion in of_seed] for of_seed in scores.completions]
        n = len(correct_SP)
        for k in sorted({*(2**power for power in range(1, n.bit_length())), n} - {1}):
            numbers[f"{name}_pass@{k}"] = _interval(pass_at_k(correct_SP, k)[None])
            numbers[f"{name}_maj@{k}"] = _interval(majority_at_k(correct_SP, answers, k)[None])
    numbers["length_limit_share"] = _point(scores.length_limit_share)
    return numbers


def _right_or_wrong(name: str, values_SP: np.ndarray) -> bool:
    """Whether a sampled metric counts right answers: limbeck's by name, others by what they gave."""
    if name.endswith("_greedy") or name in CORPUS_SCORES:
        return False
    return name in RIGHT_OR_WRONG or (name not in SCORES and bool(np.isin(values_SP, (0, 1)).all()))


def _held_out(models: _Models, examples: list[Example]) -> dict[str, Any]:
    if not any(any(example.mask) for example in examples):
        return {}
    held = held_out(models.student, models.teacher, examples, models.tokenizer.pad_token_id)
    weights = np.array(held["per_example"]["tokens"])
    return {name: _interval(np.array(held["per_example"][name])[None], weights) for name in HELD_OUT if name in held}


def _exposure(models: _Models, examples: list[Example], settings: dict[str, Any]) -> dict[str, Any]:
    """The whole curve, and its end."""
    pad_id = models.tokenizer.pad_token_id
    curve = asdict(exposure(models.student, models.teacher, examples, pad_id=pad_id, **settings))
    ends = {"mean": curve["percent"], "low": curve["low"], "high": curve["high"]}
    return {"ex_acc_err": {name: values and values[-1] for name, values in ends.items()}, "exposure": curve}


def _calibration(
    models: _Models, rows: list[dict[str, Any]], examples: list[Example], template: str | None
) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    if any(any(example.mask) for example in examples):
        parts["tokens"] = asdict(token_calibration(models.student, examples, models.tokenizer.pad_token_id))
    if any("labels" in row for row in rows):
        parts["labels"] = asdict(
            label_calibration(models.student, models.tokenizer, rows, template=template, context=models.context)
        )
    if not parts:
        raise DataError("calibration: expected rows with a completion or with labels, found prompts alone")
    numbers = {f"ece_{name}": _point(part["ece"]) for name, part in parts.items()}
    numbers |= {f"accuracy_{name}": _point(part["accuracy"]) for name, part in parts.items()}
    return {**numbers, "calibration": parts}


def _interval(values_SP: np.ndarray, weights_P: np.ndarray | None = None) -> dict[str, Any]:
    interval = mean_interval(values_SP, seeds="evaluation", weights=weights_P)
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "values": interval.values}


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
    try:
        out.mkdir(parents=True, exist_ok=True)
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
    except OSError as error:
        raise RecipeError(f"expected to write to {out}, found {error.strerror}; name another --out") from error
    console.print(f"wrote {', '.join(written)} to {escape(str(out))}", highlight=False)
