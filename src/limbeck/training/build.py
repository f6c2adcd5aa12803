"""From a recipe to the parts of a run, every check made before a weight is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from limbeck import ranks
from limbeck.data import Summary, read, render
from limbeck.data.corpus import Corpus
from limbeck.data.embedded import TEACHER
from limbeck.decoding import Sampling
from limbeck.decoding.drafts.feature_files import is_feature
from limbeck.errors import DataError, RecipeError
from limbeck.methods import METHODS
from limbeck.models import (
    build_student,
    cast,
    check_head,
    context_length,
    eos_tokens,
    is_sharded,
    load_model,
    load_tokenizer,
    one_copy,
    preflight,
    probe_autocast,
    set_vocabulary,
)
from limbeck.models.teaching import ADAPTERS
from limbeck.objectives import OBJECTIVES, MiniLLM
from limbeck.plugins import imported
from limbeck.recipe import Recipe
from limbeck.scoring import Reward, build_reward, check_reward, lower_is_better, reward_name
from limbeck.sources import Mixed, Rewarded, Student, Teacher, TokenMix, dataset
from limbeck.teachers import TextCache, default_folder, weights_hash
from limbeck.training.memory import longest_row, shortage
from limbeck.training.trainer import Beside
from limbeck.types import Credit, Example, Objective, Source

START = "start"
"""In the place of a teacher: the student as it is before training, which regularised RL stays close to."""

OTHER_COINS = 1 << 32
"""Added to the seed for the coins between data set and teacher: not those between them and the student."""


@dataclass
class Parts:
    """Everything a run is made of. `teacher` is a model, None, or ADAPTERS (see Trainer). `longest`: tokens of the
    longest sequence that may be trained on. `notes` are for the log."""

    student: Any
    tokenizer: Any
    teacher: Any
    train: list[Example]
    held_out: list[Example]
    summary: Summary
    longest: int
    stop_tokens: tuple[int, ...]
    autocast: torch.dtype | None
    args: TrainingArguments
    reward: Reward | None = None
    beside: Beside | None = None
    notes: list[str] = field(default_factory=list[str])


def build(recipe: Recipe, *, student: Any = None, teacher: Any = None, rows: Any = None, reward: Any = None) -> Parts:
    """Loads models and data and checks that they fit. `student` and `teacher` may be (model, tokenizer) in memory,
    `rows` a data set in memory, `reward` a function; each takes the place of what the recipe names.

    Raises LimbeckError: RecipeError, DataError, ModelError, PreflightError.
    """
    if recipe.student.path is not None and is_feature(recipe.student.path):
        raise RecipeError(
            f"student {recipe.student.path}: expected a language model, found a feature draft, which `limbeck distill` "
            "trains with method=draft, and nothing else does: name a model"
        )
    args = training_arguments(recipe)
    _check_samples(recipe, args)
    notes: list[str] = []
    from_start = recipe.teacher == START and teacher is None
    teacher_model: Any = None
    teacher_tokenizer: Any = None
    if not from_start:
        teacher_model, teacher_tokenizer = load_teacher(recipe, args, teacher, notes)
    student_model, tokenizer = _student(recipe, args, student, teacher_model, teacher_tokenizer)
    if from_start and recipe.student.lora is None:
        teacher_model, teacher_tokenizer = copy.deepcopy(student_model).requires_grad_(False).eval(), tokenizer
    if from_start and recipe.student.lora is not None or teacher_model is not None and _shares_weights(recipe):
        teacher_model = ADAPTERS
    elif teacher_model is not None:
        vocabulary = preflight(student_model, tokenizer, teacher_model, teacher_tokenizer)
        set_vocabulary(student_model, vocabulary)
        set_vocabulary(teacher_model, vocabulary)
    else:
        check_head(student_model)
    autocast = _autocast(recipe.precision, args, student_model, notes)
    train, held_out, summary = load_data(recipe, tokenizer, student_model, rows)
    parts = Parts(
        student=student_model,
        tokenizer=tokenizer,
        teacher=teacher_model,
        train=train,
        held_out=held_out,
        summary=summary,
        longest=longest_row(recipe, train),
        stop_tokens=eos_tokens(student_model, tokenizer),
        autocast=autocast,
        args=args,
        reward=_reward(recipe, reward, train, args.device),
        beside=_beside(recipe, tokenizer, notes),
        notes=notes,
    )
    notes.extend(filter(None, [shortage(parts)]))
    return parts


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """transformers' arguments from the recipe's `training`, with limbeck's defaults."""
    steps = recipe.evaluation.steps
    settings: dict[str, Any] = {
        "logging_steps": 1,
        "report_to": "none",
        "save_total_limit": 2,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Without it, transformers takes ranks on a machine without a GPU for processes that know nothing of each other.
        **({"use_cpu": True} if ranks.count() > 1 and not torch.cuda.is_available() else {}),
        **recipe.training,
        "output_dir": str(Path(recipe.output) / "checkpoints"),
        "seed": recipe.seed,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
    }
    if steps:
        best = recipe.evaluation.best or ("forward_kl" if recipe.teacher else "loss")
        settings = {
            "save_strategy": "steps",
            "save_steps": steps,
            **settings,
            "eval_strategy": "steps",
            "eval_steps": steps,
            "load_best_model_at_end": True,
            "metric_for_best_model": f"eval_{best}",
            "greater_is_better": not lower_is_better(best),
        }
    try:
        return TrainingArguments(**settings)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"training: {' '.join(str(error).split())}") from None


