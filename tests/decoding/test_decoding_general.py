"""Models that the cache in place cannot hold, and memory that runs out: the same completions by another way."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import pytest
import torch
from decoding_helpers import STOP, VOCABULARY, llama
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from limbeck.decoding import Mix, Sampling, generate, speculate
from limbeck.errors import RolloutError

ENGINE = importlib.import_module("limbeck.decoding.generate")  # the package's attribute is the function
PROMPTS = [[5, 6, 7], [8], [9, 10, 11], [4, 3], [12, 13, 14, 15], [5, 6, 7]]


def mamba() -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(15, temperature=0),
        Sampling(15, n=3, seed=2, stop_tokens=(STOP, 7)),
        Sampling(12, temperature=0.8, top_k=6, top_p=0.9, repetition_penalty=1.3, presence_penalty=0.3, min_tokens=3),
    ],
    ids=["greedy", "samples", "filters"],
)
def test_the_general_path_writes_the_same(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    model.generation_config.repetition_penalty = 2.0  # a model's own settings are not asked
    in_place = generate(model, PROMPTS, sampling)
    monkeypatch.setattr(ENGINE, "beyond_attention", lambda config: "SomeLayer at layer 0 of llama")
    for batch_size in (1, 4, 64):
        written = generate(model, PROMPTS, sampling, batch_size=batch_size)
        for one, other in zip(in_place, written, strict=True):
            assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert model.generation_config.repetition_penalty == 2.0


def test_recurrent_models_write_by_transformers_own_loop(caplog: pytest.LogCaptureFixture) -> None:
    model = mamba()
    with caplog.at_level(logging.WARNING):
        completions = generate(model, PROMPTS, Sampling(8, n=2, seed=1))
        assert [c.tokens for c in generate(model, PROMPTS, Sampling(8, n=2, seed=1), batch_size=1)] == [
            c.tokens for c in completions
        ]
    assert caplog.text.count("transformers' own loop") == 1
    for place, completion in enumerate(completions):
        prompt = PROMPTS[place // 2]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion.tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)
    with pytest.raises(RolloutError, match="Mix: expected models of attention layers, found LinearAttentionLayer"):
        generate(Mix(model, model, 0.2), PROMPTS, Sampling(3))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_out_of_memory_halves_the_batch_and_loses_nothing(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    sampling = Sampling(20, n=4, stop_tokens=(STOP, 5, 9))
    expected = [c.tokens for c in generate(model, PROMPTS, sampling)]
    seen: list[int] = []

    def limited(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows = len(kwargs["input_ids"])
        if rows > 7:
            raise error
        seen.append(rows)

    model.register_forward_pre_hook(limited, with_kwargs=True)
    with caplog.at_level(logging.WARNING):
        assert [c.tokens for c in generate(model, PROMPTS, sampling)] == expected
        assert [record.getMessage()[-2:] for record in caplog.records] == ["12", " 6"]  # of 24
        assert [c.tokens for c in generate(model, PROMPTS, sampling)] == expected
    assert len(caplog.records) == 2 and max(seen) <= 6  # said once: the next rollouts begin with what fits


def test_what_was_written_before_memory_ran_out_is_not_written_again() -> None:
    """Memory runs out once, late: then only the rows in flight, 4 at most, are read a second time."""
    model = llama()
    prompts = [[3 + row, 7, 9] for row in range(16)]
    sampling = Sampling(6, stop_tokens=(STOP,))
    expected = [c.tokens for c in generate(model, prompts, sampling)]
    read = 0

    def limited(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal read
        rows, width = kwargs["input_ids"].shape
        if rows > 2 and read >= 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        read += rows if width > 1 else 0

    model.register_forward_pre_hook(limited, with_kwargs=True)
    assert [c.tokens for c in generate(model, prompts, sampling, batch_size=4)] == expected
    assert 16 < read <= 20


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    model = llama()

    def broken(*_: Any) -> None:
        raise RuntimeError("shape mismatch")

    model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        generate(model, PROMPTS, Sampling(3))


def test_out_of_memory_with_one_sequence_is_an_error() -> None:
    model = llama()

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, PROMPTS, Sampling(3))


def words() -> PreTrainedTokenizerFast:
    """As SentencePiece has them: each token is a word with the space before it, and a text's first space is left out
    when it is decoded."""
    tokens = ["<end>", *(f"\u2581{letter}" for letter in "abcdefghijklmnopqrstuvw")]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(tokens)}, unk_token="<end>"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.mark.parametrize("path", ["writer", "general", "engine"])
def test_a_stop_string_may_begin_with_the_first_space(
    model: LlamaForCausalLM, path: str, monkeypatch: pytest.MonkeyPatch
):
    """The completion of "a b" by " c" is " c", as a client sees it, though the token alone decodes to "c"."""
    tokenizer = words()
    if path == "general":
        monkeypatch.setattr(ENGINE, "beyond_attention", lambda config: "SomeLayer at layer 0 of llama")
    assert tokenizer.decode([3, 4]) == "c d" and tokenizer.decode([4]) == "d"
    for prompt in ([5], [6, 7, 8]):
        first = generate(model, [prompt], Sampling(1, temperature=0))[0].tokens[0]
        written = chr(ord("a") + first - 1)
        for string, stops in ((f" {written}", True), (f"{written}", True), (f"x {written}", False)):
            sampling = Sampling(6, temperature=0, stop_strings=(string,))
            if path == "engine":
                found = speculate(model, None, [prompt], sampling, tokenizer=tokenizer)[0]
            else:
                found = generate(model, [prompt], sampling, tokenizer=tokenizer)[0]
            assert (found.tokens == [first] and found.finish_reason == "stop") == stops
