"""The rollout engine: batches, order, randomness, log-probabilities, ends of completions, errors."""

from __future__ import annotations

import importlib
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding_helpers import STOP, VOCABULARY, llama
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from limbeck.decoding import Completion, Prompt, Sampling, generate
from limbeck.errors import RolloutError


def prompts_of(count: int, longest: int = 14) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


class Forwards:
    """The shapes of a model's forwards: rows that read prompts, rows of one token."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.handle = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))

    def __enter__(self) -> Forwards:
        return self

    def __exit__(self, *exception: object) -> None:
        self.handle.remove()


# -- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_batch_size_and_order_change_nothing(model: LlamaForCausalLM, n: int):
    prompts = prompts_of(17)
    sampling = Sampling(20, seed=5, stop_tokens=(STOP, 3), n=n)
    streams = [(index,) for index in range(17)]
    whole = generate(model, prompts, sampling, batch_size=64, streams=streams)
    assert len(whole) == 17 * n
    for batch_size in (1, 3, 16):
        other = generate(model, prompts, sampling, batch_size=batch_size)
        assert tokens_of(other) == tokens_of(whole)
        assert [c.finish_reason for c in other] == [c.finish_reason for c in whole]
        for one, two in zip(other, whole, strict=True):
            torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(two.logprobs), atol=1e-5, rtol=0)
    backwards = generate(model, prompts[::-1], sampling, batch_size=3, streams=streams[::-1])
    groups = [tokens_of(backwards)[place : place + n] for place in range(0, 17 * n, n)]
    assert [tokens for group in groups[::-1] for tokens in group] == tokens_of(whole)
    # Neighbours that leave and join at other times do not matter either.
    alone = generate(model, prompts[4:5], sampling, streams=streams[4:5])
    assert tokens_of(alone) == tokens_of(whole)[4 * n : 5 * n]


def test_prompts_read_in_pieces_change_nothing(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch):
    prompts = prompts_of(17)
    whole = generate(model, prompts, Sampling(20, n=2))
    engine = importlib.import_module("limbeck.decoding.writer")
    monkeypatch.setattr(engine, "_PREFILL_TOKENS", 20)
    monkeypatch.setattr(engine, "_GROWTH", 2)  # and buffers that grow and move all the time
    assert tokens_of(generate(model, prompts, Sampling(20, n=2), batch_size=7)) == tokens_of(whole)


def test_padding_does_not_reach_a_row(model: LlamaForCausalLM):
    short, long = [5, 6], list(range(3, 23)) * 2
    sampling = Sampling(12, seed=1)
    alone = generate(model, [short], sampling)[0]
    beside = generate(model, [short, long], sampling)[0]
    assert beside.tokens == alone.tokens
    torch.testing.assert_close(torch.tensor(beside.logprobs), torch.tensor(alone.logprobs), atol=1e-5, rtol=0)


def test_only_live_rows_are_computed_and_waiting_prompts_join(model: LlamaForCausalLM):
    prompts = [prompt + [4] for prompt in prompts_of(40)]  # two tokens at least: a row of one token is a step
    sampling = Sampling(30, seed=2, stop_tokens=(STOP, 3, 4))
    with Forwards(model) as forwards:
        completions = generate(model, prompts, sampling, batch_size=8)
    lengths = [len(completion.tokens) for completion in completions]
    assert len(set(lengths)) > 5
    steps = [rows for rows, width in forwards.shapes if width == 1]
    # The first token of a completion comes from its prompt; each other costs one row of one step, and no row is idle.
    assert sum(steps) == sum(lengths) - len(lengths)
    assert sum(rows for rows, width in forwards.shapes if width > 1) == len(prompts)
    # In fixed batches of 8, in the order in which they are read, each batch would wait for its longest.
    order = sorted(range(40), key=lambda index: -len(prompts[index]))
    fixed = sum(max(lengths[index] for index in order[start : start + 8]) - 1 for start in range(0, 40, 8))
    assert len(steps) < 0.8 * fixed
    assert sum(steps) < 0.6 * 8 * fixed


def test_samples_of_one_prompt_read_it_once(model: LlamaForCausalLM):
    prompts = [prompt + [4] for prompt in prompts_of(3)]
    with Forwards(model) as forwards:
        generate(model, prompts, Sampling(5, n=4))
    assert [shape for shape in forwards.shapes if shape[1] > 1] == [(3, max(map(len, prompts)))]


def test_samples_and_streams_differ(model: LlamaForCausalLM):
    sampling = Sampling(12, n=3)
    completions = generate(model, [[5, 6], [5, 6]], sampling)
    assert len({tuple(tokens) for tokens in tokens_of(completions)}) == 6
    same = generate(model, [[5, 6], [5, 6]], sampling, streams=[(0, 9), (0, 9)])
    assert tokens_of(same)[:3] == tokens_of(same)[3:]
    assert tokens_of(same) != tokens_of(
        generate(model, [[5, 6], [5, 6]], Sampling(12, n=3, seed=1), streams=[(0, 9)] * 2)
    )


def test_global_generators_are_neither_read_nor_moved(model: LlamaForCausalLM):
    torch.manual_seed(1)
    first = generate(model, [[5]], Sampling(10))
    state = torch.get_rng_state()
    assert tokens_of(generate(model, [[5]], Sampling(10))) == tokens_of(first)
    assert torch.equal(state, torch.get_rng_state())


# -- what is written -------------------------------------------------------------------------------------------------


def test_greedy_is_what_transformers_writes(shared: Path):
    folder = shared / "models" / "stories260k"
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["Once upon a time", "Lily and Tom", "The", "One day, a big dog went to the park and saw", "She said"]
    prompts = [tokenizer(text).input_ids for text in texts]
    stop = model.config.eos_token_id
    completions = generate(model, prompts, Sampling(60, temperature=0, stop_tokens=(stop,)), batch_size=3)
    for prompt, completion in zip(prompts, completions, strict=True):
        inputs = torch.tensor([prompt])
        alone = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=60, do_sample=False)
        assert completion.tokens == alone[0, len(prompt) :].tolist()
        assert completion.finish_reason == ("stop" if completion.tokens[-1] == stop else "length")


@torch.no_grad()
def pair_probs(model: LlamaForCausalLM, prompt: list[int], temperature: float) -> torch.Tensor:
    """The exact probability of each pair of tokens after a prompt, by enumeration in float64: (V, V)."""
    vocabulary = model.config.vocab_size
    inputs = torch.tensor([[*prompt, token] for token in range(vocabulary)])
    probs = (model(input_ids=inputs).logits.double() / temperature).softmax(-1)
    return probs[0, len(prompt) - 1, :, None] * probs[:, len(prompt), :]


def test_samples_follow_the_model():
    """Chi-square over all pairs of tokens: the right temperature passes at p > .001, a temperature 10 % off fails."""
    model = llama(vocabulary=8, scale=0.3)
    prompt, samples = [3, 4, 5], 8000
    counts = Counter(tuple(c.tokens) for c in generate(model, [prompt], Sampling(2, temperature=0.8, n=samples)))
    observed = torch.tensor([counts[pair] for pair in itertools.product(range(8), repeat=2)])

    def p_value(temperature: float) -> float:
        expected = pair_probs(model, prompt, temperature).reshape(-1) * samples
        rare = expected < 5  # the chi-square distribution wants 5 a cell
        cells = torch.cat([expected[~rare], expected[rare].sum()[None]])
        seen = torch.cat([observed[~rare], observed[rare].sum()[None]])
        assert len(cells) > 20
        return float(stats.chisquare(seen.numpy(), cells.numpy()).pvalue)

    assert p_value(0.8) > 1e-3
    assert p_value(0.88) < 1e-6


def test_logprobs_are_raw_whatever_the_sampling(model: LlamaForCausalLM):
    prompts = prompts_of(9)
    sampling = Sampling(15, temperature=0.5, top_k=6, top_p=0.9, repetition_penalty=1.3, presence_penalty=0.4)
    for prompt, completion in zip(prompts, generate(model, prompts, sampling, batch_size=4), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion.tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)
        assert completion.teacher_logprobs is None


def test_penalties_see_the_prompt_and_the_completion(model: Any):
    prompts = prompts_of(6)
    sampling = Sampling(16, temperature=0, repetition_penalty=1.4, no_repeat_ngram_size=3)
    model.generation_config.eos_token_id = None
    for prompt, completion in zip(prompts, generate(model, prompts, sampling, batch_size=4), strict=True):
        inputs = torch.tensor([prompt])
        alone = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=16,
            do_sample=False,
            repetition_penalty=1.4,
            no_repeat_ngram_size=3,
        )
        assert completion.tokens == alone[0, len(prompt) :].tolist()


def test_padding_rows_of_the_vocabulary_are_never_written():
    model = llama(scale=0.02)
    real = generate(model, [[5, 6]], Sampling(40, n=8))
    assert any(token >= 16 for completion in real for token in completion.tokens)
    model.config.limbeck_rows = 16
    cut = generate(model, [[5, 6]], Sampling(40, n=8))
    assert all(token < 16 for completion in cut for token in completion.tokens)
    tokens = cut[0].tokens
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, *tokens]])).logits[0, 1:-1, :16]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(cut[0].logprobs), expected, atol=1e-4, rtol=0)
    with pytest.raises(RolloutError, match=r"prompt 0: expected tokens below 16, found 17"):
        generate(model, [[5, 17]], Sampling(4))


# -- where it ends ---------------------------------------------------------------------------------------------------


def test_stop_tokens_are_kept_and_end_a_completion(model: LlamaForCausalLM):
    prompts = prompts_of(30)
    endless = generate(model, prompts, Sampling(25))
    stopped = generate(model, prompts, Sampling(25, stop_tokens=(STOP, 7)))
    reasons = set()
    for whole, completion in zip(endless, stopped, strict=True):
        end = next((place + 1 for place, token in enumerate(whole.tokens) if token in (STOP, 7)), 25)
        assert completion.tokens == whole.tokens[:end]
        assert len(completion.logprobs) == end
        assert completion.finish_reason == ("stop" if completion.tokens[-1] in (STOP, 7) else "length")
        reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}


def test_a_stop_token_at_the_last_place_is_a_stop(model: LlamaForCausalLM):
    token = generate(model, [[5, 6]], Sampling(1))[0].tokens[0]
    assert generate(model, [[5, 6]], Sampling(1, stop_tokens=(token,)))[0].finish_reason == "stop"


def test_min_tokens_hold_stop_tokens_back(model: LlamaForCausalLM):
    stops = (STOP, 3, 4, 7)
    lengths = [len(c.tokens) for c in generate(model, prompts_of(30), Sampling(25, stop_tokens=stops, min_tokens=6))]
    assert min(lengths) == 7  # six tokens that are none, and the stop token
    assert min(len(c.tokens) for c in generate(model, prompts_of(30), Sampling(25, stop_tokens=stops))) < 6


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are letters and pairs of letters, and one special token of text `<end>`."""
    words = ["<end>", *"abcdefghijklmnop", "ab", "bc", "cd", "de", "ea", "ca", "ad"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def test_stop_strings_end_with_the_token_that_completes_them(model: LlamaForCausalLM):
    tokenizer = letters()
    assert len(tokenizer) == VOCABULARY
    prompts = prompts_of(40)
    strings = ("bcd", "ae", "dd", "<end>")
    endless = generate(model, prompts, Sampling(30))
    stopped = generate(model, prompts, Sampling(30, stop_strings=strings), tokenizer=tokenizer, batch_size=7)
    completed = Counter()
    for whole, completion in zip(endless, stopped, strict=True):
        texts = [tokenizer.decode(whole.tokens[:end]) for end in range(1, 31)]
        found = [end for end, text in enumerate(texts, 1) if any(string in text for string in strings)]
        assert completion.tokens == whole.tokens[: found[0] if found else 30]
        assert completion.finish_reason == ("stop" if found else "length")
        completed.update(string for string in strings if string in tokenizer.decode(completion.tokens))
    assert set(completed) == set(strings)


def test_the_prompt_is_not_searched_for_stop_strings(model: LlamaForCausalLM):
    tokenizer = letters()
    prompt = [1, 4, 4]  # "add": "dd" stands in it
    whole = generate(model, [prompt], Sampling(1))[0]
    assert generate(model, [prompt], Sampling(1, stop_strings=("dd",)), tokenizer=tokenizer)[0] == whole


def test_no_prompts_no_completions(model: LlamaForCausalLM):
    assert generate(model, [], Sampling(5)) == []


def test_no_tokens_asked_for(model: LlamaForCausalLM):
    assert generate(model, [[3], [4]], Sampling(0, n=2)) == [Completion([], [], "length")] * 4


def test_completions_end_with_the_context(model: LlamaForCausalLM):
    prompts = [[5] * 62, [5] * 3, [5] * 63, [6] * 50]
    completions = generate(model, prompts, Sampling(30), batch_size=2)
    assert [len(c.tokens) for c in completions] == [2, 30, 1, 14]
    assert {c.finish_reason for c in completions} == {"length"}


def test_prompt_record_is_its_tokens(model: LlamaForCausalLM):
    assert generate(model, [Prompt([5, 6])], Sampling(8)) == generate(model, [[5, 6]], Sampling(8))


# -- the model -------------------------------------------------------------------------------------------------------


def test_modes_are_restored_also_after_an_error():
    model = llama(attention_dropout=0.5)
    expected = generate(model, [[5, 6]], Sampling(10))
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert tokens_of(generate(model, [[5, 6]], Sampling(10))) == tokens_of(expected)  # no dropout
    assert [module.training for module in model.modules()] == modes
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(RolloutError):
        generate(model, [[5, 6]], Sampling(10))
    assert [module.training for module in model.modules()] == modes


def test_gradient_checkpointing_keeps_the_cache():
    model = llama()
    expected = generate(model, [[5, 6, 7]], Sampling(10))
    model.train()
    model.activation_checkpointing_enable()
    model.config.use_cache = False
    with Forwards(model) as forwards:
        assert tokens_of(generate(model, [[5, 6, 7]], Sampling(10))) == tokens_of(expected)
    assert forwards.shapes == [(1, 3)] + [(1, 1)] * 9
    assert model.is_activation_checkpointing


def test_weights_train_after_a_rollout_in_the_same_autocast():
    model = llama()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        completion = generate(model, [[5, 6]], Sampling(6))[0]
        tokens = torch.tensor([[5, 6, *completion.tokens]])
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_bfloat16(way: str):
    reference: Any = llama()
    if way == "weights":
        reference = reference.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
        completions = generate(reference, prompts_of(9), Sampling(15), batch_size=4)
        for prompt, completion in zip(prompts_of(9), completions, strict=True):
            with torch.no_grad():
                logits = reference(input_ids=torch.tensor([prompt + completion.tokens])).logits.float()
            expected = logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            expected = expected.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
            # bfloat16 keeps 8 bits: logits of about 2 are good to about .01, a few times over.
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=0.05, rtol=0)


def test_a_wrapped_model_writes_the_same(model: LlamaForCausalLM):
    class Wrapper(nn.Module):  # the shape of DistributedDataParallel: `module`, no config, no generate
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **kwargs: Any) -> Any:
            return self.module(**kwargs)

    wrapper = Wrapper(model)
    with Forwards(wrapper) as forwards:
        assert generate(wrapper, [[5, 6]], Sampling(8)) == generate(model, [[5, 6]], Sampling(8))
    assert len(forwards.shapes) == 8
