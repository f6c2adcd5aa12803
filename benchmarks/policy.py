"""What a policy gradient costs beside plain distillation: limbeck's MiniLLM beside limbeck's own KD and GKD."""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from benchmarks.common import DTYPES, Result, Row, llama_15m, llama_50m, random_prompts, say
from benchmarks.steps import examples_of, nameless_tokenizer
from benchmarks.training import PLAIN_ARGUMENTS
from limbeck.decoding import Sampling
from limbeck.objectives import MiniLLM, divergence, language_modelling, policy
from limbeck.sources import Student, TokenMix, dataset
from limbeck.training import Trainer
from limbeck.training.trainer import Beside
from limbeck.types import Example, Rollout

INNER_EPOCHS = 4


@dataclass(frozen=True)
class Blocks:
    """A corpus of the sequences' own length, so that the language-modelling batch has as many learnt tokens."""

    rows: list[Example]
    learnt: int

    def draw(self, examples: list[Example], seed: int, step: int) -> list[Rollout]:
        cut = [self.rows[example.index].tokens[: self.learnt + 1] for example in examples]
        return [Rollout(tokens, [False] + [True] * self.learnt, 0, "dataset") for tokens in cut]


def seconds(method: str, student: Any, teacher: Any, rows: list[Example], new: int, *, steps: int, bf16: bool) -> Any:
    """(seconds of an optimiser step apart from rollouts, seconds with them): means over whole cycles of inner epochs,
    the first cycle apart."""
    tokenizer = nameless_tokenizer(student.config.vocab_size)
    sampling = Sampling(new)
    inner = INNER_EPOCHS if method.startswith("minillm") else 1
    options: dict[str, Any] = {"source": dataset, "objective": partial(divergence, name="forward_kl")}
    if method == "gkd":
        options["source"] = Student(student, sampling, tokenizer)
    if inner > 1:
        options = {
            "source": TokenMix(student, teacher, 0.2, sampling, tokenizer),
            "objective": partial(policy, name="reverse_kl", clip=0.2),
            "credit": MiniLLM(),
            "inner_epochs": inner,
        }
    if method == "minillm + text":
        corpus: Any = Blocks(rows, new)
        options["beside"] = Beside(corpus, language_modelling, 1.0)
    arguments = {**PLAIN_ARGUMENTS, "logging_steps": 1, "max_steps": inner * (steps + 1), "learning_rate": 1e-5}
    folder = str(Path(tempfile.gettempdir()) / "limbeck-benchmarks")  # nothing is saved
    trainer = Trainer(
        model=student,
        args=TrainingArguments(
            output_dir=folder, per_device_train_batch_size=len(rows), remove_unused_columns=False, **arguments
        ),
        examples=rows,
        teacher=teacher,
        tokenizer=tokenizer,
        autocast=torch.bfloat16 if bf16 else None,
        **options,
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "student_s" in row][inner:]
    trained = [row["teacher_s"] + row["student_s"] for row in logged]
    rollouts = [row["rollout_s"] for row in logged]
    return statistics.mean(trained), statistics.mean(trained) + statistics.mean(rollouts)


def cost(case: str, quick: bool) -> Iterator[Result]:
    batch, prompt, new, steps = (4, 8, 8, 1) if quick else (16, 32, 96, 3)
    for dtype in DTYPES:
        size = llama_50m if case.startswith("teacher 3x") else llama_15m
        teacher = size(DTYPES[dtype], quick).requires_grad_(False)
        vocabulary = teacher.config.vocab_size
        texts = random_prompts(batch, prompt + new, vocabulary)
        rows = examples_of([text[:prompt] for text in texts], [text[prompt:] for text in texts])
        for method in ("kd", "gkd", "minillm", "minillm + text"):
            say(f"  {case} {dtype}: {method}")
            student = copy.deepcopy(llama_15m(DTYPES["fp32"], quick))
            trained, whole = seconds(method, student, teacher, rows, new, steps=steps, bf16=dtype == "bf16")
            numbers = {"sequence_ms": 1e3 * trained / batch, "with_rollout_ms": 1e3 * whole / batch}
            if method == "kd":
                kd = numbers["sequence_ms"]
            elif method == "gkd":
                gkd = numbers["with_rollout_ms"]
            else:
                numbers |= {"over_kd": numbers["sequence_ms"] / kd, "over_gkd": numbers["with_rollout_ms"] / gkd}
            yield Result("policy", case, dtype, method, "ours", numbers)


ROWS = [
    Row(
        "policy",
        "Time per trained sequence (each of 4 inner epochs counts), 16 x (32 + 96), V=32000, a student of 15 M "
        "parameters: MiniLLM over our KD, rollouts apart, and over our GKD at lmbda=1 with them; `+ text`: a "
        "language-modelling batch of as many tokens",
        "sequence_ms",
        lambda quick: ["teacher 3x", "teacher of equal size"],
        cost,
    )
]
