"""Real language models, where `../shared/get-model` has made them: heads, layers, GGUF, preflight."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from limbeck.errors import PreflightError
from limbeck.models import (
    adapters_off,
    build_student,
    cast,
    check_head,
    completion_hidden,
    eos_tokens,
    load_model,
    load_tokenizer,
    preflight,
)
from limbeck.ops.chunked import head_logits

NAMES = ("smollm2-135m-instruct", "gemma-3-270m", "qwen2.5-coder-0.5b-instruct")
TEXT = "Once upon a time there was a small boat. It sailed over the sea, from Lisbon to Goa, with 12 sailors."

pytestmark = pytest.mark.real


def home(name: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("LIMBECK_MODELS") or cache / "limbeck-models") / name
    if not (folder / "hf" / "config.json").exists():
        pytest.skip(f"needs the real model {name}: ../shared/get-model {name}")
    return folder


def batch(tokenizer: Any) -> dict[str, torch.Tensor]:
    tokens_BT = torch.tensor([tokenizer(TEXT)["input_ids"]])
    ones_BT = torch.ones_like(tokens_BT)
    return {"input_ids": tokens_BT, "attention_mask": ones_BT, "learnt": ones_BT.bool()}


def nats(model: Any, tokenizer: Any) -> float:
    """Mean cross-entropy of a text, through our hidden states, head and shift."""
    with torch.no_grad():
        hidden_NH, tokens_N, head = completion_hidden(model, batch(tokenizer))
        return torch.nn.functional.cross_entropy(head_logits(hidden_NH, head), tokens_N).item()


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_transformers_own_and_a_cut_survives_saving(name: str, tmp_path: Path) -> None:
    path = home(name) / "hf"
    model, tokenizer = load_model(path), load_tokenizer(path)
    check_head(model)
    tokens_BT = batch(tokenizer)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=tokens_BT, labels=tokens_BT).loss.item()
    assert nats(model, tokenizer) == pytest.approx(expected, abs=1e-4)
    assert expected < 5

    cut, _ = build_student({"from_teacher": {"layers": [0, 1, 5, 7]}}, model, tokenizer, dtype=torch.bfloat16)
    cut.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens_BT).logits, cut(input_ids=tokens_BT).logits)
    assert preflight(cut, tokenizer, model, tokenizer) == max(tokenizer.get_vocab().values()) + 1


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_real_gguf_file_is_its_folder(name: str) -> None:
    """The folder was made from the file by transformers alone."""
    folder = home(name)
    file, plain = folder / f"{name}.gguf", folder / "hf"
    tokenizer = load_tokenizer(file)
    assert tokenizer.get_vocab() == load_tokenizer(plain).get_vocab()
    one, other = load_model(file, dtype=torch.bfloat16), load_model(plain, dtype=torch.bfloat16)
    assert nats(one, tokenizer) == nats(other, tokenizer)
    assert nats(load_model(file), tokenizer) == pytest.approx(nats(other, tokenizer), abs=0.05)


def test_the_ends_of_a_chat_model() -> None:
    path = home("qwen2.5-coder-0.5b-instruct") / "hf"
    model, tokenizer = load_model(path, dtype=torch.bfloat16), load_tokenizer(path)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in eos_tokens(model, tokenizer)


def test_two_families_do_not_fit() -> None:
    one, other = (home(name) / "hf" for name in NAMES[:2])
    with pytest.raises(PreflightError, match="49152 tokens in the student"):
        preflight(load_model(one), load_tokenizer(one), load_model(other), load_tokenizer(other))


def test_lora_on_one_copy() -> None:
    path = home("smollm2-135m-instruct") / "hf"
    teacher = load_model(path, dtype=torch.bfloat16)
    tokenizer = load_tokenizer(path)
    expected = nats(teacher, tokenizer)
    student, _ = build_student({"path": str(path), "lora": {"r": 8}}, teacher, tokenizer)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        hidden_NH, tokens_N, head = completion_hidden(student, batch(tokenizer))
        torch.nn.functional.cross_entropy(head_logits(hidden_NH, head), tokens_N).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert nats(student, tokenizer) < expected - 0.05
    with adapters_off(student) as base:
        assert nats(base, tokenizer) == expected


def test_cast_keeps_rotary_frequencies_where_to_rounds_them() -> None:
    path = home("smollm2-135m-instruct") / "hf"
    loaded = load_model(path, dtype=torch.bfloat16)
    whole: Any = load_model(path)
    positions = torch.arange(200)[None]
    with torch.no_grad():
        expected = loaded(input_ids=positions).logits
        assert torch.equal(cast(load_model(path), torch.bfloat16)(input_ids=positions).logits, expected)
        assert not torch.equal(whole.to(torch.bfloat16)(input_ids=positions).logits, expected)
