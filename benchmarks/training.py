"""limbeck's trainer and trl's GKDTrainer and DistillationTrainer, set up alike, on CPU."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments

from benchmarks.common import plain
from limbeck.decoding import Sampling
from limbeck.objectives import divergence
from limbeck.sources import Student
from limbeck.training import Trainer
from limbeck.types import Example


@dataclass(frozen=True)
class Job:
    """On-policy GKD with JSD(0.5): a step is one batch of all `examples`. Sampling at temperature 1 until one of
    `stop_tokens`. `autocast`: bf16 products on float32 weights."""

    teacher: Any
    tokenizer: Any
    examples: list[Example]
    new_tokens: int
    steps: int
    stop_tokens: tuple[int, ...] = ()
    autocast: bool = False

    def arguments(self) -> dict[str, Any]:
        return {
            "output_dir": str(Path(tempfile.gettempdir()) / "limbeck-benchmarks"),  # nothing is saved
            "max_steps": self.steps,
            "per_device_train_batch_size": len(self.examples),
            "learning_rate": 1e-5,
            **PLAIN_ARGUMENTS,
        }


PLAIN_ARGUMENTS: dict[str, Any] = {
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 10,
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}
"""Of both sides; the rest is transformers' defaults, the same optimiser above all."""


@dataclass
class Clock(TrainerCallback):
    """When training began and each step ended (s)."""

    ticks: list[float] = field(default_factory=list[float])

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ticks.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ticks.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of each step, its rollouts included."""
        return [end - start for start, end in zip(self.ticks, self.ticks[1:], strict=False)]


@dataclass(frozen=True)
class Trained:
    """Seconds of each step, and tokens written in all of them."""

    seconds: list[float]
    tokens: int

    @property
    def numbers(self) -> dict[str, float]:
        """The first step, in which kernels are chosen or compiled, apart."""
        tokens = self.tokens / len(self.seconds)
        return {"step_s": min(self.seconds[1:]), "first_step_s": self.seconds[0], "tokens_per_step": tokens}


def limbeck_run(job: Job, student: Any, **settings: Any) -> Callable[[], Trained]:
    """limbeck's trainer, ready. `settings`: TrainingArguments of its own."""
    clock = Clock()
    sampling = Sampling(job.new_tokens, stop_tokens=job.stop_tokens)
    trainer = Trainer(
        model=student,
        args=TrainingArguments(**job.arguments(), remove_unused_columns=False, **settings),
        examples=job.examples,
        source=Student(student, sampling, job.tokenizer),
        objective=partial(divergence, name="jsd", beta=0.5),
        teacher=job.teacher,
        tokenizer=job.tokenizer,
        autocast=torch.bfloat16 if job.autocast else None,
        callbacks=[clock],
    )

    def run() -> Trained:
        trainer.train()
        return Trained(clock.seconds, trainer.tokens_seen)

    return run


def gkd_run(gkd: ModuleType, job: Job, student: Any) -> Callable[[], Trained]:
    """trl's GKDTrainer, ready; the tokens that it writes are counted."""
    clock = Clock()
    trainer = gkd_trainer(
        gkd,
        student,
        job.teacher,
        job.tokenizer,
        job.examples,
        callbacks=[clock],
        **job.arguments(),
        bf16=job.autocast,
        lmbda=1.0,
        beta=0.5,
        max_new_tokens=job.new_tokens,
    )
    count = Counted(trainer.generate_on_policy_outputs, lambda output: int((output[2] != -100).sum()))
    trainer.generate_on_policy_outputs = count
    return lambda: trained(trainer, clock, count)


def distillation_run(trl: ModuleType, job: Job, student: Any) -> Callable[[], Trained]:
    """trl's DistillationTrainer, to which its GKDTrainer points for runs like this one. It reads text: its dataset
    holds the place of each example, in whose stead it is given the tokens. EOS is ruled out, as in `job`."""
    assert not job.stop_tokens
    clock = Clock()
    settings = trl.DistillationConfig(
        **job.arguments(),
        bf16=job.autocast,
        gradient_checkpointing=False,
        beta=0.5,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_completion_length=job.new_tokens,
        generation_kwargs={"eos_token_id": None},
    )
    trainer = trl.DistillationTrainer(
        model=plain(student),
        teacher_model=plain(job.teacher),
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": [str(place) for place in range(len(job.examples))]}),
        processing_class=job.tokenizer,
        callbacks=[clock],
    )
    trainer.eos_token_ids = [-1]
    trainer._tokenize_prompts = lambda places: ([job.examples[int(place)].prompt for place in places], None, {})
    count = Counted(trainer._generate_single_turn, lambda completions: sum(map(len, completions)))
    trainer._generate_single_turn = count
    return lambda: trained(trainer, clock, count)


class Counted:
    """A function that writes completions, and how many tokens it has written."""

    def __init__(self, write: Callable[..., Any], tokens_in: Callable[[Any], int]) -> None:
        self.write = write
        self.tokens_in = tokens_in
        self.tokens = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.write(*args, **kwargs)
        self.tokens += self.tokens_in(output)
        return output


def trained(trainer: Any, clock: Clock, count: Counted) -> Trained:
    trainer.train()
    return Trained(clock.seconds, count.tokens)


TRL_RUNS = {
    "trl GKDTrainer": ("trl.experimental.gkd", gkd_run),
    "trl DistillationTrainer": ("trl", distillation_run),
}


def gkd_trainer(
    gkd: ModuleType,
    student: Any,
    teacher: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    callbacks: list[Any],
    **settings: Any,
) -> Any:
    """trl's GKDTrainer on our examples. Its KV cache is on: it writes without one under gradient checkpointing, which
    is its default. Its sampling temperature (.9 by default) is 1, as its loss's is."""
    settings = {"bf16": False, "temperature": 1.0, "max_length": None, "gradient_checkpointing": False, **settings}
    return gkd.GKDTrainer(
        model=plain(student),
        teacher_model=plain(teacher),
        args=gkd.GKDConfig(**settings),
        data_collator=partial(trl_batch, examples, tokenizer.pad_token_id),
        # `length`: what the trainer groups rows by, where the settings ask for it.
        train_dataset=Dataset.from_dict(
            {"place": range(len(examples)), "length": [len(example.tokens) for example in examples]}
        ),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def trl_batch(examples: Sequence[Example], pad_id: int, rows: Sequence[dict[str, int]]) -> dict[str, torch.Tensor]:
    """What GKDTrainer reads: texts (B, T) padded on the right, prompts (B, P) on the left."""
    chosen = [examples[row["place"]] for row in rows]
    width = max(len(example.tokens) for example in chosen)
    start = max(len(example.prompt) for example in chosen)
    batch: dict[str, list[list[int]]] = {name: [] for name in TRL_KEYS}
    for example in chosen:
        text, gap = example.tokens, width - len(example.tokens)
        prompt, lead = example.prompt, start - len(example.prompt)
        batch["input_ids"].append(text + [pad_id] * gap)
        batch["attention_mask"].append([1] * len(text) + [0] * gap)
        learnt = [token if flag else -100 for token, flag in zip(text, example.mask, strict=True)]
        batch["labels"].append(learnt + [-100] * gap)
        batch["prompts"].append([pad_id] * lead + prompt)
        batch["prompt_attention_mask"].append([0] * lead + [1] * len(prompt))
    return {name: torch.tensor(values) for name, values in batch.items()}


TRL_KEYS = ("input_ids", "attention_mask", "labels", "prompts", "prompt_attention_mask")
