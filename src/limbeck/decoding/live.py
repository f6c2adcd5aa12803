"""A request that is being written, and what its next tokens may be drawn from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from limbeck.decoding.requests import Counters, Request
from limbeck.decoding.sampler import History, Sampling, served_logits, stream_key, uniforms

# Three independent random numbers at each index. The target's are those of `generate`, so that without a draft both
# write the same.
TARGET, DRAFT, ACCEPT = 0, 1, 2


@dataclass(eq=False)
class Live:
    """Tokens [0, len(tokens)) are known; the first `prompt` are the request's own, `limit` is where it must end.
    `slot` is its row in every cache. `read`: columns of the prompt that the target has read so far; when they are all,
    tokens are written, of which it has read all but the newest. `tapped`: its hidden states of a prompt that is being
    read, where an observer will want them. `behind`: by draft, the columns that it would have to read before its first
    step. `alone`: nobody drafts for it."""

    request: Request
    limit: int
    slot: int
    tokens: list[int] = field(init=False)
    counters: Counters = field(default_factory=Counters)
    read: int = 0
    tapped: list[Tensor] = field(default_factory=list[Tensor])
    behind: dict[str, int] = field(default_factory=dict[str, int])
    alone: bool = False

    def __post_init__(self) -> None:
        request = self.request
        self.tokens = list(request.tokens)
        self.prompt = len(self.tokens)
        key, gamma = stream_key(request.sampling.seed, request.stream, request.sample)
        self.keys = [(key, gamma), *(stream_key(key, (gamma, kind), 0) for kind in (DRAFT, ACCEPT))]

    @property
    def joining(self) -> bool:
        """Whether its prompt is still being read."""
        return self.read < self.prompt

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return self.limit - len(self.tokens)


def random_numbers(rows: Sequence[Live], kind: int, width: int) -> Tensor:
    """(B, width) in [0, 1), float64: those of the indices len(tokens), len(tokens) + 1, ... of each row. They depend on
    the request and the index alone."""
    keys_2B1 = torch.tensor([row.keys[kind] for row in rows]).T[..., None]
    first_B1 = torch.tensor([[len(row.tokens) - row.prompt] for row in rows])
    return uniforms(keys_2B1[0], keys_2B1[1], first_B1 + torch.arange(width))


def shape_of(sampling: Sampling) -> tuple[object, ...]:
    """What decides how logits become a distribution: rows of one shape are served together."""
    penalties: tuple[object, ...] = ()
    if sampling.penalises:
        penalties = (
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            sampling.no_repeat_ngram_size,
        )
    early = (sampling.min_tokens, sampling.stop_tokens) if sampling.min_tokens else ()
    filters = (sampling.top_k, sampling.top_p) if sampling.temperature > 0 else ()
    return (sampling.temperature, filters, penalties, early)


def by_shape(rows: Sequence[Live]) -> list[list[int]]:
    """The places of rows, those of one shape together."""
    if len(rows) == 1:
        return [[0]]
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(shape_of(row.request.sampling), []).append(place)
    return list(groups.values())


def served_at(
    logits_NV: Tensor, contexts: Sequence[tuple[Live, Sequence[int]]], ids_V: Tensor | None = None, size: int = 0
) -> Tensor:
    """`served_logits` (N, V) of rows of one shape, where context n is a row's tokens and what was drafted after them.

    `ids_V`: the tokens that the columns stand for, of a vocabulary of `size`; None: all of them, in order.
    """
    sampling = contexts[0][0].request.sampling
    early = any(sampling.early(len(row.tokens) - row.prompt + len(drafted)) for row, drafted in contexts)
    if not (sampling.penalises or early):
        return served_logits(logits_NV, sampling)
    history = _history(contexts, logits_NV.device)
    if ids_V is None:
        return served_logits(logits_NV, sampling, history)
    whole_NV = logits_NV.new_full((logits_NV.shape[0], size), -torch.inf)
    whole_NV[:, ids_V] = logits_NV
    return served_logits(whole_NV, sampling, history)[:, ids_V]


def _history(contexts: Iterable[tuple[Live, Sequence[int]]], device: torch.device) -> History:
    texts = [(row.tokens + list(drafted), row.prompt) for row, drafted in contexts]
    width = max(len(tokens) for tokens, _ in texts)
    tokens_NT = torch.tensor([[0] * (width - len(tokens)) + tokens for tokens, _ in texts], device=device)
    places_T = torch.arange(width, device=device)
    first_N1 = torch.tensor([[width - len(tokens)] for tokens, _ in texts], device=device)
    start_N1 = first_N1 + torch.tensor([[prompt] for _, prompt in texts], device=device)
    return History(tokens_NT, places_T >= first_N1, places_T >= start_N1)
