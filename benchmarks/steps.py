"""A whole on-policy step: the student writes, both models read, the student learns."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.common import (
    DTYPES,
    Contender,
    Result,
    Row,
    in_turn,
    llama_15m,
    llama_50m,
    peer,
    random_prompts,
    real_model,
    say,
    shared,
)
from benchmarks.rollouts import question_tokens
from benchmarks.training import TRL_RUNS, Job, limbeck_run
from limbeck.models import load_model, load_tokenizer, set_vocabulary
from limbeck.types import Example

OURS: dict[str, dict[str, Any]] = {
    "limbeck": {},
    "limbeck, gradient checkpointing": {"gradient_checkpointing": True},
}

STUDENT, TEACHER = "qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct"


def race(row: str, case: str, dtype: str, job: Job, student: Any, rounds: int) -> Iterator[Result]:
    """All from the same student, in turn. limbeck also with gradient checkpointing, which does not keep it from writing
    with a cache, as it does trl."""
    contenders = [
        Contender(
            who, "ours", lambda run: run(), partial(lambda more: limbeck_run(job, copy.deepcopy(student), **more), more)
        )
        for who, more in OURS.items()
    ]
    for who, (module, ready) in TRL_RUNS.items():
        trl = peer(module)
        if trl is None:
            yield Result(row, case, dtype, who, "peer", note="not installed")
        else:
            prepare = partial(lambda ready, trl: ready(trl, job, copy.deepcopy(student)), ready, trl)
            contenders.append(Contender(who, "peer", lambda run: run(), prepare))
    timings = in_turn(contenders, rounds, warm_up=False)
    for item in contenders:
        timing = timings[item.who]
        if timing.failure:
            yield Result(row, case, dtype, item.who, item.side, note=timing.failure)
        else:
            numbers = {**timing.output.numbers, "peak_mib": timing.numbers["peak_mib"]}
            yield Result(row, case, dtype, item.who, item.side, numbers)


def nameless_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A token for each id, a pad token, no EOS."""
    words = {f"t{place}": place for place in range(vocabulary)}
    core = Tokenizer(WordLevel(words, unk_token="t1"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="t0", unk_token="t1")


def examples_of(prompts: list[list[int]], completions: list[list[int]]) -> list[Example]:
    """The completions are never learnt here; GKDTrainer divides its loss by their number of tokens."""
    return [
        Example([*prompt, *completion], [False] * len(prompt) + [True] * len(completion), len(prompt), index=index)
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]


def synthetic(case: str, quick: bool) -> Iterator[Result]:
    """bf16: products by autocast, the student's weights in float32, the teacher's in bf16."""
    batch, prompt, new, steps = (4, 8, 8, 2) if quick else (16, 32, 96, 4)
    for dtype in DTYPES:
        say(f"  {case} {dtype}")
        student = llama_15m(DTYPES["fp32"], quick)
        teacher = llama_50m(DTYPES[dtype], quick).requires_grad_(False)
        vocabulary = student.config.vocab_size
        texts = random_prompts(batch, prompt + new, vocabulary)
        job = Job(
            teacher,
            nameless_tokenizer(vocabulary),
            examples_of([text[:prompt] for text in texts], [text[prompt:] for text in texts]),
            new_tokens=new,
            steps=steps,
            autocast=dtype == "bf16",
        )
        yield from race("step", case, dtype, job, student, rounds=1 if quick else 2)


def real(case: str, quick: bool) -> Iterator[Result]:
    """Questions whose prompts are the nearest to 100 tokens; EOS ruled out, so that both write the same number."""
    stories = shared("models/stories260k") if quick else None
    student_folder, teacher_folder = stories or real_model(STUDENT), stories or real_model(TEACHER)
    count, length, new, steps = (2, 100, 8, 2) if quick else (8, 100, 128, 3)
    dtype = DTYPES["bf16"]
    student, teacher = load_model(student_folder, dtype=dtype), load_model(teacher_folder, dtype=dtype)
    tokenizer = load_tokenizer(student_folder)
    rows = [json.loads(line) for line in shared("data/gsm8k_train.jsonl").read_text().splitlines()[:500]]
    asked = sorted(rows, key=lambda row: abs(len(question_tokens(tokenizer, row["question"])) - length))[:count]
    prompts = [question_tokens(tokenizer, row["question"]) for row in asked]
    answers = [tokenizer(row["answer"], add_special_tokens=False)["input_ids"] for row in asked]
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    tokenizer.eos_token = None
    for model in (student, teacher.requires_grad_(False)):
        set_vocabulary(model, vocabulary)
        model.generation_config.eos_token_id = None
        model.config.eos_token_id = None
    job = Job(teacher, tokenizer, examples_of(prompts, answers), new_tokens=new, steps=steps)
    yield from race("step-real", case, "bf16", job, student, rounds=1)


ROWS = [
    Row(
        "step",
        "One on-policy step of GKD, JSD(0.5): a Llama of 15 M parameters from one of 48 M, V=32000, 16 x (32 + 96); "
        "bf16 by autocast",
        "step_s",
        lambda quick: ["batch 4" if quick else "batch 16"],
        synthetic,
    ),
    Row(
        "step-real",
        "The same on GSM8K: Qwen2.5-Coder 0.5B from 1.5B, 8 x (100 + 128), weights in bf16",
        "step_s",
        lambda quick: ["stories260k" if quick else "qwen 0.5B from 1.5B"],
        real,
    ),
]
