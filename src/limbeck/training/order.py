"""The order of rows: one an epoch, a function of the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice

import numpy as np
from torch.utils.data import Sampler

WINDOW = 50
"""Optimiser batches among which rows are grouped by length: few lengths a batch, and still a mixture over time."""


class EpochOrder(Sampler[int]):
    """Row numbers of one epoch, by transformers' `train_sampling_strategy`: `random`, shuffled by (seed, epoch);
    `sequential`, as they stand; `group_by_length`, shuffled, then sorted by `lengths` within windows of `WINDOW`
    optimiser batches of `batch` rows, whose batches are shuffled again: little is padded.

    `copies`: each row that often in a row (samples of one prompt). `passes`: each optimiser batch that often in a row
    (inner epochs); then the last batch is filled up with the epoch's first rows, so that all are whole.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        *,
        strategy: str = "random",
        lengths: Sequence[int] = (),
        batch: int = 1,
        copies: int = 1,
        passes: int = 1,
    ) -> None:
        self.size = size
        self.seed = seed
        self.strategy = strategy
        self.lengths = np.asarray(lengths)
        self.batch = batch
        self.copies = copies
        self.passes = passes
        self.epoch = 0

    def __len__(self) -> int:
        return self._filled * self.copies * self.passes

    @property
    def _filled(self) -> int:
        """Rows of an epoch without copies and passes."""
        return self.size + (-self.size % self.batch if self.passes > 1 else 0)

    def __iter__(self) -> Iterator[int]:
        return iter(self.drawn(self.epoch))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def permutation(self, epoch: int) -> list[int]:
        if self.strategy == "sequential":
            return list(range(self.size))
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(self.size)
        if self.strategy == "group_by_length":
            order = self._grouped(order, generator)
        return order.tolist()

    def _grouped(self, order: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        grouped: list[np.ndarray] = []
        for start in range(0, self.size, WINDOW * self.batch):
            window = order[start : start + WINDOW * self.batch]
            window = window[np.argsort(self.lengths[window], kind="stable")]
            whole = len(window) // self.batch
            batches = window[: whole * self.batch].reshape(whole, self.batch)
            grouped += [*generator.permutation(batches), window[whole * self.batch :]]
        return np.concatenate(grouped)

    def drawn(self, epoch: int) -> list[int]:
        """The rows of an epoch with their copies, its optimiser batches with their passes."""
        order = list(islice(cycle(self.permutation(epoch)), self._filled))
        batches = [order[start : start + self.batch] for start in range(0, len(order), self.batch)]
        return [row for batch in batches for _ in range(self.passes) for row in batch for _ in range(self.copies)]

    def rows(self, start: int, stop: int) -> list[int]:
        """The rows drawn from place `start` to `stop`, counted over epochs."""
        rows: list[int] = []
        for epoch in range(start // len(self), (stop - 1) // len(self) + 1):
            first = epoch * len(self)
            rows += self.drawn(epoch)[max(start - first, 0) : stop - first]
        return rows
