"""A tiny random model for the evaluation tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from limbeck.data.embedded.vocabulary import tokenizer as embedded_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return embedded_tokenizer()


@pytest.fixture
def tiny(tokenizer: Any) -> Callable[..., LlamaForCausalLM]:
    """tiny(seed, width=16, extra_rows=0, **config): far from uniform, so that what it writes varies with the prompt."""

    def build(seed: int, width: int = 16, extra_rows: int = 0, **config: Any) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        settings = LlamaConfig(
            vocab_size=len(tokenizer) + extra_rows,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            initializer_range=0.5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **config,
        )
        return LlamaForCausalLM(settings).eval()

    return build
