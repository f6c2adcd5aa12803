"""The student writes: on-policy text, new at every optimiser step."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from limbeck.data import written_rollout
from limbeck.decoding import Sampling, generate, int8_weights
from limbeck.types import Example, Rollout


@dataclass
class Student:
    """Random numbers come from (sampling.seed, optimiser step, row): no batch, rank or resume changes a token.

    `int8`: it writes with int8 weights (`decoding.int8_weights`) and trains with its own; `rollout_kl` logs how far
    apart the two are on what was written. `n`: samples a prompt, whose examples stand n times in a row.
    """

    model: Any
    sampling: Sampling
    tokenizer: Any
    int8: bool = False
    n: int = 1

    def __call__(self, examples: list[Example], step: int) -> list[Rollout]:
        with int8_weights(self.model) if self.int8 else nullcontext():
            completions = generate(
                self.model,
                [example.prompt for example in examples[:: self.n]],
                replace(self.sampling, n=self.n),
                tokenizer=self.tokenizer,
                streams=[(step, example.index) for example in examples[:: self.n]],
            )
        return [
            written_rollout(
                example,
                completion.tokens,
                completion.finish_reason,
                "student",
                {"student_logprobs": completion.logprobs},
            )
            for example, completion in zip(examples, completions, strict=True)
        ]
