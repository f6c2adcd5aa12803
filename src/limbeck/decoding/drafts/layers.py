"""A draft cut from a model: some of its decoder layers, its embedding and its head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from limbeck.decoding.drafts.model import ModelDraft
from limbeck.models import cut_layers, unwrap


def layers_draft(model: Any, layers: Sequence[int], *, weights: str = "own", ids_D: Tensor | None = None) -> ModelDraft:
    """A `ModelDraft` of these layers of `model`, which stays as it is. ModelError where they cannot be cut out."""
    return ModelDraft(cut_layers(unwrap(model), layers), weights=weights, ids_D=ids_D)


def every_other(model: Any) -> list[int]:
    """The layers of a draft that nobody has chosen: every other one of the model's, from the first, half of them."""
    count = unwrap(model).config.get_text_config().num_hidden_layers
    return list(range(0, count, 2))[: max(1, count // 2)]
