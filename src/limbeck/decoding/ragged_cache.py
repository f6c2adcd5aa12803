"""Keys and values of sequences of different lengths side by side, of which any end can be taken back.

Rows are aligned on the left: column c of the cache holds token c of its row, for every row. Each row is written from
its own column on, and a query sees the columns up to its own alone. So taking tokens back is forgetting their number:
what stands in the columns behind a row's end is seen by nobody and overwritten by whatever comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.decoding.cache import SlotCache, SlotLayer, View

_GROWTH = 64  # columns that the buffers grow by, at least
_KEPT = 64 << 20  # bytes of buffers that stay when nothing is in them: to grow anew costs more


@dataclass
class RaggedView(View):
    """The slots of the next forward's rows are `picked_B`, or `rows` where they follow each other (None). Row b writes
    the columns `positions_BQ[b]`; None: all rows write [column, column + Q). Columns [0, end) are read."""

    picked_B: Tensor | None = None
    positions_BQ: Tensor | None = None
    end: int = 0


class RaggedLayer(SlotLayer):
    """One layer's keys and values [slots, heads, capacity, width]."""

    view: RaggedView

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        view = self.view
        seen: list[Tensor] = []
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            assert buffer is not None
            if view.positions_BQ is None and view.picked_B is None:
                buffer[view.rows, :, view.column : view.end] = states
            else:
                slots_B = torch.arange(view.rows.start, view.rows.stop) if view.picked_B is None else view.picked_B
                columns_BQ = view.positions_BQ
                if columns_BQ is None:
                    columns_BQ = torch.arange(view.column, view.end, device=states.device)[None]
                buffer[slots_B[:, None], :, columns_BQ] = states.transpose(1, 2)
            seen.append(buffer[view.rows if view.picked_B is None else view.picked_B, :, : view.end])
        return seen[0], seen[1]


class RaggedCache:
    """The keys and values of some slots, for any reader: `cache` is what a model of transformers takes. `most`: columns
    that a row may have (None: any number), beyond which buffers grow for padding alone."""

    def __init__(self, most: int | None = None) -> None:
        self.view = RaggedView(slots=0, capacity=0)
        self.cache = SlotCache(self.view, RaggedLayer)
        self.most = most
        self.used: int | None = None  # slots that are anybody's; None: not known

    def bound(self, most: int | None) -> None:
        """Rows have at most so many columns, where that says more than is known."""
        self.most = min((limit for limit in (self.most, most) if limit is not None), default=None)

    def keep(self, slots: int) -> None:
        """The first `slots` slots are in use. What stands in others goes when the buffers grow, for they are as wide as
        the widest row in every slot; all of it at once where none is in use and it is much."""
        self.used = slots
        if slots == 0 and self.bytes > _KEPT:
            self.view.slots = self.view.capacity = 0
            for layer in self.cache.used():
                layer.keys = layer.values = None
                layer.is_initialized = False

    @property
    def bytes(self) -> int:
        return sum(buffer.nbytes for layer in self.cache.used() for buffer in (layer.keys, layer.values))

    def place(self, slots: Sequence[int], starts: Sequence[int], width: int) -> None:
        """The next forward reads `width` tokens in each of these slots, the first of them at column `starts[b]`."""
        view, end = self.view, max(starts) + width
        self._reserve(max(slots) + 1, end)
        first, count = slots[0], len(slots)
        view.rows = slice(first, first + count)
        follow = count == 1 or all(slot == first + place for place, slot in enumerate(slots))
        view.picked_B = None if follow else torch.tensor(slots)
        same = count == 1 or min(starts) == max(starts)
        view.positions_BQ = None if same else torch.tensor(starts)[:, None] + torch.arange(width)
        view.column, view.end = starts[0], end

    @property
    def written(self) -> bool:
        """Whether anything has ever been read."""
        return bool(self.cache.used())

    def copy_row(self, source: int, target: int) -> None:
        """Slot `target` becomes what slot `source` is, where both have been written."""
        if source < self.view.slots:
            rows = torch.tensor([source]), torch.tensor([target])
            self.cache.copy_rows(*rows, slice(0, self.view.capacity))

    def forget(self, slot: int | None = None, start: int = 0) -> None:
        """Zeros in a slot (None: in all) from a column on. A mask hides numbers, but not NaN: 0 times NaN is NaN."""
        rows = slice(None) if slot is None else slice(slot, slot + 1)
        for layer in self.cache.used():
            layer.keys[rows, :, start:] = layer.values[rows, :, start:] = 0

    def _reserve(self, slots: int, end: int) -> None:
        view = self.view
        if slots <= view.slots and end <= view.capacity:
            return
        if slots > view.slots:
            slots = max(slots, min(2 * view.slots, slots + 8))
        columns = view.capacity
        if end > columns:
            columns = end + max(_GROWTH, end // 2)
            columns = columns if self.most is None else max(end, min(columns, self.most))
            slots = max(slots, view.slots if self.used is None else self.used)
        else:
            slots = max(slots, view.slots)
        view.slots, view.capacity = slots, columns
        for layer in self.cache.used():
            layer.keys, layer.values = (_grown(buffer, slots, columns) for buffer in (layer.keys, layer.values))


def _grown(buffer: Any, slots: int, columns: int) -> Tensor:
    grown = buffer.new_zeros(slots, buffer.shape[1], columns, buffer.shape[3])
    grown[: buffer.shape[0], :, : buffer.shape[2]] = buffer[:slots]
    return grown


def causal_mask(positions_BQ: Tensor, columns_T: Tensor) -> Tensor:
    """(B, Q, T): which columns each query sees."""
    return columns_T <= positions_BQ[..., None]
