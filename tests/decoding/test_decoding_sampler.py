"""The sampler against loops, exact arithmetic, a published generator and transformers' own processors."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from scipy import stats
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from limbeck.decoding import Sampling
from limbeck.decoding.sampler import History, draw, served_logits, stream_key, uniforms
from limbeck.errors import LimbeckError

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def numbers(seed: int = 0, stream: tuple[int, ...] = (0,), sample: int = 0, count: int = 1) -> torch.Tensor:
    key, gamma = stream_key(seed, stream, sample)
    positions = torch.arange(count)
    return uniforms(torch.full_like(positions, key), torch.full_like(positions, gamma), positions)


def test_uniforms_are_those_of_splitmix64():
    # The outputs of the published generator (Vigna's splitmix64.c) for the state 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    position = torch.arange(4)
    drawn = uniforms(torch.full((4,), 1234567), torch.full((4,), GOLDEN), position)
    assert drawn.tolist() == [(value >> 11) / 2**53 for value in published]


@pytest.mark.parametrize("axis", ["position", "stream", "sample", "seed"])
def test_uniforms_are_uniform_and_uncorrelated_along_every_axis(axis: str):
    count = 20_000
    if axis == "position":
        drawn = numbers(count=count)
    else:
        changes = {
            "stream": lambda i: stream_key(0, (7, i), 0),
            "sample": lambda i: stream_key(0, (7,), i),
            "seed": lambda i: stream_key(i, (7,), 0),
        }
        keys = torch.tensor([changes[axis](i) for i in range(count)])
        drawn = uniforms(keys[:, 0], keys[:, 1], torch.full((count,), 3))
    assert ((drawn >= 0) & (drawn < 1)).all()
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-3
    # The correlation of neighbours has a standard deviation of 1 / sqrt(count): 4 of them.
    assert abs(float(torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1])) < 4 / math.sqrt(count)


def test_every_coordinate_changes_the_stream():
    streams = [(), (0,), (0, 0), (1, 2), (12,), (2, 1), (1, 2, 0), (-1,), (2**40,)]
    keys = {stream_key(seed, stream, sample) for seed in (0, 1, -1) for stream in streams for sample in (0, 1)}
    assert len(keys) == 3 * len(streams) * 2
    assert all(-(2**63) <= number < 2**63 for key in keys for number in key)


def test_draw_inverts_the_cumulative_sum():
    logits = torch.tensor([0.25, 0.25, 0.5]).log().expand(7, 3)
    drawn = draw(logits, torch.tensor([0.0, 0.2499, 0.2501, 0.4999, 0.5001, 0.75, 1 - 2**-53], dtype=torch.float64))
    assert drawn.tolist() == [0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("vocabulary", [5, 100_003])
def test_draw_never_takes_an_impossible_token(vocabulary: int):
    logits = torch.full((4, vocabulary), -math.inf)
    possible = [1, vocabulary // 2, vocabulary - 2]
    logits[:, possible] = torch.tensor([0.1, -0.5, 0.7])
    ends = torch.tensor([0.0, 2.0**-53, 1 - 2.0**-52, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(logits, ends).tolist() == [1, 1, vocabulary - 2, vocabulary - 2]
    spread = draw(logits[:1].expand(60, -1), numbers(count=60))
    assert set(spread.tolist()) == set(possible)


def test_draw_reaches_tokens_that_float32_sums_would_lose():
    # The last token has probability 2e-9: in float32 the sum is 1 before it.
    logits = torch.tensor([[0.0, -20.0]]).expand(3, 2)
    assert draw(logits, torch.tensor([1 - 3e-9, 1 - 1e-9, 1 - 2**-53], dtype=torch.float64)).tolist() == [0, 1, 1]
    # And 100 003 equal ones are told apart.
    places = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    drawn = draw(torch.zeros(3, 100_003), places)
    assert (drawn - (places * 100_003).floor().long()).abs().max() <= 1


def kept_by_a_loop(probs: list[float], top_k: int, top_p: float) -> set[int]:
    order = sorted(range(len(probs)), key=lambda token: -probs[token])[: top_k or len(probs)]
    total = math.fsum(probs[token] for token in order)
    kept: set[int] = set()
    mass = 0.0
    for token in order:
        if mass / total >= top_p:
            break
        kept.add(token)
        mass += probs[token]
    return kept


@pytest.mark.parametrize("vocabulary", [3, 40, 1500])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 0.9), (0, 0.3), (0, 1e-6), (5, 1.0), (1, 1.0), (7, 0.6), (2000, 0.97)]
)
def test_top_k_and_top_p_keep_what_a_loop_keeps(vocabulary: int, top_k: int, top_p: float):
    # Flat rows need more than the candidates that top-p tries first; steep ones few.
    logits = torch.randn(6, vocabulary) * torch.tensor([0.1, 0.5, 1, 2, 4, 8])[:, None]
    served = served_logits(logits, Sampling(1, temperature=0.7, top_k=top_k, top_p=top_p))
    for row, wanted in zip(served, logits / 0.7, strict=True):
        kept = kept_by_a_loop(wanted.double().softmax(-1).tolist(), top_k, top_p)
        assert set((row > -math.inf).nonzero()[:, 0].tolist()) == kept
        places = sorted(kept)
        torch.testing.assert_close(row[places], wanted[places])


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(5, 0.8, 1.3), (0, 0.7, 0.6), (11, 1.0, 1.0), (3, 0.5, 2.0)]
)
def test_filters_are_those_of_transformers(top_k: int, top_p: float, temperature: float):
    logits = torch.randn(16, 50) * 2
    expected = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits  # type: ignore[arg-type]
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)  # type: ignore[arg-type]
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)  # type: ignore[arg-type]
    served = served_logits(logits, Sampling(1, temperature=temperature, top_k=top_k, top_p=top_p))
    torch.testing.assert_close(served, expected)


def test_ties_do_not_widen_the_sets():
    served = served_logits(torch.zeros(1, 10), Sampling(1, top_p=0.45))
    assert int((served > -math.inf).sum()) == 5
    assert int((served_logits(torch.zeros(1, 10), Sampling(1, top_k=3)) > -math.inf).sum()) == 3


# Rows of a batch padded on the left: prompt, completion.
HISTORIES = [
    ([1, 2, 3, 1, 2], [3, 1, 2, 3]),
    ([4, 4, 4], [4]),
    ([5], [6, 5, 6, 5, 6, 5]),
    ([7, 8, 9, 7, 8], []),
    ([0, 0, 1, 2], [0, 0]),  # token 0 is also what the padding holds
]
PADDING = 0


def history_of(rows: list[tuple[list[int], list[int]]]) -> History:
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    tokens, real, written = [], [], []
    for prompt, completion in rows:
        pad = width - len(prompt) - len(completion)
        tokens.append([PADDING] * pad + prompt + completion)
        real.append([False] * pad + [True] * (width - pad))
        written.append([False] * (width - len(completion)) + [True] * len(completion))
    return History(torch.tensor(tokens), torch.tensor(real), torch.tensor(written))


def test_repetition_penalty_counts_prompt_and_completion_but_no_padding():
    check_against(RepetitionPenaltyLogitsProcessor(1.7), Sampling(9, temperature=0, repetition_penalty=1.7))
    check_against(RepetitionPenaltyLogitsProcessor(0.6), Sampling(9, temperature=0, repetition_penalty=0.6))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 20])
def test_banned_ngrams_are_those_of_transformers(size: int):
    check_against(NoRepeatNGramLogitsProcessor(size), Sampling(9, temperature=0, no_repeat_ngram_size=size))


def test_ngrams_do_not_reach_into_the_padding():
    # What stands in the padding is what an earlier row left there: 3 5 is no bigram of this row, 3 9 is.
    tokens = torch.tensor([[3, 5, 3, 5, 3, 9, 3]])
    real = torch.tensor([[False] * 4 + [True] * 3])
    history = History(tokens, real, torch.zeros_like(real))
    served = served_logits(torch.zeros(1, 12), Sampling(9, temperature=0, no_repeat_ngram_size=2), history)
    assert (served[0] == -math.inf).nonzero()[:, 0].tolist() == [9]


def check_against(processor: LogitsProcessor, sampling: Sampling) -> None:
    logits = torch.randn(len(HISTORIES), 12)
    served = served_logits(logits, sampling, history_of(HISTORIES))
    for row, (prompt, completion) in enumerate(HISTORIES):
        expected = processor(torch.tensor([prompt + completion]), logits[row : row + 1].clone())  # type: ignore[arg-type]
        torch.testing.assert_close(served[row], expected[0])


def test_presence_and_frequency_count_the_completion_alone():
    logits = torch.randn(len(HISTORIES), 12)
    sampling = Sampling(9, temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    served = served_logits(logits, sampling, history_of(HISTORIES))
    for row, (_, completion) in enumerate(HISTORIES):
        expected = logits[row].clone()
        for token, count in Counter(completion).items():
            expected[token] -= 0.5 + 0.25 * count
        torch.testing.assert_close(served[row], expected)


def test_stop_tokens_wait_for_min_tokens():
    logits = torch.randn(len(HISTORIES), 12)
    sampling = Sampling(9, temperature=0, min_tokens=4, stop_tokens=(2, 11))
    served = served_logits(logits, sampling, history_of(HISTORIES))
    for row, (prompt, completion) in enumerate(HISTORIES):
        processor = MinNewTokensLengthLogitsProcessor(len(prompt), 4, [2, 11], device="cpu")
        expected = processor(torch.tensor([prompt + completion]), logits[row : row + 1].clone())  # type: ignore[arg-type]
        torch.testing.assert_close(served[row], expected[0])


def test_penalties_come_before_the_temperature():
    logits = torch.randn(len(HISTORIES), 12)
    both = Sampling(9, temperature=0.5, presence_penalty=0.7, repetition_penalty=1.5)
    served = served_logits(logits, both, history_of(HISTORIES))
    greedy = Sampling(9, temperature=0, presence_penalty=0.7, repetition_penalty=1.5)
    torch.testing.assert_close(served, served_logits(logits, greedy, history_of(HISTORIES)) / 0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("n", 0),
        ("seed", 0.5),
        ("min_tokens", 9),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("no_repeat_ngram_size", -2),
        ("stop_tokens", 3),
        ("stop_tokens", (-1,)),
        ("stop_tokens", ("a",)),
        ("stop_strings", "stop"),
        ("stop_strings", ("",)),
    ],
)
def test_sampling_refuses_what_has_no_meaning(name: str, value: Any):
    with pytest.raises(LimbeckError, match=rf"sampling\.{name} must be .*, found .*: change sampling"):
        Sampling(**{"max_tokens": 8, name: value})


def test_sampling_takes_lists_from_a_recipe():
    assert Sampling(8, stop_tokens=[1, 2], stop_strings=["a"]) == Sampling(8, stop_tokens=(1, 2), stop_strings=("a",))  # type: ignore[arg-type]
