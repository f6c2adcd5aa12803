"""The net of a feature draft: fresh, or from a folder: `feature.json` is its shape, `model.safetensors` its weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from limbeck.decoding.drafts.feature_net import FeatureNet, FeatureShape, feature_shape
from limbeck.errors import CheckpointError, PreflightError
from limbeck.models import unwrap

FEATURE = "feature"
"""In the place of a folder: a fresh one."""

_SHAPE, _WEIGHTS = "feature.json", "model.safetensors"


def is_feature(path: str | Path) -> bool:
    """Whether this is a feature draft: the word `feature`, or the folder of one, whole or not."""
    return path == FEATURE or (Path(path) / _SHAPE).is_file()


def feature_net(target: Any, path: str | Path = FEATURE, *, seed: int = 0) -> FeatureNet:
    """The net for this target, in float32: the one in a folder, or a fresh one, which is the same for a seed in every
    process.

    CheckpointError as from `load_feature`, PreflightError for the net of a target of another width or fewer layers.
    """
    fitting = feature_shape(target)
    if path == FEATURE:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return FeatureNet(fitting)
    net = load_feature(path)
    layers = unwrap(target).config.get_text_config().num_hidden_layers
    if net.shape.width != fitting.width or max(net.shape.taps) > layers:
        raise PreflightError(
            f"{path}: expected a feature draft for a target of width {fitting.width} with {layers} layers, found one "
            f"for width {net.shape.width} that reads layer {max(net.shape.taps)}: take the one trained for this target"
        )
    return net


def save_feature(net: FeatureNet, folder: str | Path) -> None:
    """Writes the net, in its dtype. CheckpointError where it cannot be written."""
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        save_file({name: weight.detach().contiguous() for name, weight in net.named_parameters()}, place / _WEIGHTS)
        (place / _SHAPE).write_text(json.dumps(asdict(net.shape), indent=1))  # last: without it there is no draft
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: expected a folder for a feature draft, found {error}: name another") from None


def load_feature(folder: str | Path) -> FeatureNet:
    """The net that `save_feature` wrote, in float32. CheckpointError for a folder without one and for a broken one."""
    place = Path(folder)
    try:
        shape = json.loads((place / _SHAPE).read_text())
        weights = load_file(place / _WEIGHTS)
        with torch.device("meta"):  # neither memory nor random numbers for weights that are replaced
            net = FeatureNet(FeatureShape(**{**shape, "taps": tuple(shape["taps"])}))
        net.load_state_dict(weights, assign=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder}: expected a feature draft ({_SHAPE} and {_WEIGHTS}), found: {type(error).__name__}: {reason}; "
            "copy the whole folder, or train it anew"
        ) from None
    return net.float()
