"""Writing: limbeck.decoding.generate beside transformers' generate, on the same weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks.common import (
    DTYPES,
    Contender,
    Result,
    Row,
    in_turn,
    llama_15m,
    plain,
    random_prompts,
    real_model,
    say,
    shared,
)
from limbeck.decoding import Sampling, generate
from limbeck.models import eos_tokens, fast_linears, load_model, load_tokenizer

PROMPT, NEW, LONGEST, LEAST = 32, 128, 256, 8
EOS = 1
EOS_CHANCE = 1 / 80
"""A token's chance of being EOS in the row `natural`: 80 tokens on average before the limits."""

QUESTIONS = 48

MODELS = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct")


def ours(model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, batch: int) -> list[list[int]]:
    return [completion.tokens for completion in generate(fast_linears(model), prompts, sampling, batch_size=batch)]


@torch.no_grad()
def theirs(model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, batch: int) -> list[list[int]]:
    """By transformers, in batches padded on the left; of each completion, the tokens up to its stop token."""
    config = GenerationConfig(
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or None,
        top_k=0 if sampling.temperature else None,
        top_p=1.0,
        repetition_penalty=1.0,  # else the model's own
        max_new_tokens=sampling.max_tokens,
        min_new_tokens=sampling.min_tokens or None,
        eos_token_id=list(sampling.stop_tokens) or None,
        pad_token_id=0,
    )
    kept: list[list[int]] = []
    plain(model)
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        width = max(map(len, part))
        input_ids_BT = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in part])
        mask_BT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part])
        written_BT = model.generate(input_ids=input_ids_BT, attention_mask=mask_BT, generation_config=config)
        kept += [until_stop(row, sampling.stop_tokens) for row in written_BT[:, width:].tolist()]
    return kept


def until_stop(tokens: list[int], stop_tokens: Sequence[int]) -> list[int]:
    """The stop token stays."""
    ends = [place for place, token in enumerate(tokens) if token in stop_tokens]
    return tokens[: ends[0] + 1] if ends else tokens


def race(
    row: str,
    case: str,
    dtype: str,
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    batch: int,
    rounds: int,
    warm_up: bool = True,
) -> Iterator[Result]:
    """Both in turn. `same_as_peer`: the share of completions that are the peer's, told for greedy ones."""
    who, other = "limbeck", "transformers"
    contenders = [
        Contender(who, "ours", lambda _: ours(model, prompts, sampling, batch)),
        Contender(other, "peer", lambda _: theirs(model, prompts, sampling, batch)),
    ]
    timings = in_turn(contenders, rounds, warm_up)
    for item in contenders:
        timing = timings[item.who]
        if timing.failure:
            yield Result(row, case, dtype, item.who, item.side, note=timing.failure)
            continue
        written = sum(map(len, timing.output))
        numbers = {"tokens_per_s": written / timing.seconds, **timing.numbers, "tokens_each": written / len(prompts)}
        if sampling.temperature == 0 and item.side == "ours" and timings[other].output is not None:
            same = [mine == peers for mine, peers in zip(timing.output, timings[other].output, strict=True)]
            numbers["same_as_peer"] = sum(same) / len(same)
        yield Result(row, case, dtype, item.who, item.side, numbers)


def fixed_cases(quick: bool) -> list[str]:
    return ["batch 2"] if quick else ["batch 1", "batch 16", "batch 64"]


def fixed(case: str, quick: bool) -> Iterator[Result]:
    """No EOS: every completion is as long as it may be."""
    batch = int(case.split()[1])
    for dtype in DTYPES:
        say(f"  {case} {dtype}")
        model = llama_15m(DTYPES[dtype], quick)
        prompts = random_prompts(batch, PROMPT, model.config.vocab_size)
        sampling = Sampling(8 if quick else NEW)
        yield from race("rollouts", case, dtype, model, prompts, sampling, batch, 1 if quick else 3)


def with_eos(model: Any) -> Any:
    """The model with a bias on its head, under which EOS has about `EOS_CHANCE`."""
    vocabulary, width = model.lm_head.weight.shape
    head = torch.nn.Linear(width, vocabulary, dtype=model.dtype)
    head.weight = model.lm_head.weight
    with torch.no_grad():
        head.bias.zero_()
        head.bias[EOS] = torch.tensor(EOS_CHANCE * vocabulary).log()
    model.lm_head = head
    return model


def natural(case: str, quick: bool) -> Iterator[Result]:
    """Completions end when they like: tokens kept in a second, all waiting counted."""
    count, batch = (8, 4) if quick else (256, 64)
    for dtype in DTYPES:
        say(f"  {case} {dtype}")
        model = with_eos(llama_15m(DTYPES[dtype], quick))
        prompts = random_prompts(count, PROMPT, model.config.vocab_size)
        sampling = Sampling(16 if quick else LONGEST, stop_tokens=(EOS,), min_tokens=LEAST)
        yield from race("natural", case, dtype, model, prompts, sampling, batch, 1 if quick else 2)


def questions(tokenizer: Any, count: int) -> list[list[int]]:
    """The first questions of GSM8K's test set, as the model's chat template has them (bare where it has none)."""
    rows = [json.loads(line) for line in shared("data/gsm8k_test.jsonl").read_text().splitlines()[:count]]
    return [question_tokens(tokenizer, row["question"]) for row in rows]


def question_tokens(tokenizer: Any, question: str) -> list[int]:
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": question}]
        question = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return tokenizer(question, add_special_tokens=False)["input_ids"]
    return tokenizer(question)["input_ids"]


def greedy_cases(quick: bool) -> list[str]:
    return ["stories260k"] if quick else list(MODELS)


def greedy(case: str, quick: bool) -> Iterator[Result]:
    """A real model answers until its own EOS, more questions than fit into a batch. The larger one in bf16 alone: its
    float32 takes several minutes."""
    folder = shared("models/stories260k") if quick else real_model(case)
    tokenizer = load_tokenizer(folder)
    prompts = questions(tokenizer, 4 if quick else QUESTIONS)
    for dtype in DTYPES if case != MODELS[1] else ["bf16"]:
        say(f"  {case} {dtype}")
        model = load_model(folder, dtype=DTYPES[dtype])
        stops = eos_tokens(model, tokenizer)
        for write in (ours, theirs):  # kernels warm
            write(model, prompts[:2], Sampling(4, temperature=0.0, stop_tokens=stops), 2)
        sampling = Sampling(8 if quick else LONGEST, temperature=0.0, stop_tokens=stops)
        yield from race("greedy-real", case, dtype, model, prompts, sampling, 16, 1, warm_up=False)


ROWS = [
    Row(
        "rollouts",
        f"Sampling from a random Llama of 15 M parameters, V=32000, prompt {PROMPT}, new {NEW}, EOS ruled out",
        "tokens_per_s",
        fixed_cases,
        fixed,
        more_is_better=True,
    ),
    Row(
        "natural",
        f"The same model, 256 prompts in batches of 64, EOS at will between {LEAST} and {LONGEST} tokens",
        "tokens_per_s",
        lambda quick: ["8 prompts" if quick else "256 prompts"],
        natural,
        more_is_better=True,
    ),
    Row(
        "greedy-real",
        f"Greedy answers to {QUESTIONS} questions of GSM8K in batches of 16, at most {LONGEST} tokens",
        "tokens_per_s",
        greedy_cases,
        greedy,
        more_is_better=True,
    ),
]
