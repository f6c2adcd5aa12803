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
from limbeck.training.build import build_credit, build_objective, build_source
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


CORPUS = [{"text": f"Ann has {number} red apples and {number} pears."} for number in range(20)]
MINILLM_DATA = {"train": "embedded:train:24", "eval": "embedded:eval:8", "corpus": CORPUS, "corpus_tokens": 16}

METHODS: dict[str, dict[str, Any]] = {
    "sft": {},
    "kd": {},
    "kd-mixed": {"method": "kd", "cross_entropy_weight": 0.5, "divergence": {"name": "reverse_kl", "temperature": 2.0}},
    "gkd": {"lmbda": 1.0},
    "gkd-half": {"method": "gkd", "lmbda": 0.5, "divergence": {"name": "skew_forward_kl"}},
    "seqkd": {},
    "draft": {},
    "minillm": {"data": MINILLM_DATA},
    "minillm-reference": {"method": "minillm", "variant": "reference", "data": MINILLM_DATA},
    "gkd-reward": {"method": "gkd", "reward": "length", "distill_weight": 0.3, "samples": 2},
    "gkd-reward-mixed": {"method": "gkd", "reward": "length", "lmbda": 0.5},
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
    """(gradients by parameter, logged loss) of one optimiser step over eight sequences of the first rows."""
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
    samples = getattr(made, "samples", 1)
    rows = parts.train[: 8 // samples]
    keep = Keep()
    trainer = (Padded if extra_padding else Trainer)(
        model=parts.student,
        args=parts.args,
        examples=rows[::-1] if reverse else rows,
        source=build_source(made, parts),
        objective=build_objective(made, rewarded=parts.reward is not None),
        credit=build_credit(made, parts),
        beside=parts.beside,
        samples=samples,
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

    def _collate(self, rollouts: Any) -> dict[str, Any]:
        batch = super()._collate(rollouts)
        tokenizer: Any = self.processing_class
        pad = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "learnt": False}

        def padded(tensor: torch.Tensor, value: Any) -> torch.Tensor:
            return torch.nn.functional.pad(tensor, (0, self.extra), value=value)

        wider = {name: padded(batch[name], value) for name, value in pad.items()}
        columns = {name: padded(values_BT, torch.nan) for name, values_BT in batch.get("columns", {}).items()}
        return {**batch, **wider, **({"columns": columns} if columns else {})}


def assert_both_log_probabilities(parts: Any, rollout: Any) -> None:
    """What two models noted as they wrote together is what each says of the whole text in one pass."""
    ids = torch.tensor([rollout.tokens])
    for name, model in (("student_logprobs", parts.student), ("teacher_logprobs", parts.teacher)):
        with torch.no_grad():
            logits = model(ids).logits[0, rollout.prompt_tokens - 1 : -1, : len(parts.tokenizer)].log_softmax(-1)
        expected = logits.gather(1, ids[0, rollout.prompt_tokens :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.columns[name]), expected, atol=1e-4, rtol=0)
