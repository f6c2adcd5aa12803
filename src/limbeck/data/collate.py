"""Rollouts, and batches of them as tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch

from limbeck.types import Example, Rollout, Writer


def dataset_rollout(example: Example, stop_tokens: Collection[int] = ()) -> Rollout:
    """The example as its row has it.

    `finish_reason` is `length` where it ends in none of `stop_tokens`: it was cut. Without `stop_tokens` it is `stop`.
    """
    cut = bool(stop_tokens) and any(example.mask) and example.tokens[-1] not in stop_tokens
    return Rollout(
        example.tokens, example.mask, example.prompt_tokens, "dataset", "length" if cut else "stop", example.index
    )


def written_rollout(
    example: Example,
    completion_tokens: Sequence[int],
    finish_reason: Literal["stop", "length"],
    writer: Writer,
    columns: dict[str, list[float]] | None = None,
) -> Rollout:
    """The example's prompt and a completion by `writer`, all of which is learnt (its stop token included)."""
    prompt = example.prompt
    mask = [False] * len(prompt) + [True] * len(completion_tokens)
    tokens = [*prompt, *completion_tokens]
    return Rollout(tokens, mask, len(prompt), writer, finish_reason, example.index, columns or {})


def completion_text(tokenizer: Any, tokens: Sequence[int], stop_tokens: Collection[int]) -> str:
    """The text of a completion without the stop token that ended it and without special tokens."""
    ended = bool(tokens) and tokens[-1] in stop_tokens
    return plain_text(tokenizer, tokens[:-1] if ended else tokens)


def plain_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text without special tokens."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True)


def collate(rollouts: Sequence[Rollout], pad_id: int) -> dict[str, Any]:
    """`input_ids` and `attention_mask` (B, T; int64) and `learnt` (B, T; bool), padded on the right with `pad_id`.

    The attention mask comes from the lengths, never from the ids: pad and EOS may be one token. `learnt[:, 0]` is
    False: nothing stands before the first token. `columns`, where rollouts have some: each (B, T; float64) at the
    completions' tokens, NaN elsewhere.
    """
    width = max(len(rollout.tokens) for rollout in rollouts)
    input_ids_BT = torch.full((len(rollouts), width), pad_id)
    attention_mask_BT = torch.zeros(len(rollouts), width, dtype=torch.long)
    learnt_BT = torch.zeros(len(rollouts), width, dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        length = len(rollout.tokens)
        input_ids_BT[row, :length] = torch.tensor(rollout.tokens)
        attention_mask_BT[row, :length] = 1
        learnt_BT[row, :length] = torch.tensor(rollout.mask)
    learnt_BT[:, 0] = False
    batch: dict[str, Any] = {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "learnt": learnt_BT}
    names = sorted({name for rollout in rollouts for name in rollout.columns})
    columns = {name: torch.full((len(rollouts), width), torch.nan, dtype=torch.float64) for name in names}
    for row, rollout in enumerate(rollouts):
        for name, numbers in rollout.columns.items():
            columns[name][row, rollout.prompt_tokens : len(rollout.tokens)] = torch.tensor(numbers, dtype=torch.float64)
    if columns:
        batch["columns"] = columns
    return batch


def at_learnt(values_BT: torch.Tensor, learnt_BT: torch.Tensor) -> torch.Tensor:
    """(N,): what stands at the learnt tokens, row by row, in the order of `models.completion_hidden`."""
    return values_BT[:, 1:][learnt_BT[:, 1:]]


def micro_batches(rollouts: Sequence[Rollout], count: int) -> list[list[Rollout]]:
    """Exactly `count` lists that hold each rollout once: neighbours in length, so that little is padded.

    Their padded sizes (rows * longest) are balanced: the largest is the smallest that a cut of the rollouts sorted by
    length allows, so that short rollouts stand many in a list and long ones few. No list is empty unless there are
    fewer rollouts than lists (the empty ones come last). Deterministic: ties keep their order.
    """
    longest_first = sorted(rollouts, key=lambda rollout: -len(rollout.tokens))
    sizes = [len(rollout.tokens) for rollout in longest_first]
    low, high = max(sizes, default=0), max(sizes, default=0) * len(sizes)
    while low < high:  # the smallest bound on the padded size that needs at most `count` lists
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cuts(sizes, middle)) <= count else (middle + 1, high)
    cuts = _cuts(sizes, low)
    lists = [longest_first[start:end] for start, end in pairwise([*cuts, len(sizes)])]
    while len(lists) < min(count, len(sizes)):
        at = max(
            (i for i in range(len(lists)) if len(lists[i]) > 1), key=lambda i: len(lists[i]) * len(lists[i][0].tokens)
        )
        half = len(lists[at]) // 2
        lists[at : at + 1] = [lists[at][:half], lists[at][half:]]
    return lists + [[] for _ in range(count - len(lists))]


def _cuts(sizes: list[int], bound: int) -> list[int]:
    """Where lists start when each is filled while rows * longest stays within `bound`; `sizes` fall."""
    cuts: list[int] = []
    for place, _ in enumerate(sizes):
        if not cuts or (place - cuts[-1] + 1) * sizes[cuts[-1]] > bound:
            cuts.append(place)
    return cuts
