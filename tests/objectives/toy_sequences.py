"""A toy on which policy gradients are enumerated: every sequence of a small vocabulary, float64.

Three tokens, of which the first ends a completion of at most three. A model is a table: one hidden state a prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from limbeck.objectives import MiniLLM, policy
from limbeck.types import Context, Dense, Head, Rollout

VOCABULARY, LONGEST, STOP, WIDTH = 3, 3, 0, 4
Sequence = tuple[int, ...]


def sequences() -> list[Sequence]:
    """Every completion: STOP at its end, or LONGEST tokens without one before."""
    found: list[Sequence] = []
    for length in range(1, LONGEST + 1):
        for tokens in product(range(VOCABULARY), repeat=length):
            if STOP not in tokens[:-1] and (tokens[-1] == STOP or length == LONGEST):
                found.append(tokens)
    return found


ALL = sequences()
PREFIXES = sorted({tokens[:t] for tokens in ALL for t in range(len(tokens))})


@dataclass
class Table:
    """Hidden states by prefix and a head, both learnt."""

    hidden_SH: Tensor
    weight_VH: Tensor

    def rows(self, tokens: Sequence) -> list[int]:
        return [PREFIXES.index(tokens[:t]) for t in range(len(tokens))]

    def logprobs(self, tokens: Sequence) -> Tensor:
        """(T, V): the distribution before each token."""
        return (self.hidden_SH[self.rows(tokens)] @ self.weight_VH.T).log_softmax(-1)

    def of_tokens(self, tokens: Sequence) -> Tensor:
        return self.logprobs(tokens)[torch.arange(len(tokens)), list(tokens)]

    def gradient(self, value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, (self.hidden_SH, self.weight_VH))])


def table(seed: int) -> Table:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return Table(normal(len(PREFIXES), WIDTH), normal(VOCABULARY, WIDTH))


STUDENT, TEACHER = table(1), table(2)


def mixed_logprob(tokens: Sequence, share: float) -> Tensor:
    student, teacher = STUDENT.of_tokens(tokens), TEACHER.of_tokens(tokens)
    return ((1 - share) * student.exp() + share * teacher.exp()).log().sum().detach()


def rollout(tokens: Sequence) -> Rollout:
    columns = {
        "student_logprobs": STUDENT.of_tokens(tokens).tolist(),
        "teacher_logprobs": TEACHER.of_tokens(tokens).tolist(),
    }
    return Rollout([9, *tokens], [False] + [True] * len(tokens), 1, "student", columns=columns)


def loss(tokens: Sequence, columns: dict[str, list[float]], counts: tuple[int, int], objective: Any) -> Tensor:
    """The sum over the sequence's tokens of what the trainer would divide by its count of tokens."""
    rows = STUDENT.rows(tokens)
    tensors = {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in columns.items()}
    terms = objective(
        STUDENT.hidden_SH[rows],
        Head(STUDENT.weight_VH),
        Dense(TEACHER.logprobs(tokens).detach()),
        torch.tensor(tokens),
        context=Context(tensors, *counts),
    )
    return terms.loss_N.sum()


def minillm_gradients(share: float, clip: float | None = None, **options: Any) -> Iterator[tuple[float, Tensor]]:
    """(probability under the mixture, gradient) of every sequence."""
    credit = MiniLLM(teacher_mix=share, **options)

    def objective(*args: Any, **kwargs: Any) -> Any:
        return policy(*args, name="reverse_kl", clip=clip, **kwargs)

    for tokens in ALL:
        (credited,) = credit([rollout(tokens)])
        value = loss(tokens, credited.columns, (len(tokens), 1), objective)
        yield float(mixed_logprob(tokens, share).exp()), STUDENT.gradient(value)


def expectation(gradients: Iterator[tuple[float, Tensor]]) -> Tensor:
    return torch.stack([probability * gradient for probability, gradient in gradients]).sum(0)


def variance(gradients: Iterator[tuple[float, Tensor]]) -> float:
    """Of one sequence's gradient, summed over parameters: exact, as every sequence is there."""
    found = list(gradients)
    mean = sum(probability * gradient for probability, gradient in found)
    return float(sum(probability * (gradient - mean).square().sum() for probability, gradient in found))


def reverse_kl_gradient() -> Tensor:
    """Of KL(q || p) = sum over sequences of q (log q - log p), by autograd through the sum itself."""
    total = torch.zeros((), dtype=torch.float64)
    for tokens in ALL:
        student, teacher = STUDENT.of_tokens(tokens).sum(), TEACHER.of_tokens(tokens).sum().detach()
        total = total + student.exp() * (student - teacher)
    return STUDENT.gradient(total)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
