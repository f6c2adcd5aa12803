"""The data set's own text."""

from __future__ import annotations

from collections.abc import Collection

from limbeck.data import dataset_rollout
from limbeck.types import Example, Rollout


def dataset(examples: list[Example], step: int, *, stop_tokens: Collection[int] = ()) -> list[Rollout]:
    """Each row as it stands, the same at every `step`; one that ends in none of `stop_tokens` was cut."""
    return [dataset_rollout(example, stop_tokens) for example in examples]
