"""Means of what happened since the last reading, on all ranks."""

from __future__ import annotations

from typing import Any

import torch

from limbeck import ranks


class Meter:
    """Sums and counts by name: what is added on one rank alone still belongs to all."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Any]] = {}

    def add(self, name: str, total: Any, count: int) -> None:
        """`total` (a number, or a tensor that need not be waited for now) over `count` tokens, rows or cells."""
        entry = self._sums.setdefault(name, [0.0, 0])
        entry[0], entry[1] = entry[0] + total, entry[1] + count

    def add_values(self, name: str, values_N: torch.Tensor) -> None:
        """One value a token."""
        self.add(name, values_N.detach().sum().double(), len(values_N))

    def read(self) -> dict[str, tuple[float, int]]:
        """(sum, count) by name over all ranks; begins anew."""
        here = {name: (float(total), count) for name, (total, count) in self._sums.items()}
        self._sums.clear()
        parts = ranks.from_all(here)
        names = sorted({name for part in parts for name in part})
        entries = {name: [part[name] for part in parts if name in part] for name in names}
        return {name: (sum(t for t, _ in found), sum(c for _, c in found)) for name, found in entries.items()}
