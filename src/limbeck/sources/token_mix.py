"""Teacher and student write together, token by token (MiniLLM, Gu et al. 2024, arXiv 2306.08543, section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from limbeck.data import written_rollout
from limbeck.decoding import Mix, Sampling, generate
from limbeck.types import Example, Rollout


@dataclass
class TokenMix:
    """Each token is drawn from share * teacher + (1 - share) * student at temperature 1, both models in lockstep.

    The rollouts bring `student_logprobs` and `teacher_logprobs`, nats, of what was drawn. Random numbers come from
    (sampling.seed, optimiser step, row).
    """

    student: Any
    teacher: Any
    share: float
    sampling: Sampling
    tokenizer: Any

    def __call__(self, examples: list[Example], step: int) -> list[Rollout]:
        completions = generate(
            Mix(self.student, self.teacher, self.share),
            [example.prompt for example in examples],
            self.sampling,
            tokenizer=self.tokenizer,
            streams=[(step, example.index) for example in examples],
        )
        rollouts: list[Rollout] = []
        for example, completion in zip(examples, completions, strict=True):
            assert completion.teacher_logprobs is not None
            columns = {"student_logprobs": completion.logprobs, "teacher_logprobs": completion.teacher_logprobs}
            rollouts.append(written_rollout(example, completion.tokens, completion.finish_reason, "student", columns))
        return rollouts
