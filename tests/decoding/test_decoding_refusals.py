"""What the rollout engine refuses, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding_helpers import VOCABULARY, llama
from torch import nn
from transformers import (
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from limbeck.decoding import Prompt, Sampling, generate
from limbeck.errors import LimbeckError, RolloutError


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[5], []], "prompt 1: expected at least one token, found none"),
        ([[5], [6], [5] * 64], "prompt 2: expected fewer tokens than the context's 64, found 64"),
        ([[5], [6] * 80], "prompt 1: expected fewer tokens than the context's 64, found 80"),
        ([[5, VOCABULARY]], f"prompt 0: expected tokens below {VOCABULARY}, found {VOCABULARY}"),
        ([[5, -1]], f"prompt 0: expected tokens below {VOCABULARY}, found -1"),
        ([Prompt([5], decoder_start=[1])], "prompt 0: expected tokens alone for a causal model"),
        ([Prompt([5], extras={"pixels": 1})], "prompt 0: expected tokens alone for a causal model"),
    ],
)
def test_bad_prompts_are_named(model: LlamaForCausalLM, prompts: list[Any], message: str):
    with pytest.raises(RolloutError, match=message):
        generate(model, prompts, Sampling(5))


def test_nan_logits_name_prompt_and_position():
    model = llama()
    prompts = [[8, 9], [5, 6]]
    healthy, ill = (completion.tokens for completion in generate(model, prompts, Sampling(12)))
    place, token = next((i, t) for i, t in enumerate(ill[:-1]) if i > 1 and t not in [*healthy, *ill[:i], 5, 6, 8, 9])
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")  # reading this token makes the next logits NaN
    with pytest.raises(RolloutError, match=f"prompt 1: .*found NaN at position {place + 1} of the completion"):
        generate(model, prompts, Sampling(12))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(60, temperature=0, no_repeat_ngram_size=1), Sampling(5, min_tokens=5, stop_tokens=tuple(range(24)))],
)
def test_nothing_left_to_draw_is_said(model: LlamaForCausalLM, sampling: Sampling):
    with pytest.raises(RolloutError, match="prompt 0: expected a token to draw at position .* ruled out"):
        generate(model, [[5, 6]], sampling)


def test_bad_calls_are_refused(model: LlamaForCausalLM):
    with pytest.raises(RolloutError, match="expected a tokenizer"):
        generate(model, [[5]], Sampling(5, stop_strings=("a",)))
    with pytest.raises(RolloutError, match=r"stop tokens below the vocabulary's 24, found \[24\]"):
        generate(model, [[5]], Sampling(5, stop_tokens=(3, 24)))
    with pytest.raises(RolloutError, match="batch_size of at least 1, found 0"):
        generate(model, [[5]], Sampling(5), batch_size=0)
    with pytest.raises(RolloutError, match="expected a stream for each of 2 prompts, found 1"):
        generate(model, [[5], [6]], Sampling(5), streams=[(0,)])
    with pytest.raises(LimbeckError, match="expected a transformers model"):
        generate(nn.Linear(2, 2), [[5]], Sampling(5))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=24, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(RolloutError, match="found an encoder-decoder"):
        generate(t5, [[5]], Sampling(5))
