"""Rewards and the baselines that they are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from limbeck.data import read, render
from limbeck.data.embedded import TEACHER
from limbeck.decoding import Sampling
from limbeck.models import load_model, load_tokenizer
from limbeck.sources import Rewarded, Student
from limbeck.types import Rollout

TOKENIZER = load_tokenizer(TEACHER)
STOP: Any = TOKENIZER.eos_token_id


def letters(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """The row's `worth` for every character."""
    return [len(text) * float(row["worth"]) for text, row in zip(completions, rows, strict=True)]


def rollout(text: str, index: int, writer: Any = "student") -> Rollout:
    prompt = TOKENIZER("Ann", add_special_tokens=False)["input_ids"]
    completion = [*TOKENIZER(text, add_special_tokens=False)["input_ids"], STOP]
    mask = [False] * len(prompt) + [True] * len(completion)
    return Rollout([*prompt, *completion], mask, len(prompt), writer, index=index)


def rewarded(n: int, baseline: Any = None) -> Rewarded:
    baseline = baseline or ("leave_one_out" if n > 1 else "running_mean")
    return Rewarded(letters, lambda index: {"worth": index}, TOKENIZER, (STOP,), n, baseline)


def test_samples_are_compared_with_the_others_of_their_prompt() -> None:
    """Prompt 1: 3 and 1 characters; prompt 2 at twice the worth: 2 and 2. The stop token is no text."""
    rollouts = [rollout("123", 1), rollout("4", 1), rollout("56", 2), rollout("78", 2)]
    found = rewarded(2)(rollouts)
    assert [r.reward for r in found] == [3, 1, 4, 4]
    assert [r.columns["advantage"] for r in found] == [
        [2.0] * rollouts[0].completion,
        [-2.0] * rollouts[1].completion,
        [0.0] * rollouts[2].completion,
        [0.0] * rollouts[3].completion,
    ]


def test_one_sample_a_prompt_is_compared_with_all_before() -> None:
    credit = rewarded(1)
    rewards = [[rollout("123", 1), rollout("4", 1)], [rollout("56", 1)], [rollout("4", 1)]]
    advantages = [[r.columns["advantage"][0] for r in credit(step)] for step in rewards]
    assert advantages == [[3.0, 1.0], [2 - 4 / 2], [1 - 6 / 3]]
    assert credit.state == {"sum": 7.0, "count": 4.0}


def test_several_samples_may_be_compared_with_all_before() -> None:
    credit = rewarded(2, "running_mean")
    first = credit([rollout("123", 1), rollout("4", 1)])
    second = credit([rollout("56", 1), rollout("7", 1)])
    assert [r.columns["advantage"][0] for r in first + second] == [3.0, 1.0, 0.0, -1.0]


def test_what_the_student_did_not_write_earns_nothing() -> None:
    found = rewarded(1)([rollout("123", 1, "dataset"), rollout("4", 1), rollout("789", 1, "teacher")])
    assert [r.reward for r in found] == [None, 1, None]
    assert [r.writer for r in found] == ["dataset", "student", "teacher"]
    assert "advantage" not in found[0].columns


def test_samples_of_a_prompt_stand_together_and_differ() -> None:
    model = load_model(TEACHER)
    examples = render(read("embedded:train:3"), TOKENIZER)[0]
    sampling = Sampling(max_tokens=12, temperature=3.0, stop_tokens=(STOP,))
    four = Student(model, sampling, TOKENIZER, n=4)([e for e in examples for _ in range(4)], 5)
    assert [r.index for r in four] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(len({tuple(r.tokens) for r in four[start : start + 4]}) == 4 for start in (0, 4, 8))
    assert all(r.tokens[: r.prompt_tokens] == examples[r.index].prompt for r in four)
    (one,) = Student(model, sampling, TOKENIZER)(examples[1:2], 5)
    assert one.tokens == four[4].tokens  # the first sample is the only one of n = 1
