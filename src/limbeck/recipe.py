"""The typed recipe: an unknown key is an error that names its neighbour."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from transformers import TrainingArguments

from limbeck.errors import RecipeError, did_you_mean
from limbeck.ops.divergences import DIVERGENCES
from limbeck.settings import apply_overrides, merge, read_yaml

# Set by limbeck itself; a recipe that sets them would fight the trainer.
OWNED_TRAINING_KEYS = {
    "output_dir": "use the recipe's `output`",
    "seed": "use the recipe's `seed`",
    "data_seed": "use the recipe's `seed`",
    "bf16": "use the recipe's `precision`",
    "fp16": "use the recipe's `precision`",
    "remove_unused_columns": "limbeck reads whole rows",
    "eval_strategy": "use `evaluation.steps`",
    "eval_steps": "use `evaluation.steps`",
    "logging_nan_inf_filter": "a NaN always stops the run",
    "do_train": "`limbeck distill` trains",
    "do_eval": "use `evaluation.steps`",
}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class Layers(Strict):
    layers: list[int] = Field(min_length=1)


class Student(Strict):
    """Exactly one of `path`, `from_teacher`, `from_config`.

    `lora` may stand beside any of them, `tokenizer: teacher` beside a path; `freeze` names parts of parameter names
    that stay as they are.
    """

    path: str | None = None
    from_teacher: Layers | None = None
    from_config: dict[str, Any] | str | None = None
    lora: dict[str, Any] | None = None
    tokenizer: Literal["teacher"] | None = None
    freeze: list[str] | None = Field(default=None, min_length=1)

    def model_post_init(self, _: Any) -> None:
        given = [name for name in ("path", "from_teacher", "from_config") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of path, from_teacher, from_config; found {given or 'none'}")


class Data(Strict):
    train: Any = None
    eval: Any = None
    columns: dict[str, str] | None = None
    template: str | None = None
    train_on: Literal["assistant", "last"] = "assistant"
    prompt_tokens: int | None = Field(default=None, ge=1)
    max_length: int | None = Field(default=None, ge=2)
    split: bool = False
    corpus: Any = None
    corpus_tokens: int = Field(default=128, ge=2)
    rows: int | None = Field(default=None, ge=1)


class Sampling(Strict):
    max_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)


class Divergence(Strict):
    """`name` is an entry of DIVERGENCES or `module:function`; other keys than these are the divergence's own."""

    model_config = ConfigDict(extra="allow")
    name: str = "forward_kl"
    temperature: float = Field(default=1.0, gt=0)

    def model_post_init(self, _: Any) -> None:
        if ":" not in self.name and self.name not in DIVERGENCES:
            raise ValueError(
                f"expected one of {', '.join(DIVERGENCES)}; found {self.name!r}{did_you_mean(self.name, DIVERGENCES)}"
            )
        params = self.params
        allowed = {"jsd": {"beta", "normalize"}, "skew_forward_kl": {"skew"}, "skew_reverse_kl": {"skew"}}
        wrong = [] if ":" in self.name else sorted(params.keys() - allowed.get(self.name, set()))
        if wrong:
            known = sorted(allowed.get(self.name, set())) or "no parameter"
            raise ValueError(f"{self.name} takes {known}; found {wrong[0]!r}")
        if self.name == "jsd" and not 0 < params.get("beta", 0.5) < 1:
            raise ValueError(
                f"expected 0 < beta < 1 for jsd; found {params['beta']}: at the ends it vanishes, "
                "use forward_kl (beta 0) or reverse_kl (beta 1)"
            )
        if "skew" in params and not 0 <= params["skew"] < 1:
            raise ValueError(f"expected 0 <= skew < 1; found {params['skew']}")

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Evaluation(Strict):
    """`steps`: evaluate every so many optimiser steps (0: at the end, with the last weights). `best`: the held-out
    number that picks the checkpoint. `metrics`: names (`ex_acc_err`: at the end alone), or tables as for `reward`."""

    metrics: list[str | dict[str, Any]] = []
    steps: int = Field(default=0, ge=0)
    prompts: int = Field(default=200, ge=0)
    seeds: int = Field(default=3, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    max_tokens: int | None = Field(default=None, ge=1)
    best: str | None = None
    rows: int = Field(default=200, ge=1)


class Init(Strict):
    """The start that the method goes on from: SFT with the recipe's own training settings under these overrides.
    `evaluation_steps`: every so many steps the held-out loss is taken, and the weights of the lowest are kept."""

    method: Literal["sft"] = "sft"
    training: dict[str, Any] = {}
    evaluation_steps: int = Field(default=0, ge=0)


def _short_student(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _short_init(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


class Recipe(Strict):
    """What every method needs. `Recipe.load` gives the class of the recipe's own `method`."""

    method: str
    teacher: str | None = None
    student: Annotated[Student, BeforeValidator(_short_student)]
    data: Data = Data()
    sampling: Sampling = Sampling()
    training: dict[str, Any] = {}
    evaluation: Evaluation = Evaluation()
    init: Annotated[Init | None, BeforeValidator(_short_init)] = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    teacher_precision: Literal["auto", "fp32", "bf16"] = "auto"
    trust_remote_code: bool = False
    seed: int = Field(default=0, ge=0)
    output: str = "runs/limbeck"
    methods: dict[str, dict[str, Any]] = {}

    @field_validator("training")
    @classmethod
    def _training_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
        for key in value:
            if key in OWNED_TRAINING_KEYS:
                raise ValueError(f"`{key}` is limbeck's: {OWNED_TRAINING_KEYS[key]}")
            if (key, value[key]) == ("train_sampling_strategy", "batch_rebalance"):
                raise ValueError(
                    "train_sampling_strategy: expected random, sequential or group_by_length; found "
                    "batch_rebalance: limbeck balances the micro-batches of a step itself"
                )
            if key not in known:
                raise ValueError(
                    f"no argument of transformers.TrainingArguments is called {key!r}{did_you_mean(key, known)}"
                )
        # YAML reads a bare `no` as false.
        return {key: "no" if key == "save_strategy" and kept is False else kept for key, kept in value.items()}

    @staticmethod
    def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
        """Reads a YAML file (or the name of a packaged recipe) and applies `key.sub=value` overrides.

        Raises RecipeError: a missing file, broken YAML, an unknown key, a value out of range.
        """
        return Recipe.parse(apply_overrides(read_yaml(path), overrides or []), where=str(path))

    @staticmethod
    def parse(settings: dict[str, Any], where: str = "recipe") -> Recipe:
        """Validates a plain dict by its `method`."""
        method = settings.get("method")
        if method not in RECIPES:
            hint = did_you_mean(str(method), RECIPES)
            raise RecipeError(f"{where}: method: expected one of {', '.join(RECIPES)}; found {method!r}{hint}")
        try:
            return RECIPES[method].model_validate(settings)
        except ValidationError as error:
            raise RecipeError(f"{where}: {_first_error(error, RECIPES[method])}") from None

    def settings(self) -> dict[str, Any]:
        """The resolved recipe as a plain dict."""
        return self.model_dump(mode="json")

    def yaml(self) -> str:
        return yaml.safe_dump(self.settings(), sort_keys=False, allow_unicode=True)

    def save(self, path: Path) -> None:
        path.write_text(self.yaml())

    def replaced(self, **changes: Any) -> Recipe:
        """The same recipe with some keys replaced whole."""
        return Recipe.parse({**self.model_dump(exclude_unset=True), "method": self.method, **changes})

    def started_from(self, path: str | Path) -> Recipe:
        """The recipe with the student that its `init` stage has left at `path`; what is frozen stays frozen."""
        student: dict[str, Any] = {"path": str(path)}
        if self.student.freeze is not None:
            student["freeze"] = self.student.freeze
        return self.replaced(student=student, init=None)

    def with_method(self, method: str, **changes: Any) -> Recipe:
        """The same recipe for another method: keys that are this method's own are left out, `methods.<method>` goes on
        top (its dicts are merged), then `changes`."""
        if method not in RECIPES:
            raise RecipeError(
                f"method: expected one of {', '.join(RECIPES)}; found {method!r}{did_you_mean(method, RECIPES)}"
            )
        settings = {
            key: value
            for key, value in self.model_dump(exclude_unset=True).items()
            if key in RECIPES[method].model_fields
        }
        settings["method"] = method
        merge(settings, self.methods.get(method, {}))
        settings.pop("methods", None)
        merge(settings, changes)
        return Recipe.parse(settings, where=f"methods.{method}")


class SFT(Recipe):
    method: Literal["sft"] = "sft"


class SeqKD(Recipe):
    """The teacher writes its mode (greedy), as the paper's beam approximates; `sampling.temperature` changes that."""

    method: Literal["seqkd"] = "seqkd"
    sampling: Sampling = Sampling(temperature=0.0)


class KD(Recipe):
    method: Literal["kd"] = "kd"
    divergence: Divergence = Divergence()
    cross_entropy_weight: float = Field(default=0.0, ge=0)


class Draft(KD):
    """A draft for speculative decoding of `teacher`: KD on its own answers. `student` may be `feature`."""

    method: Literal["draft"] = "draft"  # pyright: ignore[reportIncompatibleVariableOverride]


class GKD(Recipe):
    """`offline: both`: of the sequences that the student does not write, half are the teacher's.

    With a `reward` the student maximises (1 - a) E[reward] - a E[divergence], a being `distill_weight` (.5 unless
    given), over `samples` texts a prompt. `baseline`: what a reward is compared with; unless given, the prompt's other
    samples, or where there is one sample the mean of all rewards so far.
    """

    method: Literal["gkd"] = "gkd"
    divergence: Divergence = Divergence(name="jsd", beta=0.5)  # pyright: ignore[reportCallIssue]
    cross_entropy_weight: float = Field(default=0.0, ge=0)
    lmbda: float = Field(default=1.0, ge=0, le=1)
    lmbda_unit: Literal["sequence", "step"] = "sequence"
    offline: Literal["dataset", "teacher", "both"] = "dataset"
    int8_rollouts: bool = False
    samples: int = Field(default=1, ge=1)
    reward: Any = None
    distill_weight: float | None = Field(default=None, ge=0, le=1)
    baseline: Literal["leave_one_out", "running_mean"] | None = None

    @property
    def alpha(self) -> float:
        """The divergence's share of an objective with a reward."""
        return 0.5 if self.distill_weight is None else self.distill_weight

    def model_post_init(self, _: Any) -> None:
        if self.baseline == "leave_one_out" and self.samples == 1:
            raise ValueError(
                "baseline: expected samples of 2 or more for leave_one_out, found 1: set samples=4, or "
                "baseline=running_mean"
            )
        if self.reward is not None:
            _unfiltered(self.sampling, "a reward's gradient")
            if self.lmbda == 0:
                raise ValueError("reward: expected lmbda above 0, found 0: only what the student writes earns a reward")


class MiniLLM(Recipe):
    """Every option that is left out is as `variant` says: the paper (arXiv 2306.08543), or its authors' code, which
    differs from it. See `objectives.MiniLLM`."""

    method: Literal["minillm"] = "minillm"
    variant: Literal["paper", "reference"] = "paper"
    teacher_mix: float = Field(default=0.2, ge=0, lt=1)
    length_norm: bool = True
    single_step: bool = True
    importance: Literal["step", "product"] = "step"
    clip: float | None = Field(default=0.2, gt=0)
    inner_epochs: int = Field(default=4, ge=1)
    corpus_weight: float = Field(default=1.0, ge=0)
    corpus_teacher_share: float | None = Field(default=None, ge=0, le=1)
    weighted_single_step: bool | None = None
    own_reward: bool | None = None
    discount: float | None = Field(default=None, gt=0, le=1)
    reward_scale: float | None = Field(default=None, gt=0)
    reward_clip: float | None = Field(default=None, gt=0)
    whiten: bool | None = None

    def model_post_init(self, _: Any) -> None:
        _unfiltered(self.sampling, "MiniLLM's importance weights")

    @property
    def teacher_share(self) -> float:
        """The teacher's share in the language-modelling term."""
        if self.corpus_teacher_share is not None:
            return self.corpus_teacher_share
        return 0.5 if self.variant == "reference" else 0.0

    @property
    def credit(self) -> dict[str, Any]:
        """The options of `objectives.MiniLLM`."""
        always = ("teacher_mix", "length_norm", "single_step", "importance")
        given = {name: getattr(self, name) for name in REFERENCE if getattr(self, name) is not None}
        by_variant = REFERENCE if self.variant == "reference" else {}
        return {**{name: getattr(self, name) for name in always}, **by_variant, **given}


REFERENCE = {
    "weighted_single_step": False,
    "own_reward": True,
    "discount": 0.95,
    "reward_scale": 0.5,
    "reward_clip": 100.0,
    "whiten": True,
}
"""What MiniLLM's authors' code does otherwise than their paper."""


def _unfiltered(sampling: Sampling, what: str) -> None:
    if (sampling.temperature, sampling.top_p, sampling.top_k) != (1.0, 1.0, 0):
        raise ValueError(
            f"sampling: {what} expects tokens drawn from the models' own distributions (temperature 1, no top_p, no "
            f"top_k), found temperature {sampling.temperature}, top_p {sampling.top_p}, top_k {sampling.top_k}"
        )


RECIPES: dict[str, type[Recipe]] = {
    "sft": SFT,
    "seqkd": SeqKD,
    "kd": KD,
    "minillm": MiniLLM,
    "gkd": GKD,
    "draft": Draft,
}


def _first_error(error: ValidationError, recipe: type[Recipe]) -> str:
    """One line for the first mistake: where, what was expected, what was found."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        model: Any = recipe
        for part in first["loc"][:-1]:
            annotation = model.model_fields[part].annotation
            inner = [
                a
                for a in (annotation, *getattr(annotation, "__args__", ()))
                if isinstance(a, type) and issubclass(a, BaseModel)
            ]
            model = inner[0]
        hint = (
            did_you_mean(str(first["loc"][-1]), model.model_fields) or f"; known keys: {', '.join(model.model_fields)}"
        )
        return f"{place}: no such key{hint}"
    message = first["msg"].removeprefix("Value error, ")
    found = "" if first["type"] == "value_error" else f"; found {first['input']!r}"
    return f"{place}: {message}{found}" if place else f"{message}{found}"
