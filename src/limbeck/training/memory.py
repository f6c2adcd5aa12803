"""What a run will hold in memory, said before it starts: a process that outgrows its machine dies without a word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil
import torch

from limbeck.methods import METHODS
from limbeck.models import autocast_to, hidden_and_head, model_size
from limbeck.models.teaching import ADAPTERS
from limbeck.recipe import Recipe
from limbeck.types import Example

if TYPE_CHECKING:
    from limbeck.training.build import Parts

_ROWS = (4, 8)  # tokens of the two forwards whose difference is what a token keeps


def memory_forecast(parts: Parts) -> dict[str, int]:
    """Bytes by what they hold, of a run on `parts` (build.Parts): weights, gradients, Adam's two moments, the largest
    transient of the output head, and the activations of the largest micro-batch there can be.

    With activation checkpointing, which keeps a small part of them, activations are left out.
    """
    weights = model_size(parts.student)[1]
    trained = sum(p.numel() * p.element_size() for p in parts.student.parameters() if p.requires_grad)
    head = parts.student.get_output_embeddings().weight
    sizes = {
        "student": weights,
        "gradients": trained,
        "optimiser (Adam)": 2 * trained,
        "output head's gradient": head.numel() * 4 if head.requires_grad else 0,
        "activations, at most": 0,
    }
    if not parts.args.activation_checkpointing:
        rows, longest = parts.args.train_batch_size, parts.longest
        sizes["activations, at most"] = rows * longest * activation_bytes(parts.student, parts.autocast)
    if parts.teacher not in (None, ADAPTERS):
        sizes["teacher"] = model_size(parts.teacher)[1]
    return {**sizes, "sum": sum(sizes.values())}


def shortage(parts: Parts) -> str | None:
    """A line for the log where more is to come than is free, once the weights are loaded; else None."""
    sizes = memory_forecast(parts)
    coming = sizes["sum"] - sizes["student"] - sizes.get("teacher", 0)
    free = _free_bytes(parts.args.device)
    if coming <= free:
        return None
    rows = f"{parts.args.train_batch_size} rows of {parts.longest} tokens"
    return (
        f"memory may not do: up to {_gib(coming)} to come, {_gib(free)} free; up to "
        f"{_gib(sizes['activations, at most'])} of it are activations of {rows}: a smaller "
        "training.per_device_train_batch_size with as much more training.gradient_accumulation_steps is the same step, "
        "and training.activation_checkpointing=true keeps a small part of them"
    )


def longest_row(recipe: Recipe, examples: list[Example]) -> int:
    """Tokens of the longest sequence that may be trained on: a row, or a prompt with the longest completion."""
    rows = max((len(example.tokens) for example in examples), default=0)
    if METHODS[recipe.method].source == "dataset":
        return rows
    prompts = max((example.prompt_tokens for example in examples), default=0)
    return max(rows, prompts + recipe.sampling.max_tokens)


def activation_bytes(model: Any, autocast: torch.dtype | None) -> int:
    """Bytes that each token of a forward keeps for the backward pass: the difference of two short rows, so that what
    is kept once (weights, their casts) does not count. Attention that keeps its T x T weights keeps more."""
    short, long = (_kept_bytes(model, autocast, tokens) for tokens in _ROWS)
    return (long - short) // (_ROWS[1] - _ROWS[0])


def _kept_bytes(model: Any, autocast: torch.dtype | None, tokens: int) -> int:
    """Of one row: the storages that autograd saves."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    training = model.training
    model.eval()  # dropout would draw from the random numbers of the run
    try:
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.enable_grad(), hooks, autocast_to(model.device, autocast):
            hidden_and_head(model, torch.zeros(1, tokens, dtype=torch.long, device=model.device))
    finally:
        model.train(training)
    return sum(kept.values())


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