def build_source(recipe: Recipe, parts: Parts, upcoming: Callable[[int], list[Example]] | None = None) -> Source:
    """Who writes, by the method's line in METHODS. `upcoming` is for the teacher (see `sources.Teacher`)."""
    name = METHODS[recipe.method].source
    as_it_is = partial(dataset, stop_tokens=parts.stop_tokens)
    if name == "dataset":
        return as_it_is
    if name == "teacher":
        return _writing_teacher(recipe, parts, upcoming)
    if is_sharded(parts.student):
        raise RecipeError(
            f"method {recipe.method}: expected a student that is whole on every rank to write with; found one "
            "sharded by FSDP; use DDP (plain torchrun), or a method that does not write: sft, seqkd, kd"
        )
    if name == "token_mix":
        if parts.teacher == ADAPTERS:
            raise RecipeError(
                f"method {recipe.method}: expected a teacher beside the student, to write with it token by token; "
                "found the student's own base under LoRA; use another teacher, or method gkd"
            )
        sampling, share = _sampling(recipe, parts), _own(recipe, "teacher_mix")
        return TokenMix(parts.student, parts.teacher, share, sampling, parts.tokenizer)
    int8, samples = _own(recipe, "int8_rollouts"), _own(recipe, "samples")
    writer = Student(parts.student, _sampling(recipe, parts), parts.tokenizer, int8, samples)
    offline: Source = as_it_is
    if _own(recipe, "offline") != "dataset":
        offline = _writing_teacher(recipe, parts, upcoming)
    if _own(recipe, "offline") == "both":
        offline = Mixed(offline, as_it_is, 0.5, "sequence", recipe.seed + OTHER_COINS)
    return Mixed(writer, offline, _own(recipe, "lmbda"), _own(recipe, "lmbda_unit"), recipe.seed)


def build_objective(recipe: Recipe, *, rewarded: bool = False) -> Objective:
    """What the student minimises, by the method's line in METHODS; a reward makes GKD's divergence part of `policy`."""
    name = METHODS[recipe.method].objective
    if name == "policy":
        return partial(OBJECTIVES[name], name="reverse_kl", clip=_own(recipe, "clip"))
    if name != "divergence":
        return OBJECTIVES[name]
    objective = OBJECTIVES[name]
    if rewarded:
        alpha = _own(recipe, "alpha")
        objective = partial(OBJECTIVES["policy"], divergence_weight=alpha, policy_weight=1 - alpha, per_sequence=True)
    divergence = _own(recipe, "divergence")
    name = divergence.name
    return partial(
        objective,
        name=imported(name, "a divergence (student_logprobs_NV, teacher_logprobs_NV) -> (N,)") if ":" in name else name,
        temperature=divergence.temperature,
        cross_entropy_weight=_own(recipe, "cross_entropy_weight"),
        **divergence.params,
    )


