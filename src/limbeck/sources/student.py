"""The student writes: on-policy text, new at every optimiser step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from limbeck.data import written_rollout
from limbeck.decoding import Sampling, generate
from limbeck.types import Example, Rollout


@dataclass
class Student:
    """Random numbers come from (sampling.seed, optimiser step, row): no batch, rank or resume changes a token."""

    model: Any
    sampling: Sampling
    tokenizer: Any

    def __call__(self, examples: list[Example], step: int) -> list[Rollout]:
        completions = generate(
            self.model,
            [example.prompt for example in examples],
            self.sampling,
            tokenizer=self.tokenizer,
            streams=[(step, example.index) for example in examples],
        )
        return [
            written_rollout(example, completion.tokens, completion.finish_reason, "student")
            for example, completion in zip(examples, completions, strict=True)
        ]
