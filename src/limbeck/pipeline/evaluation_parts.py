"""What an evaluation of models consists of: what each writes, how far each is from reference texts, exposure,
calibration. Each part is a cell, which is kept as soon as it is there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from limbeck.decoding import Completion, Sampling, generate
from limbeck.errors import RecipeError
from limbeck.evaluation import (
    EX_ACC_ERR,
    Write,
    exposure,
    held_out_together,
    label_calibration,
    token_calibration,
)
from limbeck.models import (
    cast,
    context_length,
    eos_tokens,
    fingerprint,
    load_model,
    load_tokenizer,
    preflight,
    probe_autocast,
    set_vocabulary,
    vocabulary_rows,
)
from limbeck.pipeline.cells import Cells
from limbeck.pipeline.evaluated import short_names
from limbeck.training.build import teacher_path
from limbeck.types import Example


@dataclass(frozen=True, slots=True)
class Models:
    """A student and its teacher. `name`: short, and no other model's. `facts`, `teacher_facts`: which they are, and in
    which precision."""

    name: str
    student: Any
    tokenizer: Any
    teacher: Any
    stops: tuple[int, ...]
    context: int | None
    autocast: torch.dtype | None
    facts: dict[str, Any]
    teacher_facts: dict[str, Any]


def load(folders: Sequence[str | Path], teacher: str | None, precision: str) -> tuple[dict[str, Models], str]:
    """By folder, and a line that says in which precision they are. RecipeError where a folder comes twice, ModelError
    for one that cannot be loaded or that does not fit the teacher."""
    names = [str(folder) for folder in folders]
    if not names or len(set(names)) < len(names):
        raise RecipeError(f"expected models that differ from each other, found {', '.join(names) or 'none'}")
    loaded = [(load_model(teacher_path(name)), load_tokenizer(teacher_path(name))) for name in names]
    autocast, described = torch.bfloat16 if precision == "bf16" else None, f"precision {precision}, as asked for"
    if precision == "auto":
        widest = max(student.config.get_text_config().hidden_size for student, _ in loaded)
        autocast, described = probe_autocast(loaded[0][0].device, widest)
    judge, judge_facts = None, {}
    if teacher is not None:
        judge, judges = load_model(teacher_path(teacher)), load_tokenizer(teacher_path(teacher))
        for student, tokenizer in loaded:
            rows = preflight(student, tokenizer, judge, judges)
            for one in (student, judge):
                set_vocabulary(one, rows)
        judge = judge if autocast is None else cast(judge, autocast)
        judge_facts = _identity(judge, autocast)
    short = short_names(names)
    models = {
        name: Models(
            short[name],
            student,
            tokenizer,
            judge,
            eos_tokens(student, tokenizer),
            context_length(student),
            autocast,
            _identity(student, autocast),
            judge_facts,
        )
        for name, (student, tokenizer) in zip(names, loaded, strict=True)
    }
    return models, described


def writing(models: Models, data: str, cells: Cells) -> Write:
    """What `evaluate` takes to write with."""

    def write(prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        seed = f"sampled-seed{sampling.seed}" if sampling.n == 1 else f"sampled-{sampling.n}"
        found = cells.get(
            _name(models.name, data, seed if sampling.temperature else "greedy"),
            {**models.facts, "prompts": _digest(prompts), "sampling": asdict(sampling)},
            lambda: {"completions": [asdict(one) for one in generate(models.student, prompts, sampling)]},
        )
        return [Completion(**one) for one in found["completions"]]

    return write


def held_out_of(
    folders: Mapping[str, Models], examples_of: Mapping[str, list[Example]], data: str, cells: Cells
) -> dict[str, dict[str, Any]]:
    """By folder what `held_out` finds, where there is a reference text. A teacher reads the rows once for all models
    that read the same tokens."""
    groups: dict[str, list[str]] = {}
    for folder, examples in examples_of.items():
        if has_reference(examples):
            groups.setdefault(_digest(examples), []).append(folder)
    found: dict[str, dict[str, Any]] = {}
    for digest, group in groups.items():
        first = folders[group[0]]

        def compute(group: list[str] = group, first: Models = first) -> dict[str, Any]:
            students = [folders[folder].student for folder in group]
            pad_id = first.tokenizer.pad_token_id
            return {"held_out": held_out_together(students, first.teacher, examples_of[group[0]], pad_id)}

        students = [folders[folder].facts for folder in group]
        facts = {"students": students, "teacher": first.teacher_facts, "examples": digest}
        name = _name("+".join(folders[folder].name for folder in group), data, "reference-texts")
        found |= dict(zip(group, cells.get(name, facts, compute)["held_out"], strict=True))
    return found


def exposure_of(models: Models, examples: list[Example], max_tokens: int, data: str, cells: Cells) -> dict[str, Any]:
    """The whole curve, and its end."""
    settings: dict[str, Any] = {"max_tokens": max_tokens, "stop_tokens": models.stops}

    def compute() -> dict[str, Any]:
        pad_id = models.tokenizer.pad_token_id
        curve = exposure(models.student, models.teacher, examples, pad_id=pad_id, **settings)
        return {EX_ACC_ERR: curve.end, "exposure": asdict(curve)}

    facts = {**models.facts, "teacher": models.teacher_facts, "examples": _digest(examples), **settings}
    return cells.get(_name(models.name, data, "exposure"), facts, compute)


def calibration_of(
    models: Models, rows: list[dict[str, Any]], examples: list[Example], template: str | None, data: str, cells: Cells
) -> dict[str, Any]:
    """ECE and accuracy of the reference's tokens and of label words, where there are such, with their bins."""

    def compute() -> dict[str, Any]:
        parts: dict[str, Any] = {}
        if has_reference(examples):
            parts["tokens"] = asdict(token_calibration(models.student, examples, models.tokenizer.pad_token_id))
        if any("labels" in row for row in rows):
            parts["labels"] = asdict(
                label_calibration(models.student, models.tokenizer, rows, template=template, context=models.context)
            )
        return parts

    facts = {**models.facts, "examples": _digest(examples), "rows": _digest(rows), "template": template}
    parts = cells.get(_name(models.name, data, "calibration"), facts, compute)
    numbers = {f"ece_{name}": point(part["ece"]) for name, part in parts.items()}
    numbers |= {f"accuracy_{name}": point(part["accuracy"]) for name, part in parts.items()}
    return {**numbers, "calibration": parts}


def has_reference(examples: list[Example]) -> bool:
    """Whether any of them has a text to be learnt."""
    return any(any(example.mask) for example in examples)


def point(value: float) -> dict[str, Any]:
    """A number without an interval."""
    return {"mean": value, "low": None, "high": None}


def _identity(model: Any, autocast: torch.dtype | None) -> dict[str, Any]:
    weights = fingerprint(dict(model.named_parameters()))
    return {
        "weights": weights,
        "config": model.config.to_json_string(),
        "vocabulary": vocabulary_rows(model),
        "autocast": str(autocast),
    }


def _name(models: str, data: str, part: str) -> str:
    return f"{models}/{Path(data).name}/{part}"


def _digest(values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]
