"""A model with some of its decoder layers, for any family of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from limbeck.errors import ModelError
from limbeck.models.load import move


def cut_layers(model: PreTrainedModel, layers: Sequence[int], *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A copy of `model` with the decoder layers `layers` alone, in that order. The model is unchanged, nothing shared.

    Works for every family whose decoder is one ModuleList of `config.num_hidden_layers` layers. Lists of the config
    with one entry a layer (`layer_types`, ...) are cut along. The copy is built from the cut config, so it is what
    `from_pretrained` builds after saving. Raises ModelError for layers out of range, none or repeated, and where a
    layer would act otherwise at its new place.
    """
    count = model.config.num_hidden_layers
    kept = [int(layer) for layer in layers]
    if not kept or len(set(kept)) < len(kept) or any(not 0 <= layer < count for layer in kept):
        raise ModelError(f"expected different layers from 0 to {count - 1}, at least one; found layers: {list(layers)}")
    prefix, stack = _layer_stack(model)
    config = _cut_config(model.config, kept)
    with torch.random.fork_rng():  # the random initial weights are overwritten
        cut: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype or model.dtype)
    new_place = {old: new for new, old in enumerate(kept)}
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(prefix + "."):
            place, rest = name[len(prefix) + 1 :].split(".", 1)
            if int(place) not in new_place:
                continue
            name = f"{prefix}.{new_place[int(place)]}.{rest}"
        weights[name] = tensor
    try:
        cut.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(
            f"{type(model).__name__}: layers {kept} do not fit their new places: {' '.join(str(error).split())[:300]}"
        ) from error
    for new, old in enumerate(kept):
        _require_same_behaviour(stack[old], cut.get_submodule(f"{prefix}.{new}"), old, new)
    cut.generation_config = type(model.generation_config).from_dict(model.generation_config.to_dict())
    return move(cut, model.device).eval()


def _layer_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    count = model.config.num_hidden_layers
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not stacks:
        raise ModelError(
            f"{type(model).__name__}: expected its {count} decoder layers in one list, found none of that length; "
            f"give the student as a folder instead"
        )
    return min(stacks, key=lambda item: item[0].count("."))  # inner lists (experts) lie deeper


def _cut_config(config: PreTrainedConfig, kept: list[int]) -> PreTrainedConfig:
    values = config.to_dict()
    count = config.num_hidden_layers
    for name, value in values.items():
        # `architectures`, `eos_token_id` may by chance be as long as there are layers.
        if isinstance(value, list) and len(value) == count and name != "architectures" and "token_id" not in name:
            values[name] = [value[layer] for layer in kept]
    values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    return type(config).from_dict(values)


def _require_same_behaviour(old: nn.Module, new: nn.Module, old_place: int, new_place: int) -> None:
    """Plain settings of every module in a layer (window, scaling, kind of attention) must not depend on its place."""
    settings = {name: _settings(module) for name, module in new.named_modules()}
    for name, module in old.named_modules():
        for key, value in _settings(module).items():
            if settings[name].get(key) != value:
                raise ModelError(
                    f"layer {old_place} cannot become layer {new_place}: {name}.{key} would change from {value} to "
                    f"{settings[name].get(key)}; choose layers that keep their pattern"
                )


def _settings(module: nn.Module) -> dict[str, Any]:
    ignored = {"layer_idx", "layer_id", "layer_number", "training", "gradient_checkpointing"}
    return {
        key: value
        for key, value in vars(module).items()
        if key not in ignored and not key.startswith("_") and isinstance(value, bool | int | float | str)
    }
