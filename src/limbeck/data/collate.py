"""Rollouts, and batches of them as tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Literal

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
    logprobs: list[float] | None = None,
) -> Rollout:
    """The example's prompt and a completion by `writer`, all of which is learnt (its stop token included)."""
    prompt = example.prompt
    mask = [False] * len(prompt) + [True] * len(completion_tokens)
    return Rollout([*prompt, *completion_tokens], mask, len(prompt), writer, finish_reason, example.index, logprobs)


def collate(rollouts: Sequence[Rollout], pad_id: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, T; int64) and `learnt` (B, T; bool), padded on the right with `pad_id`.

    The attention mask comes from the lengths, never from the ids: pad and EOS may be one token. `learnt[:, 0]` is
    False: nothing stands before the first token. Where the writer's log-probabilities are known, `written_logprobs`
    (B, T; float32) holds them at their tokens, NaN elsewhere.
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
    batch = {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "learnt": learnt_BT}
    if any(rollout.logprobs is not None for rollout in rollouts):
        batch["written_logprobs"] = torch.full((len(rollouts), width), torch.nan)
        for row, rollout in enumerate(rollouts):
            if rollout.logprobs is not None:
                completion = slice(rollout.prompt_tokens, len(rollout.tokens))
                batch["written_logprobs"][row, completion] = torch.tensor(rollout.logprobs)
    return batch


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
