"""Tokenizers of the data tests: a tiny one made here, and real ones from the folder beside the repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<eos>", "<bos>", "<user>", "<assistant>", "<system>", "<end>"]


def characters(**options: object) -> PreTrainedTokenizerFast:
    """One token a character: a = 6 ... z = 31, space 32, line break 33, ? . : 34 to 36; pad == eos == 0, no BOS."""
    letters = "abcdefghijklmnopqrstuvwxyz \n?.:#▁"
    vocabulary = {token: place for place, token in enumerate([*SPECIAL, *letters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="#"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        **{
            "tokenizer_object": backend,
            "eos_token": "<eos>",
            "pad_token": "<eos>",
            "additional_special_tokens": SPECIAL[2:],
            "chat_template": CHAT,
            "clean_up_tokenization_spaces": False,
            **options,
        }
    )


@pytest.fixture
def tiny() -> PreTrainedTokenizerFast:
    return characters()


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return characters


@pytest.fixture(scope="session")
def gpt2(shared: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")


@pytest.fixture(scope="session")
def qwen(shared: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen2.5")


@pytest.fixture(scope="session")
def stories(shared: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
