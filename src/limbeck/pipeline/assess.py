"""The numbers of a run: the student before and after, and its teacher, on fixed prompts with fixed seeds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from limbeck.errors import RecipeError
from limbeck.evaluation import (
    EX_ACC_ERR,
    HELD_OUT,
    build_metrics,
    evaluate,
    exposure,
    held_out,
    held_out_intervals,
    mean_interval,
    speed,
)
from limbeck.methods import METHODS
from limbeck.models import adapters_off, autocast_to, model_size
from limbeck.models.teaching import ADAPTERS
from limbeck.recipe import Recipe
from limbeck.teachers import weights_hash
from limbeck.training import Parts
from limbeck.types import Example


class Assessor:
    """Evaluates the models of a run. What teacher and start score is kept in `memo`, by the weights' hash.

    Raises what `evaluation.build_metrics` does."""

    def __init__(self, recipe: Recipe, parts: Parts, memo: Path) -> None:
        self.recipe = recipe
        self.parts = parts
        self.memo = memo
        self.settings = recipe.evaluation
        scores = [metric for metric in self.settings.metrics if metric != EX_ACC_ERR]
        self.exposed = len(scores) < len(self.settings.metrics)
        if self.exposed and parts.teacher is None:
            raise RecipeError(f"evaluation.metrics: expected a teacher for {EX_ACC_ERR}, found none: leave it out")
        self.metrics = build_metrics(scores, device=parts.args.device)
        self.prompts: list[Example] = parts.held_out[: self.settings.prompts] if self.settings.metrics else []
        self.rows = [example for example in parts.held_out if any(example.mask)][: self.settings.rows]

    def start(self) -> dict[str, Any]:
        """The student as it is now, kept for runs that start alike."""
        return self._kept(self.parts.student, self.student)

    def student(self) -> dict[str, Any]:
        """Every number of the student (see `summary`)."""
        return self._assess(self.parts.student, self.parts.teacher)

    def teacher(self) -> dict[str, Any]:
        """The same numbers of the teacher; its divergence from itself is left out."""
        if self.parts.teacher is None:
            return {"metrics": {}, "per_prompt": {}, "samples": [], "model": None}
        if self.parts.teacher == ADAPTERS:
            with adapters_off(self.parts.student) as teacher:
                return self._kept(teacher, lambda: self._assess(teacher, None))
        return self._kept(self.parts.teacher, lambda: self._assess(self.parts.teacher, None))

    def during(self, model: Any, step: int) -> dict[str, float]:
        """One evaluation while training: `eval_*`, held-out numbers and the greedy and sampled metrics of one seed."""
        numbers: dict[str, float] = {}
        if self.rows:
            held = held_out(model, self.parts.teacher, self.rows, self.parts.tokenizer.pad_token_id)
            numbers = {f"eval_{name}": held[name] for name in HELD_OUT if name in held}
        if self.prompts:
            scores = self._write(model, seeds=1)
            numbers |= {f"eval_{name}": float(values.mean()) for name, values in scores.values.items()}
        return numbers

    def summary(self, before: dict[str, Any], after: dict[str, Any], *, seconds: float, steps: int) -> dict[str, Any]:
        """evaluation.json of a run."""
        teacher = self.teacher()
        models = {name: part["model"] for name, part in (("student", after), ("teacher", teacher)) if part["model"]}
        return {
            "method": self.recipe.method,
            "label": METHODS[self.recipe.method].label,
            "metrics": after["metrics"],
            "before": before["metrics"],
            "teacher_metrics": teacher["metrics"],
            "per_prompt": after["per_prompt"],
            "before_per_prompt": before["per_prompt"],
            "length_limit_share": after.get("length_limit_share"),
            "models": models,
            "divergence_by_position": after.get("divergence_by_position", []),
            "samples": [
                {
                    "prompt": sample["prompt"],
                    "reference": sample["reference"],
                    "teacher": teacher["samples"][i]["completion"] if teacher["samples"] else None,
                    "before": before["samples"][i]["completion"],
                    "after": sample["completion"],
                }
                for i, sample in enumerate(after["samples"])
            ],
            "seconds": seconds,
            "steps": steps,
        }

    def _assess(self, model: Any, teacher: Any) -> dict[str, Any]:
        result: dict[str, Any] = {"metrics": {}, "per_prompt": {}, "samples": []}
        with self._precision():
            if self.rows:
                held = held_out(model, teacher, self.rows, self.parts.tokenizer.pad_token_id)
                self._add_held_out(result, held)
            if self.prompts:
                scores = self._write(model, seeds=self.settings.seeds)
                for name, values_SP in scores.values.items():
                    result["metrics"][name] = asdict(mean_interval(values_SP, seeds="evaluation"))
                    result["per_prompt"][name] = values_SP.mean(0).tolist()
                result["samples"] = scores.samples
                result["length_limit_share"] = scores.length_limit_share
                if self.exposed and teacher is not None:
                    result["metrics"][EX_ACC_ERR] = self._exposure(model, teacher)
                    result["per_prompt"][EX_ACC_ERR] = [result["metrics"][EX_ACC_ERR]["mean"]]  # one of all prompts
            result["model"] = self._size_and_speed(model)
        return result

    @staticmethod
    def _add_held_out(result: dict[str, Any], held: dict[str, Any]) -> None:
        result["metrics"] |= {name: asdict(interval) for name, interval in held_out_intervals(held).items()}
        result["per_prompt"] |= held["per_example"]
        result["divergence_by_position"] = held.get("divergence_by_position", [])

    def _write(self, model: Any, seeds: int) -> Any:
        return evaluate(
            model,
            self.parts.tokenizer,
            self.prompts,
            metrics=self.metrics,
            seeds=seeds,
            sampling_temperature=self.settings.temperature,
            max_tokens=self._max_tokens,
            stop_tokens=self.parts.stop_tokens,
        )

    def _exposure(self, model: Any, teacher: Any) -> dict[str, Any]:
        """Excess accumulated error at the last length, with as many samples a prompt as there are evaluation seeds."""
        curve = exposure(
            model,
            teacher,
            self.prompts,
            max_tokens=self._max_tokens,
            stop_tokens=self.parts.stop_tokens,
            pad_id=self.parts.tokenizer.pad_token_id,
            samples=self.settings.seeds,
        )
        return {**curve.end, "values": [], "how": f"bootstrap over {len(self.prompts)} prompts"}

    @property
    def _max_tokens(self) -> int:
        return self.settings.max_tokens or self.recipe.sampling.max_tokens

    def _size_and_speed(self, model: Any) -> dict[str, Any]:
        parameters, size = model_size(model)
        prompts = [example.prompt for example in self.parts.held_out[:2]]
        measured = speed(model, self.parts.tokenizer, prompts, max_tokens=16)
        return {"name": type(model).__name__, "parameters": parameters, "bytes": size, **measured}

    def _precision(self) -> torch.autocast:
        return autocast_to(self.parts.args.device, self.parts.autocast)

    def _kept(self, model: Any, work: Any) -> dict[str, Any]:
        teacher = self.parts.teacher
        said = [
            weights_hash(model),
            None if teacher is None or teacher == ADAPTERS else weights_hash(teacher),
            self.settings.model_dump(),
            self.recipe.sampling.max_tokens,
            str(self.parts.autocast),
            [example.tokens for example in self.rows + self.prompts],
        ]
        path = self.memo / f"{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]}.json"
        if path.exists():
            return json.loads(path.read_text())
        result = work()
        self.memo.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
        return result
