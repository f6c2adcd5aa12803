"""The teacher writes, once: sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from limbeck.data import written_rollout
from limbeck.decoding import Completion, Sampling, generate
from limbeck.teachers import TextCache
from limbeck.types import Example, Rollout


@dataclass
class Teacher:
    """Text for a prompt is written at its first use and kept in `cache`: across epochs, runs and training seeds.

    `upcoming(step)` names the rows of the next optimiser steps, so that they are written in one large batch.
    """

    model: Any
    sampling: Sampling
    tokenizer: Any
    cache: TextCache
    upcoming: Callable[[int], list[Example]] | None = None

    def __call__(self, examples: list[Example], step: int) -> list[Rollout]:
        if any(self.cache.get(example.prompt) is None for example in examples):
            self._write(examples + (self.upcoming(step) if self.upcoming else []))
        return [self._rollout(example) for example in examples]

    def _write(self, examples: list[Example]) -> None:
        wanted = {tuple(example.prompt) for example in examples}
        prompts = [list(prompt) for prompt in sorted(wanted) if self.cache.get(list(prompt)) is None]
        streams = [tuple(prompt) for prompt in prompts]
        completions = generate(self.model, prompts, self.sampling, tokenizer=self.tokenizer, streams=streams)
        self.cache.add(prompts, completions)

    def _rollout(self, example: Example) -> Rollout:
        completion = self.cache.get(example.prompt)
        assert isinstance(completion, Completion)
        return written_rollout(example, completion.tokens, completion.finish_reason, "teacher")
