"""What a run writes while it trains, what it shows, and when it stops."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from limbeck.training.checkpoints import trim_log

LOGS = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl")
SHOWN = {
    "loss": "loss {:.3f}",
    "forward_kl": "KL {:.3f}",
    "agreement": "agree {:.0%}",
    "completion_tokens": "{:.0f} tokens",
    "tokens_per_s": "{:.0f}/s",
}


class RunLog(TrainerCallback):
    """metrics.jsonl (one object a step), evaluations.jsonl, samples.jsonl: some of what was trained on, as text."""

    def __init__(self, folder: Path, tokenizer: Any, sample_steps: int = 20) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.sample_steps = sample_steps
        self.trainer: Any = None

    def trim(self, step: int) -> None:
        for name in LOGS:
            trim_log(self.folder / name, step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            self._append("metrics.jsonl", {"step": state.global_step, **logs})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        if state.is_world_process_zero:
            self._append("evaluations.jsonl", {"step": state.global_step, **metrics})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero or (state.global_step - 1) % self.sample_steps:
            return
        for rollout in self.trainer.rollouts[:2]:
            prompt, completion = rollout.tokens[: rollout.prompt_tokens], rollout.tokens[rollout.prompt_tokens :]
            row = {
                "step": state.global_step,
                "prompt": self.tokenizer.decode(prompt, skip_special_tokens=True),
                "completion": self.tokenizer.decode(completion, skip_special_tokens=False),
                "writer": rollout.writer,
                "finish_reason": rollout.finish_reason,
                **({} if rollout.reward is None else {"reward": rollout.reward}),
            }
            self._append("samples.jsonl", row)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(row) + "\n")


class Budget(TrainerCallback):
    """Stops a run after so many seconds of training (evaluation apart) or so many trained tokens.

    `fraction()` is the share used up; the learning rate follows it, since the number of steps is not known.
    """

    def __init__(self, *, seconds: float | None = None, tokens: int | None = None) -> None:
        assert (seconds is None) != (tokens is None)
        self.seconds = seconds
        self.tokens = tokens
        self.trainer: Any = None
        self._start: float | None = None

    def fraction(self) -> float:
        if self._start is None:
            return 0.0
        if self.tokens is not None:
            return self.trainer.tokens_seen / self.tokens
        assert self.seconds is not None
        return (time.perf_counter() - self._start - self.trainer.evaluation_seconds) / self.seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.fraction() >= 1:
            control.should_training_stop = True


class Bar(TrainerCallback):
    """A progress bar with the numbers that matter and the time left."""

    def __init__(self, label: str, budget: Budget | None = None) -> None:
        self.label = label
        self.budget = budget
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.task = self.progress.add_task(self.label, total=1.0, numbers="")
            self.progress.update(self.task, completed=self._done(state))
            self.progress.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.task is not None and logs and "loss" in logs:
            numbers = "  ".join(form.format(logs[name]) for name, form in SHOWN.items() if name in logs)
            numbers = f"step {state.global_step}  {numbers}"
            self.progress.update(self.task, completed=self._done(state), numbers=numbers)

    def _done(self, state: Any) -> float:
        return self.budget.fraction() if self.budget else state.global_step / max(state.max_steps, 1)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        self.progress.stop()
