"""Speed: what is run is counted, and times and memory are bounded by a model of known cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch

from limbeck.errors import DataError
from limbeck.evaluation import speed
from limbeck.evaluation.speed import REPEATS

PROMPTS = [[1, 5, 6], [1, 7, 8, 9, 10], [1, 11]]


@pytest.fixture
def model(tiny: Callable[..., Any]) -> Any:
    """A model whose every greedy token ends the text, as far as its generation config goes."""
    found = tiny(0)
    with torch.no_grad():
        ends = [int(found(torch.tensor([prompt])).logits[0, -1].argmax()) for prompt in PROMPTS]
    found.generation_config.eos_token_id = ends
    return found


def test_every_completion_has_all_its_tokens(model: Any, tokenizer: Any) -> None:
    lengths: list[int] = []
    model.register_forward_hook(lambda *call: lengths.append(call[-1].logits.shape[0]))
    speed(model, tokenizer, PROMPTS, 6)
    # The warm-up, then for each prompt and repeat a first token and a whole completion; one sequence at a time.
    assert len(lengths) == 6 + len(PROMPTS) * REPEATS * (1 + 6)
    assert set(lengths) == {1}


def test_times_are_those_of_the_forwards(model: Any, tokenizer: Any) -> None:
    model.register_forward_hook(lambda *_: time.sleep(0.02))
    found = speed(model, tokenizer, PROMPTS[:1], 8)
    assert found.keys() == {"time_to_first_token_s", "tokens_per_s", "peak_memory_bytes"}
    assert 0.02 <= found["time_to_first_token_s"]
    assert found["tokens_per_s"] <= 50
    assert found["time_to_first_token_s"] < 8 / found["tokens_per_s"]


def test_a_full_context_counts_what_was_written(tiny: Callable[..., Any], tokenizer: Any) -> None:
    short = tiny(0)
    short.config.max_position_embeddings = 8
    short.register_forward_hook(lambda *_: time.sleep(0.02))
    assert speed(short, tokenizer, [[1, 2, 3]], 100)["tokens_per_s"] <= 50  # 5 tokens, not 100, in 5 forwards


def test_memory_in_use_for_a_moment_is_seen(model: Any, tokenizer: Any) -> None:
    size = 256 << 20
    calls: list[int] = []

    def hold(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:  # within the warm-up
            block = torch.ones(size, dtype=torch.uint8)
            time.sleep(0.1)
            del block

    model.register_forward_hook(hold)
    before = psutil.Process().memory_info().rss
    found = speed(model, tokenizer, PROMPTS[:1], 4)
    assert found["peak_memory_bytes"] >= before + 0.8 * size
    assert psutil.Process().memory_info().rss < before + 0.5 * size


def test_no_prompts(model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="at least one prompt"):
        speed(model, tokenizer, [], 4)
