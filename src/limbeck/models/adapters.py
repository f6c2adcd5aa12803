"""LoRA: trained adapters on frozen weights, which stay the teacher's while the adapters are off."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck.errors import ModelError
from limbeck.models.causal import eos_tokens, unwrap
from limbeck.models.load import PathLike

LORA_KEYS = ("r", "alpha", "dropout", "target_modules")


def with_lora(model: PreTrainedModel, wanted: Mapping[str, Any] | None) -> Any:
    """`model` under LoRA (Hu et al. 2021): its weights are frozen where they lie, fresh adapters change nothing yet."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ModelError("student.lora: expected the package peft, found none; pip install peft") from None
    values = dict(wanted or {})
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=values.get("r", 8),
        lora_alpha=values.get("alpha", 16),
        lora_dropout=values.get("dropout", 0.0),
        target_modules=values.get("target_modules", "all-linear"),
    )
    return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]


def one_copy(spec: Any, teacher: PathLike | PreTrainedModel | None) -> bool:
    """Whether the student is LoRA on the teacher itself, so that one copy of the base weights serves both."""
    if not isinstance(spec, Mapping) or "lora" not in spec or teacher is None:
        return False
    if "path" not in spec:
        return False
    return _same_place(spec["path"], str(teacher.name_or_path) if isinstance(teacher, PreTrainedModel) else teacher)


@contextmanager
def adapters_off(model: nn.Module) -> Generator[PreTrainedModel]:
    """`with adapters_off(student) as teacher:` the base under a LoRA student, as it was: adapters off, no dropout.

    Works on a student wrapped by DDP; modes are restored on leaving. Raises ModelError where there are no adapters.
    """
    outer = _with_adapters(model)
    if outer is None:
        raise ModelError("expected a student with LoRA adapters to turn off, found none; set student.lora")
    modes = [(module, module.training) for module in outer.modules()]
    outer.eval()
    try:
        with outer.disable_adapter():
            yield unwrap(outer)
    finally:
        for module, mode in modes:
            module.training = mode


def save_student(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: PathLike) -> None:
    """A folder that `AutoModelForCausalLM` and `AutoTokenizer` load: adapters are merged into a copy of the weights.

    Its generation config lists every id that ends a completion (`eos_tokens`), so that it stops where it was taught to.
    """
    outer = _with_adapters(model)
    plain = unwrap(model) if outer is None else copy.deepcopy(outer).merge_and_unload(safe_merge=True)
    ends = list(eos_tokens(model, tokenizer))
    plain.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _with_adapters(model: nn.Module) -> Any | None:
    """The peft model under DDP or `torch.compile`, or None."""
    outer: Any = model
    while outer is not None and not hasattr(outer, "merge_and_unload"):
        if isinstance(outer, PreTrainedModel):
            return None
        outer = getattr(outer, "_orig_mod", None) or getattr(outer, "module", None)
    return outer


def _same_place(one: PathLike, other: PathLike) -> bool:
    paths = [Path(path).expanduser() for path in (one, other)]
    if all(path.exists() for path in paths):
        return paths[0].resolve() == paths[1].resolve()
    return str(one) == str(other)
