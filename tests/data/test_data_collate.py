"""Rollouts and batches: padding that is EOS too, balanced micro-batches."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from limbeck.data import collate, dataset_rollout, micro_batches, render, written_rollout
from limbeck.types import Example, Rollout


def rollouts(*lengths: int) -> list[Rollout]:
    """Token i of rollout k is 100 k + i, so that each rollout is known by its tokens."""
    return [
        Rollout([100 * k + i for i in range(n)], [i > 0 for i in range(n)], 1, "dataset")
        for k, n in enumerate(lengths, 1)
    ]


def padded(lists: list[list[Rollout]]) -> list[int]:
    return [len(part) * max(len(rollout.tokens) for rollout in part) for part in lists if part]


def test_collate_by_hand_where_pad_is_eos() -> None:
    short = Rollout([5, 6, 0], [False, True, True], 1, "student")
    long = Rollout([0, 7, 8, 9, 0], [True, False, True, True, True], 2, "teacher")
    batch = collate([short, long], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 0, 0, 0], [0, 7, 8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    # The EOS of the short one is learnt, its padding (the same id) is not; the first column never is.
    assert batch["learnt"].tolist() == [[False, True, True, False, False], [False, False, True, True, True]]
    assert [batch[key].dtype for key in ("input_ids", "attention_mask", "learnt")] == [
        torch.int64,
        torch.int64,
        torch.bool,
    ]
    assert int(batch["learnt"].sum()) == short.learnt + long.learnt


def test_from_rows_to_a_batch_the_eos_stays_learnt(tiny: PreTrainedTokenizerFast) -> None:
    pad = 0
    assert tiny.pad_token_id == tiny.eos_token_id == pad
    found = render([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "bcd"}], tiny)[0]
    batch = collate([dataset_rollout(example) for example in found], pad)
    eos = batch["input_ids"] == pad
    assert batch["learnt"][eos].tolist() == [True, False, False, True]


def test_rollouts_of_an_example() -> None:
    example = Example([1, 2, 3, 4, 5], [False, False, True, True, True], 2, {}, 7)
    rollout = dataset_rollout(example)
    assert (rollout.tokens, rollout.mask, rollout.prompt_tokens) == (example.tokens, example.mask, 2)
    assert (rollout.writer, rollout.finish_reason, rollout.index) == ("dataset", "stop", 7)
    assert dataset_rollout(example, stop_tokens=(5, 9)).finish_reason == "stop"
    assert dataset_rollout(example, stop_tokens=(4,)).finish_reason == "length"
    assert dataset_rollout(Example([1, 2], [False, False], 2), stop_tokens=(5,)).finish_reason == "stop"
    written = written_rollout(example, (8, 9), "length", "student")
    assert written == Rollout([1, 2, 8, 9], [False, False, True, True], 2, "student", "length", 7)
    assert written_rollout(example, [], "length", "teacher").learnt == 0


@pytest.mark.parametrize("count", range(1, 9))
def test_micro_batches_hold_each_rollout_once_in_exactly_count_lists(count: int) -> None:
    generator = random.Random(count)
    for size in (0, 1, 3, 8, 21):
        given = rollouts(*(generator.randint(1, 60) for _ in range(size)))
        lists = micro_batches(given, count)
        assert len(lists) == count
        assert all(lists) if size >= count else sum(map(bool, lists)) == size
        key = [rollout.tokens[0] for part in lists for rollout in part]
        assert sorted(key) == [rollout.tokens[0] for rollout in given]
        assert micro_batches(given, count) == lists


def test_micro_batches_are_the_best_cut_by_length() -> None:
    """Against every way to cut the sorted lengths: the largest padded size is the smallest possible."""
    generator = random.Random(0)
    for _ in range(40):
        lengths = sorted((generator.randint(1, 40) for _ in range(8)), reverse=True)
        count = generator.randint(1, 5)
        cuts = itertools.combinations(range(1, 8), count - 1)
        sizes = [[(b - a) * lengths[a] for a, b in itertools.pairwise([0, *cut, 8])] for cut in cuts]
        best = min(max(parts) for parts in sizes)
        assert max(padded(micro_batches(rollouts(*generator.sample(lengths, 8)), count))) == best


def test_micro_batches_pad_little() -> None:
    given = rollouts(*([100, 10] * 8))
    lists = micro_batches(given, 4)
    assert sum(padded(lists)) <= 1.15 * sum(len(rollout.tokens) for rollout in given)
    assert sum(padded([given[4 * i : 4 * i + 4] for i in range(4)])) > 1.8 * sum(
        len(rollout.tokens) for rollout in given
    )


def test_equal_lengths_are_cut_evenly() -> None:
    assert [len(part) for part in micro_batches(rollouts(*[7] * 12), 4)] == [3, 3, 3, 3]