def build_credit(recipe: Recipe, parts: Parts) -> Credit | None:
    """What the tokens earn: MiniLLM's later rewards, a reward's advantage, or nothing."""
    if recipe.method == "minillm":
        return MiniLLM(**_own(recipe, "credit"))
    if parts.reward is None:
        return None

    def row_of(index: int) -> dict[str, Any]:
        return parts.train[index].row

    samples = _own(recipe, "samples")
    baseline = _own(recipe, "baseline") or ("leave_one_out" if samples > 1 else "running_mean")
    return Rewarded(parts.reward, row_of, parts.tokenizer, parts.stop_tokens, samples, baseline)


def _check_samples(recipe: Recipe, args: TrainingArguments) -> None:
    """A prompt's samples stay together, in one batch of one rank."""
    samples = getattr(recipe, "samples", 1)
    if args.train_batch_size % samples:
        raise RecipeError(
            f"samples: expected a divisor of training.per_device_train_batch_size {args.train_batch_size}, which "
            f"counts sequences, found {samples}: a prompt's samples stay together"
        )


def _beside(recipe: Recipe, tokenizer: Any, notes: list[str]) -> Beside | None:
    """MiniLLM's language-modelling term. RecipeError where it has a weight and no text."""
    if recipe.method != "minillm" or _own(recipe, "corpus_weight") == 0:
        return None
    if recipe.data.corpus is None:
        raise RecipeError(
            "data.corpus: expected plain text for the language-modelling term, found none; name files of text, or set "
            "corpus_weight=0"
        )
    share = _own(recipe, "teacher_share")
    corpus = Corpus(recipe.data.corpus, tokenizer, recipe.data.corpus_tokens)
    notes.append(
        f"plain text: {len(corpus.blocks)} blocks of {recipe.data.corpus_tokens} tokens, {corpus.left_out} left over"
    )
    objective = partial(OBJECTIVES["language_modelling"], teacher_share=share)
    return Beside(corpus, objective, _own(recipe, "corpus_weight"), needs_teacher=share > 0)


def _reward(recipe: Recipe, reward: Any, train: list[Example], device: Any) -> Reward | None:
    """The reward of the recipe, or the one in memory, its columns checked on all rows."""
    spec = reward if reward is not None else getattr(recipe, "reward", None)
    if spec is None:
        if getattr(recipe, "distill_weight", None) not in (None, 1.0):
            raise RecipeError(
                f"distill_weight: expected a reward beside it, found {_own(recipe, 'distill_weight')} alone"
            )
        return None
    if recipe.method != "gkd":
        raise RecipeError(f"reward: expected method gkd, which takes one, found {recipe.method}")
    recipe.replaced(reward=reward_name(spec))  # a reward in memory asks for the same sampling as one that has a name
    check_reward(spec, [example.row for example in train])
    return build_reward(spec, device=device)


def teacher_path(name: str) -> str:
    """`embedded` is the teacher that ships in the package."""
    return str(TEACHER) if name == "embedded" else name


def _own(recipe: Recipe, key: str) -> Any:
    return getattr(recipe, key)


def _sampling(recipe: Recipe, parts: Parts) -> Sampling:
    return Sampling(seed=recipe.seed, stop_tokens=parts.stop_tokens, **recipe.sampling.model_dump())


def _writing_teacher(recipe: Recipe, parts: Parts, upcoming: Callable[[int], list[Example]] | None) -> Teacher:
    sampling = _sampling(recipe, parts)
    cache = TextCache(default_folder(), weights_hash(parts.teacher), sampling)
    return Teacher(parts.teacher, sampling, parts.tokenizer, cache, upcoming)


