"""Students: a folder, a teacher with fewer layers, fresh weights from a configuration, each with LoRA beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from limbeck.errors import ModelError, RecipeError, did_you_mean
from limbeck.models.adapters import LORA_KEYS, one_copy, with_lora
from limbeck.models.layers import cut_layers
from limbeck.models.linear import fast_linears
from limbeck.models.load import PathLike, load_model, load_tokenizer, locate, move

_ORIGINS = ("path", "from_teacher", "from_config")


def build_student(
    spec: PathLike | Mapping[str, Any],
    teacher: PathLike | PreTrainedModel | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A student and its tokenizer, in eval mode, from the recipe's `student`:

    - `"path"` or `{"path": "path"}`: a model as `load_model` reads it; with `"tokenizer": "teacher"` beside it, the
      teacher's tokenizer, EOS and chat template stand in for its own (the ids of the same tokens must agree);
    - `{"from_teacher": {"layers": [0, 2, 4]}}`: those layers of the teacher (`cut_layers`);
    - `{"from_config": {...} or "folder"}`: random weights drawn under `seed`, the teacher's tokenizer and vocabulary.

    `"lora": {"r": 8, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear"}` beside any of them freezes the
    weights and trains adapters. If `path` is the teacher (`one_copy`), a teacher given as a model is wrapped itself, so
    that its weights are in memory once; run it as the teacher under `adapters_off`.

    `"freeze": ["embed_tokens", "lm_head"]` keeps the parameters whose names hold one of these as they are: a student
    cut from its teacher starts with the teacher's own embeddings, and a step costs far less without their gradients.

    Raises RecipeError (unknown or contradictory keys) and ModelError (files).
    """
    wanted = _checked(spec)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if "from_config" in wanted:
            tokenizer = _tokenizer_of(teacher, teacher_tokenizer)
            model = _from_config(wanted["from_config"], tokenizer, dtype)
        elif "from_teacher" in wanted:
            tokenizer = _tokenizer_of(teacher, teacher_tokenizer)
            whole = _loaded(teacher, dtype, trust_remote_code)
            model = cut_layers(whole, wanted["from_teacher"]["layers"], dtype=dtype)
        elif one_copy(wanted, teacher):
            tokenizer = _tokenizer_of(teacher, teacher_tokenizer)
            model = _loaded(teacher, dtype, trust_remote_code)
        else:
            model = load_model(wanted["path"], dtype=dtype, trust_remote_code=trust_remote_code)
            tokenizer = load_tokenizer(wanted["path"], trust_remote_code=trust_remote_code)
        if wanted.get("tokenizer") == "teacher":
            tokenizer = _take_tokenizer(model, tokenizer, _tokenizer_of(teacher, teacher_tokenizer))
        if device is not None:
            model = move(model, device)
        if "lora" in wanted:
            model = with_lora(model, wanted["lora"])
        if "freeze" in wanted:
            _freeze(model, wanted["freeze"])
    return fast_linears(model).eval(), tokenizer


def _freeze(model: PreTrainedModel, parts: list[str]) -> None:
    """Raises RecipeError for a part that is in no parameter's name (of tied parameters, either name), and where nothing
    is left to train."""
    names = [(name, parameter) for name, parameter in model.named_parameters(remove_duplicate=False)]
    for part in parts:
        chosen = [parameter for name, parameter in names if part in name]
        if not chosen:
            kinds = sorted({piece for name, _ in names for piece in name.split(".") if not piece.isdigit()})
            raise RecipeError(f"student.freeze: expected parts of parameter names ({', '.join(kinds)}); found {part}")
        for parameter in chosen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for _, parameter in names):
        raise RecipeError(f"student.freeze: expected something left to train; found every parameter in {parts}")


def _checked(spec: Any) -> Mapping[str, Any]:
    if isinstance(spec, str | Path):
        return {"path": spec}
    known = (*_ORIGINS, "lora", "tokenizer", "freeze")
    for key in spec:
        if key not in known:
            raise RecipeError(f"student: expected {', '.join(known)}; found {key}{did_you_mean(key, known)}")
    origins = [key for key in _ORIGINS if key in spec]
    if len(origins) != 1:
        raise RecipeError(f"student: expected one of {', '.join(_ORIGINS)}; found {', '.join(origins) or 'none'}")
    if spec.get("tokenizer", "teacher") != "teacher":
        raise RecipeError(f"student.tokenizer: expected teacher, or nothing; found {spec['tokenizer']}")
    if "from_teacher" in spec and set(spec["from_teacher"]) != {"layers"}:
        raise RecipeError(f"student.from_teacher: expected {{layers: [...]}}, found {dict(spec['from_teacher'])}")
    for key in spec.get("lora") or {}:
        if key not in LORA_KEYS:
            raise RecipeError(
                f"student.lora: expected {', '.join(LORA_KEYS)}; found {key}{did_you_mean(key, LORA_KEYS)}"
            )
    return spec


def _tokenizer_of(
    teacher: PathLike | PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    if tokenizer is not None:
        return tokenizer
    if teacher is None:
        raise RecipeError("student: this student takes the teacher's tokenizer, found no teacher; set `teacher`")
    return load_tokenizer(str(teacher.name_or_path) if isinstance(teacher, PreTrainedModel) else teacher)


def _loaded(teacher: PathLike | PreTrainedModel | None, dtype: torch.dtype, trust: bool) -> PreTrainedModel:
    if teacher is None:
        raise RecipeError("student: this student is made from the teacher, found no teacher; set `teacher`")
    if isinstance(teacher, PreTrainedModel):
        return teacher
    return load_model(teacher, dtype=dtype, trust_remote_code=trust)


def _from_config(
    wanted: Mapping[str, Any] | PathLike, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> PreTrainedModel:
    rows = max(tokenizer.get_vocab().values()) + 1
    if isinstance(wanted, Mapping):
        config = _config_from_dict(dict(wanted))
    else:
        source, options = locate(wanted)
        config = AutoConfig.from_pretrained(source, **options)
    config.vocab_size = rows
    _set_special_ids(config, tokenizer)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _config_from_dict(values: dict[str, Any]) -> PreTrainedConfig:
    kind = values.pop("model_type", None)
    if kind is None:
        raise RecipeError("student.from_config: expected model_type (llama, qwen2, gpt2, ...), found none; add it")
    try:
        default = AutoConfig.for_model(kind)
    except ValueError:
        raise RecipeError(f"student.from_config: expected a model_type of transformers, found {kind}") from None
    if "vocab_size" in values:
        raise RecipeError("student.from_config: the vocabulary is the teacher's; leave out vocab_size")
    known = [*default.to_dict(), *default.attribute_map]
    for key in values:  # transformers keeps unknown keys without a word
        if key not in known:
            hint = did_you_mean(key, known) or "; leave it out"
            raise RecipeError(f"student.from_config: expected keys of {kind}'s configuration, found {key}{hint}")
    return AutoConfig.for_model(kind, **values)


def _take_tokenizer(
    model: PreTrainedModel, own: PreTrainedTokenizerBase, teachers: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    known = teachers.get_vocab()
    for token, place in own.get_vocab().items():
        if known.get(token, place) != place:
            raise ModelError(
                f"student.tokenizer: expected the teacher's ids for the student's tokens, found {token!r} as {place} "
                f"in the student and {known[token]} in the teacher; the two vocabularies are different"
            )
    for config in (model.config, model.generation_config):
        _set_special_ids(config, teachers)
    return teachers


def _set_special_ids(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """The ids by which a saved model stops and pads when it serves."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
