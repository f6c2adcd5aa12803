"""GKD's mixture: a share lmbda of the sequences is written by the student, the rest is offline text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from limbeck.types import Example, Rollout, Source


@dataclass
class Mixed:
    """A coin a sequence, or one a step as in Algorithm 1 of the GKD paper (arXiv 2306.13649).

    Coins come from (seed, step, row), so ranks, micro-batches and resumes agree on them.
    """

    student: Source
    offline: Source
    lmbda: float
    unit: Literal["sequence", "step"]
    seed: int

    def __call__(self, examples: list[Example], step: int) -> list[Rollout]:
        by_student = [self._coin(step, example.index) < self.lmbda for example in examples]
        written = iter(self._from(self.student, examples, by_student, True, step))
        offline = iter(self._from(self.offline, examples, by_student, False, step))
        return [next(written if chosen else offline) for chosen in by_student]

    def _from(
        self, source: Source, examples: list[Example], by_student: list[bool], wanted: bool, step: int
    ) -> list[Rollout]:
        chosen = [example for example, flag in zip(examples, by_student, strict=True) if flag is wanted]
        return source(chosen, step) if chosen else []

    def _coin(self, step: int, index: int) -> float:
        counter = (step, index) if self.unit == "sequence" else (step,)
        return float(np.random.default_rng((self.seed, 0x6C6D, *counter)).random())
