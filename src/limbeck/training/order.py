"""The order of rows: one permutation an epoch, a function of the seed alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """Row numbers of one epoch, shuffled by (seed, epoch)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(self.permutation(self.epoch))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def permutation(self, epoch: int) -> list[int]:
        return np.random.default_rng((self.seed, epoch)).permutation(self.size).tolist()

    def rows(self, start: int, stop: int) -> list[int]:
        """The rows drawn from place `start` to `stop`, counted over epochs."""
        rows: list[int] = []
        for epoch in range(start // self.size, (stop - 1) // self.size + 1):
            first = epoch * self.size
            rows += self.permutation(epoch)[max(start - first, 0) : stop - first]
        return rows
