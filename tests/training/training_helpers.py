"""A tiny pair on the embedded task, and one optimiser step whose gradients are kept, in float64.

Shared by the tests of training and by the ranks that they start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from limbeck.recipe import Recipe
from limbeck.training import build
from limbeck.training.build import build_objective, build_source
from limbeck.training.trainer import Trainer

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def tiny_recipe(output: Path, method: str = "kd", **changes: Any) -> Recipe:
    """A recipe that trains in a second; `training` is laid over the defaults here."""
    training = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 2}
    settings: dict[str, Any] = {
        "method": method,
        "teacher": "embedded",
        "student": {"from_config": TINY},
        "data": {"train": "embedded:train:24", "eval": "embedded:eval:8"},
        "sampling": {"max_tokens": 12},
        "evaluation": {"prompts": 0},
        "precision": "fp32",
        "teacher_precision": "fp32",
        **changes,
        "output": str(output),
    }
    settings["training"] = {**training, **changes.get("training", {})}
    return Recipe.parse(settings)


METHODS = {
    "sft": {},
    "kd": {},
    "kd-mixed": {"method": "kd", "cross_entropy_weight": 0.5, "divergence": {"name": "reverse_kl", "temperature": 2.0}},
    "gkd": {"lmbda": 1.0},
    "gkd-half": {"method": "gkd", "lmbda": 0.5, "divergence": {"name": "skew_forward_kl"}},
    "seqkd": {},
}


class Keep(TrainerCallback):
    """Copies every gradient before the optimiser takes its step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients(
    output: Path,
    method: str,
    *,
    batch: int,
    accumulation: int,
    reverse: bool = False,
    extra_padding: int = 0,
) -> tuple[dict[str, torch.Tensor], float]:
    """(gradients by parameter, logged loss) of one optimiser step over the first eight rows."""
    changes = dict(METHODS[method])
    training = {
        "max_steps": 1,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "use_cpu": True,
    }
    made = tiny_recipe(output, changes.pop("method", method), training=training, **changes)
    parts = build(made)
    parts.student = parts.student.double()
    parts.teacher = parts.teacher.double()
    eight = parts.train[:8]
    keep = Keep()
    trainer = (Padded if extra_padding else Trainer)(
        model=parts.student,
        args=parts.args,
        examples=eight[::-1] if reverse else eight,
        source=build_source(made, parts),
        objective=build_objective(made),
        teacher=parts.teacher,
        tokenizer=parts.tokenizer,
        callbacks=[keep],
    )
    if isinstance(trainer, Padded):
        trainer.extra = extra_padding
    trainer.train()
    (loss,) = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {name.removeprefix("module."): grad for name, grad in keep.found.items()}, loss


class Padded(Trainer):
    """Every micro-batch gets more columns of padding."""

    extra = 0

    def _collate(self, rollouts: Any) -> dict[str, torch.Tensor]:
        batch = super()._collate(rollouts)
        tokenizer: Any = self.processing_class
        pad = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "learnt": False, "written_logprobs": torch.nan}
        return {
            name: torch.nn.functional.pad(tensor, (0, self.extra), value=pad[name]) if name in pad else tensor
            for name, tensor in batch.items()
        }