def load_teacher(recipe: Recipe, args: TrainingArguments, teacher: Any, notes: list[str]) -> tuple[Any, Any]:
    """(model, tokenizer), or (None, None) where the recipe names no teacher and its method needs none."""
    if teacher is not None:
        model, tokenizer = teacher
        return model.requires_grad_(False).eval(), tokenizer
    needs = METHODS[recipe.method].signal != "none" or METHODS[recipe.method].source == "teacher"
    if recipe.teacher is None:
        if needs or recipe.student.from_teacher:
            why = f"method {recipe.method}" if needs else "student.from_teacher"
            raise RecipeError(f"teacher: {why} needs one; found none; set teacher=FOLDER or a hub id")
        return None, None
    path = teacher_path(recipe.teacher)
    tokenizer = load_tokenizer(path, trust_remote_code=recipe.trust_remote_code)
    dtype = torch.bfloat16 if recipe.teacher_precision == "bf16" else torch.float32
    model = load_model(path, dtype=dtype, device=args.device, trust_remote_code=recipe.trust_remote_code)
    if recipe.teacher_precision == "auto" and not _shares_weights(recipe):
        probed, described = probe_autocast(args.device, model.config.get_text_config().hidden_size)
        model = cast(model, probed) if probed is not None else model
        notes.append(f"teacher in {'bf16' if probed else 'fp32'} ({described})")
    return model.requires_grad_(False), tokenizer


def _shares_weights(recipe: Recipe) -> bool:
    return recipe.teacher is not None and one_copy(_student_spec(recipe), teacher_path(recipe.teacher))


def _student_spec(recipe: Recipe) -> dict[str, Any]:
    spec = recipe.student.model_dump(exclude_none=True)
    if "path" in spec:
        spec["path"] = teacher_path(spec["path"])
    return spec


def _student(recipe: Recipe, args: TrainingArguments, student: Any, teacher: Any, teacher_tokenizer: Any) -> Any:
    if student is not None:
        return student
    return build_student(
        _student_spec(recipe),
        teacher,
        teacher_tokenizer,
        dtype=torch.float32,
        device=args.device,
        seed=recipe.seed,
        trust_remote_code=recipe.trust_remote_code,
    )


def _autocast(precision: str, args: TrainingArguments, student: Any, notes: list[str]) -> torch.dtype | None:
    if precision != "auto":
        notes.append(f"precision {precision}, as the recipe says")
        return torch.bfloat16 if precision == "bf16" else None
    dtype, described = probe_autocast(args.device, student.config.get_text_config().hidden_size)
    notes.append(described)
    return dtype


def load_data(recipe: Recipe, tokenizer: Any, model: Any, rows: Any) -> tuple[list[Example], list[Example], Summary]:
    """(the examples to train on, those held out, a summary of the first), for a model that reads `context_length`
    tokens; `rows` as in `build`."""
    source = rows if rows is not None else recipe.data.train
    if source is None:
        raise RecipeError("data.train: expected a file, a hub id or a list of them; found none")
    settings: dict[str, Any] = {
        "template": recipe.data.template,
        "train_on": recipe.data.train_on,
        "context": context_length(model),
        "max_length": recipe.data.max_length,
        "prompt_tokens": recipe.data.prompt_tokens,
        "split": recipe.data.split,
    }
    training = read(source, columns=recipe.data.columns)[: recipe.data.rows]
    if recipe.data.eval is not None:
        held_out = read(recipe.data.eval, columns=recipe.data.columns)
    elif isinstance(source, list) and recipe.data.train is source:
        raise RecipeError(
            "data.eval: expected one beside a mixture (its rows may repeat, so none can be held out); found none"
        )
    else:
        count = min(max(len(training) // 20, 1), recipe.evaluation.rows)
        training, held_out = training[:-count], training[-count:]
        if not training:
            raise DataError(
                "data.train: expected more than one row, or data.eval; found one row: nothing is left to hold out"
            )
    train, summary = render(training, tokenizer, **settings)
    _check_learnable(recipe, train)
    return train, render(held_out, tokenizer, **settings)[0], summary


def _check_learnable(recipe: Recipe, train: list[Example]) -> None:
    """A method that trains on the data set's own text needs completions there."""
    offline = METHODS[recipe.method].source == "dataset" or (
        recipe.method == "gkd" and _own(recipe, "offline") != "teacher" and _own(recipe, "lmbda") < 1
    )
    if offline and not any(any(example.mask) for example in train):
        raise DataError(
            f"data.train: method {recipe.method} trains on the data set's completions; found prompts alone; "
            "add completions, or use method=seqkd or gkd with lmbda=1"
        )
