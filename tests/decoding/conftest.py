"""The tiny model, made once a test file."""

from __future__ import annotations

import pytest
from decoding_helpers import llama
from transformers import LlamaForCausalLM


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama()
