"""Records that pass between parts.

Tensor names end in their axes: B batch, T time, N kept tokens, V vocabulary, H width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

Writer = Literal["dataset", "teacher", "student"]


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised row of a data set.

    `tokens` is the whole text, BOS and EOS included; `mask[i]` says that `tokens[i]` is learnt (predicted from what
    stands before it). `prompt_tokens` is how many leading tokens an on-policy method is given; what follows them is
    the last completion. `row` is the row of the file, for metrics and samples. `index` is its place in the data set.
    """

    tokens: list[int]
    mask: list[bool]
    prompt_tokens: int
    row: dict[str, Any] = field(default_factory=dict[str, Any])
    index: int = 0

    @property
    def prompt(self) -> list[int]:
        return self.tokens[: self.prompt_tokens]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sequence to train on, whoever wrote it. `finish_reason` is `stop` (it ended by itself) or `length`.

    `index` is the place of its prompt in the data set, to name it in errors. `columns` hold one number for each token
    of the completion (of `tokens[prompt_tokens:]`), such as `student_logprobs`, nats, as it wrote, or the
    `advantage` that a policy gradient gives it. `reward` is the whole sequence's, where there is one.
    """

    tokens: list[int]
    mask: list[bool]
    prompt_tokens: int
    writer: Writer
    finish_reason: Literal["stop", "length"] = "stop"
    index: int = 0
    columns: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    reward: float | None = None

    def __post_init__(self) -> None:
        if len(self.mask) != len(self.tokens):
            raise AssertionError(f"{len(self.tokens)} tokens but {len(self.mask)} mask entries")

    @property
    def learnt(self) -> int:
        """How many tokens are predicted: the first token of a sequence has nothing before it."""
        return sum(self.mask[1:])

    @property
    def completion(self) -> int:
        """How many tokens stand after the prompt."""
        return len(self.tokens) - self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Head:
    """The output head: logits = softcap(scale * (hidden @ weight.T + bias)), over the first `rows` rows of `weight`.

    `softcap(x) = c * tanh(x / c)`. `rows` leaves out the padding rows of the vocabulary (None: all are real tokens).
    """

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    rows: int | None = None

    @property
    def size(self) -> int:
        """Number of tokens that the head scores."""
        return self.weight_VH.shape[0] if self.rows is None else self.rows


@dataclass(frozen=True, slots=True)
class Hidden:
    """The teacher's last hidden states at the student's kept tokens, row by row, and its output head."""

    hidden_NH: torch.Tensor
    head: Head


@dataclass(frozen=True, slots=True)
class Dense:
    """The teacher's whole distribution at the student's kept tokens, row by row, in log space (temperature 1)."""

    logprobs_NV: torch.Tensor


@dataclass(frozen=True, slots=True)
class Sparse:
    """The teacher's likeliest tokens at the student's kept tokens, row by row, and the mass outside them, in log space
    (temperature 1). `tail_logprob_N` is -inf where the top tokens are all there is."""

    tokens_NK: torch.Tensor
    logprobs_NK: torch.Tensor
    tail_logprob_N: torch.Tensor


Signal = Hidden | Dense | Sparse


@dataclass(frozen=True, slots=True)
class Context:
    """What an objective may know beside the two models: the rollouts' `columns` at the kept tokens, each (N,), NaN
    where a rollout has none; and of the whole optimiser step on all ranks, the number of learnt `tokens`, by which the
    trainer divides, and of `sequences` with an advantage, by which a term per sequence wants to be divided."""

    columns: Mapping[str, torch.Tensor]
    tokens: int
    sequences: int


class Objective(Protocol):
    """What the student minimises: per-token terms from its hidden states, its head and what the teacher says."""

    def __call__(
        self,
        student_hidden_NH: torch.Tensor,
        head: Head,
        signal: Signal | None,
        tokens_N: torch.Tensor,
        *,
        context: Context,
        stats: tuple[str, ...] = (),
    ) -> Terms: ...


class Source(Protocol):
    """Who writes the sequences: the rollouts of one optimiser step, in the order of `examples`."""

    def __call__(self, examples: list[Example], step: int) -> list[Rollout]: ...


class Credit(Protocol):
    """What each token of a step's rollouts has earned: the same rollouts with an `advantage` column. `state` is what it
    remembers from step to step, kept in checkpoints."""

    state: dict[str, float]

    def __call__(self, rollouts: list[Rollout]) -> list[Rollout]: ...


@dataclass(frozen=True, slots=True)
class Terms:
    """Per-token values, nats. `loss_N` = w_divergence * divergence_N + w_nll * nll_N carries the gradient, and so do
    `divergence_N` and `nll_N`; `stats` are detached."""

    loss_N: torch.Tensor
    divergence_N: torch.Tensor | None
    nll_N: torch.Tensor | None
    stats: dict[str, torch.Tensor]
