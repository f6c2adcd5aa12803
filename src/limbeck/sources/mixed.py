"""A mixture of two writers: in GKD a share lmbda of the sequences is the student's, the rest is offline text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from limbeck.types import Example, Rollout, Source


@dataclass
class Mixed:
    """A coin a sequence, or one a step as in Algorithm 1 of the GKD paper (arXiv 2306.13649).

    A share `lmbda` comes from `first`, the rest from `second`. Coins come from (seed, step, row), so ranks,
    micro-batches and resumes agree on them.
    """

    first: Source
    second: Source
    lmbda: float
    unit: Literal["sequence", "step"]
    seed: int

    def __call__(self, examples: list[Example], step: int) -> list[Rollout]:
        heads = [self._coin(step, example.index) < self.lmbda for example in examples]
        first = iter(self._from(self.first, examples, heads, True, step))
        second = iter(self._from(self.second, examples, heads, False, step))
        return [next(first if head else second) for head in heads]

    def _from(
        self, source: Source, examples: list[Example], heads: list[bool], wanted: bool, step: int
    ) -> list[Rollout]:
        chosen = [example for example, head in zip(examples, heads, strict=True) if head is wanted]
        return source(chosen, step) if chosen else []

    def _coin(self, step: int, index: int) -> float:
        counter = (step, index) if self.unit == "sequence" else (step,)
        return float(np.random.default_rng((self.seed, 0x6C6D, *counter)).random())
