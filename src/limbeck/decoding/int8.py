"""Linear layers with int8 weights while a model writes: on a CPU a step reads half the bytes of bf16 (see `packed`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from limbeck.decoding.packed import packed_weights
from limbeck.errors import RolloutError
from limbeck.models import unwrap


@contextmanager
def int8_weights(model: Any) -> Iterator[None]:
    """Meanwhile every `nn.Linear` of the model, output head included, computes products of few rows with weights that
    are rounded to int8 on entry, but for those of a width that torch's kernel cannot take. The model's own weights are
    neither changed nor freed.

    Raises RolloutError on another device than a CPU, which torch's product is for.
    """
    base: Any = unwrap(model)
    if base.device.type != "cpu":
        raise RolloutError(
            f"int8 weights: expected a model on a CPU, found {base.device.type}: set int8_rollouts=false"
        )
    with packed_weights(base, "int8"):
        yield
