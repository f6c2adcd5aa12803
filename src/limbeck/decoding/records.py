"""What the rollout engine takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from limbeck.errors import RolloutError


@dataclass(frozen=True)
class Prompt:
    """What a completion continues. `decoder_start` and `extras` are for models that read more than `tokens`."""

    tokens: Sequence[int]
    decoder_start: Sequence[int] = ()
    extras: dict[str, Any] = field(default_factory=dict[str, Any])


def check_prompt(tokens: Sequence[int], limit: int | None, vocabulary: int, whose: str = "") -> None:
    """RolloutError, which begins with `whose`, unless a completion can follow these tokens: there is one at least, the
    context's `limit` (None: none) leaves room, all are the vocabulary's."""
    if not tokens:
        raise RolloutError(f"{whose}expected at least one token, found none: begin it with BOS")
    if limit is not None and len(tokens) >= limit:
        raise RolloutError(
            f"{whose}expected fewer tokens than the context's {limit}, found {len(tokens)}: shorten the prompt"
        )
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        outside = next(token for token in tokens if not 0 <= token < vocabulary)
        raise RolloutError(
            f"{whose}expected tokens below {vocabulary}, found {outside}: encode it with the model's tokenizer"
        )


@dataclass(frozen=True)
class Mix:
    """A policy of two models in lockstep: each token is drawn from share * teacher + (1 - share) * student, after the
    same temperature (MiniLLM, arXiv:2306.08543, section 2.2). `share` is the teacher's weight, 0 <= share < 1."""

    student: Any
    teacher: Any
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise RolloutError(
                f"Mix: expected the teacher's share in [0, 1), found {self.share}: at 1 the student writes nothing"
            )


@dataclass(frozen=True)
class Completion:
    """What was written after a prompt. `logprobs[i]` is the model's (of a `Mix`: the student's) log-probability of
    `tokens[i]` at temperature 1, unfiltered, over the vocabulary without its padding rows, in nats; `teacher_logprobs`
    the same of a Mix's teacher. `stop`: the last token is a stop token or completes a stop string; `length`:
    `max_tokens` or the model's context is full."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    teacher_logprobs: list[float] | None = None


@dataclass(eq=False)
class Row:
    """One completion to write: its place in the result, its prompt's number and tokens, how many tokens it may have,
    and its random numbers' start and step. Columns are counted from the first that was ever written; `first` holds the
    prompt's first token and `start` the completion's, both known once the row has joined a batch."""

    place: int
    prompt: int
    tokens: tuple[int, ...]
    room: int
    key: int
    gamma: int
    first: int = 0
    start: int = 0


def finished(
    row: Row, tokens: list[int], logprobs_MT: list[list[float]], reason: Literal["stop", "length"]
) -> Completion:
    """The completion of a row; RolloutError where a model gave NaN."""
    for position, values in enumerate(zip(*logprobs_MT, strict=True)):
        if any(value != value for value in values):
            raise RolloutError(
                f"prompt {row.prompt}: expected finite logits, found NaN at position {position} of the completion: "
                "check the model's weights and dtype"
            )
    logprobs, *teacher_logprobs = logprobs_MT
    return Completion(tokens, logprobs, reason, *teacher_logprobs)


def nothing_to_draw(row: Row, position: int, vocabulary: int) -> RolloutError:
    """The penalties have left no token."""
    return RolloutError(
        f"prompt {row.prompt}: expected a token to draw at position {position} of the completion, found all "
        f"{vocabulary} ruled out: lower no_repeat_ngram_size or min_tokens"
    )
