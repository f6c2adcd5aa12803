"""Keys and values of the sequences being written, in buffers that are written in place.

Rows are slots, columns are steps: at each step every row writes the same column, so a row's padding is on its left and
the live part is a view, never a copy. All layers keep the whole live part, sliding ones too: the model's own mask hides
what lies outside their window.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)


@dataclass
class View:
    """Which part of the buffers the next forward uses: it reads columns [origin, column) of `rows` and writes from
    `column` on. Columns are counted from the buffers' first one."""

    slots: int
    capacity: int
    rows: slice = field(default_factory=lambda: slice(0, 0))
    origin: int = 0
    column: int = 0


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values [slots, heads, capacity, width], allocated at the first forward in its dtype."""

    def __init__(self, view: View) -> None:
        super().__init__()
        self.view = view

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros: what a mask hides is multiplied by 0, and 0 times whatever stood in memory could be NaN.
        self.keys, self.values = (
            states.new_zeros(self.view.slots, states.shape[1], self.view.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        view = self.view
        end = view.column + key_states.shape[2]
        self.keys[view.rows, :, view.column : end] = key_states
        self.values[view.rows, :, view.column : end] = value_states
        return self.keys[view.rows, :, view.origin : end], self.values[view.rows, :, view.origin : end]

    def get_seq_length(self) -> int:
        return self.view.column - self.view.origin

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """A cache of `view.slots` rows for any model whose layers are attention layers."""

    def __init__(self, view: View, layer: type[SlotLayer] = SlotLayer) -> None:
        self.view = view
        super().__init__(layer_class_to_replicate=lambda: layer(view))  # type: ignore[arg-type]

    def copy_rows(self, sources: torch.Tensor, targets: torch.Tensor, columns: slice) -> None:
        """Row `sources[i]` becomes row `targets[i]`, in these columns."""
        for layer in self.used():
            layer.keys[targets, :, columns] = layer.keys[sources, :, columns]
            layer.values[targets, :, columns] = layer.values[sources, :, columns]

    def move_columns(self, columns: slice, capacity: int) -> None:
        """New buffers of `capacity` columns that begin with these columns of the old ones."""
        self.view.capacity = capacity
        for layer in self.used():
            layer.keys = moved(layer.keys, columns, capacity, axis=2)
            layer.values = moved(layer.values, columns, capacity, axis=2)

    def used(self) -> list[Any]:
        """Layers that hold something: one that reads another's keys and values never does."""
        return [layer for layer in self.layers if isinstance(layer, SlotLayer) and layer.is_initialized]


def moved(buffer: torch.Tensor, columns: slice, capacity: int, *, axis: int) -> torch.Tensor:
    """A buffer of `capacity` columns, zero but for these columns of the old one, which now begin at 0."""
    kept = buffer.narrow(axis, columns.start, columns.stop - columns.start)
    new = buffer.new_zeros([*buffer.shape[:axis], capacity, *buffer.shape[axis + 1 :]])
    new.narrow(axis, 0, kept.shape[axis]).copy_(kept)
    return new


def beyond_attention(config: Any) -> str | None:
    """What keeps a model out of `SlotCache`: a layer with more than plain keys and values (recurrent states cannot be
    padded on the left), or None."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) not in plain:
            return f"{type(layer).__name__} at layer {index} of {config.model_type}"
    return None
