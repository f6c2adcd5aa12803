"""The one trainer: rollouts belong to the optimiser step, the reduction happens once.

What comes in: examples (rows of a data set). What goes out of `get_batch_samples`: micro-batches of rollouts, as plain
dicts. What `compute_loss` returns: the sum of per-token losses over the count of completion tokens in the whole
optimiser step, on all ranks.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch.distributed.fsdp import FSDPModule

from limbeck.data import collate, micro_batches
from limbeck.errors import TrainingError
from limbeck.models import completion_hidden
from limbeck.models.teaching import teacher_hidden
from limbeck.training.callbacks import Budget
from limbeck.training.checkpoints import Checkpoints
from limbeck.training.order import EpochOrder
from limbeck.types import Example, Hidden, Objective, Rollout, Source

SIGNAL_STATS = ("forward_kl", "reverse_kl", "agreement", "entropy")


def reshard(model: Any) -> None:
    """A forward without a backward leaves FSDP2's last group (final norm and output head) gathered: an optimiser made,
    or a checkpoint written, after it would hold copies that training does not touch."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Trainer(transformers.Trainer):
    """`transformers.Trainer` with limbeck's source, signal and objective.

    `teacher`: a model, None (no signal: SFT, SeqKD), or ADAPTERS (see `limbeck.models.teaching`).
    `evaluator(model, step)` returns the numbers of one evaluation (`eval_*`).
    """

    def __init__(
        self,
        *,
        model: Any,
        args: transformers.TrainingArguments,
        examples: list[Example],
        source: Source,
        objective: Objective,
        teacher: Any = None,
        tokenizer: Any,
        autocast: torch.dtype | None = None,
        evaluator: Callable[[Any, int], dict[str, float]] | None = None,
        budget: Budget | None = None,
        callbacks: list[Any] | None = None,
    ) -> None:
        reshard(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=examples,  # pyright: ignore[reportArgumentType]  (any sized sequence serves)
            eval_dataset=examples if evaluator else None,  # pyright: ignore[reportArgumentType]  (`evaluate` is ours)
            data_collator=list,  # pyright: ignore[reportArgumentType]  (whole rows; rollouts are collated later)
            processing_class=tokenizer,
            callbacks=[*([budget] if budget else []), *(callbacks or [])],
        )
        self.remove_callback(transformers.PrinterCallback)  # the bar and metrics.jsonl say it all
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = False
        self.source = source
        self.objective = objective
        self.teacher = teacher
        self.autocast = autocast
        self.evaluator = evaluator
        self.budget = budget
        self.checkpoints = Checkpoints(str(args.output_dir))
        self.rollouts: list[Rollout] = []
        self.tokens_seen = 0
        self.evaluation_seconds = 0.0
        self._order: EpochOrder | None = None
        self._sums: dict[str, Any] = defaultdict(float)
        self._seconds: dict[str, float] = defaultdict(float)

    # -- data: one optimiser step's rows in, its micro-batches out -------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        examples: list[Example] = self.train_dataset  # pyright: ignore[reportAssignmentType]
        self._order = EpochOrder(
            len(examples),
            self.args.seed,
            strategy=self.args.train_sampling_strategy,
            lengths=[len(example.tokens) for example in examples],
            batch=self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
        )
        return self._order

    def upcoming(self, step: int, steps: int = 16) -> list[Example]:
        """The rows of the optimiser steps [step, step + steps) on one process; empty on several."""
        if self.args.world_size > 1 or self._order is None:
            return []
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        last = step + min(steps, self.state.max_steps - step) if self.state.max_steps > 0 else step + steps
        return [self.train_dataset[row] for row in self._order.rows(step * batch, last * batch)]  # pyright: ignore

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Example]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """Writes the rollouts of one optimiser step, groups them by length, cuts them into as many micro-batches as
        the loader gave. Returns them with the number of learnt tokens on all ranks."""
        batches: list[list[Example]] = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is not None:
                batches.append(batch)
        examples = [example for batch in batches for example in batch]
        with self._clock("rollout"):
            self.rollouts = self.source(examples, self.state.global_step)
        micro = [self._collate(part) for part in micro_batches(self.rollouts, len(batches))] if batches else []
        learnt = torch.tensor(sum(rollout.learnt for rollout in self.rollouts), device=device)
        total = self.accelerator.gather(learnt.reshape(1)).sum().clamp(min=1)  # pyright: ignore
        self._count_rollouts(total)
        self._sums["cells"] += sum(batch["attention_mask"].numel() for batch in micro)
        self._sums["padding"] += sum(int((batch["attention_mask"] == 0).sum()) for batch in micro)
        return micro, total

    def _collate(self, rollouts: list[Rollout]) -> dict[str, torch.Tensor]:
        batch = collate(rollouts, self.processing_class.pad_token_id)  # pyright: ignore
        return {**batch, "rows": torch.tensor([rollout.index for rollout in rollouts])}

    def _count_rollouts(self, total: torch.Tensor) -> None:
        self.tokens_seen += int(total)
        self._sums["tokens"] += sum(rollout.learnt for rollout in self.rollouts)
        self._sums["rows"] += len(self.rollouts)
        self._sums["at_limit"] += sum(rollout.finish_reason == "length" for rollout in self.rollouts)
        for name in ("rollout_kl", "rollout_tokens"):
            self._sums[name] += 0.0  # on every rank, whoever wrote
        self._sums["by_student"] += sum(rollout.writer == "student" for rollout in self.rollouts)

    # -- loss ----------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        teacher = self._seconds["teacher"]
        with self._clock("student"):
            loss = super().training_step(*args, **kwargs)
        self._seconds["student"] -= self._seconds["teacher"] - teacher
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Sum of loss_N over the learnt tokens / the optimiser step's count of learnt tokens on all ranks.

        Times the number of processes, since DDP and FSDP average gradients over them.
        """
        with self._precision():
            signal = self._signal(model, inputs)
            hidden_NH, tokens_N, head = completion_hidden(model, inputs)
            stats = SIGNAL_STATS if signal is not None else ("entropy",)
            terms = self.objective(hidden_NH, head, signal, tokens_N, stats=stats)
        loss_sum = terms.loss_N.sum()
        if not torch.isfinite(loss_sum):
            raise TrainingError(
                f"step {self.state.global_step + 1}: expected a finite loss; found {loss_sum.item()} in the "
                f"micro-batch of rows {inputs['rows'].tolist()}; lower training.learning_rate or max_grad_norm, "
                "or look at these rows"
            )
        self._add("divergence", terms.divergence_N)
        self._add("cross_entropy", terms.nll_N)
        self._add_rollout_kl(inputs, terms.nll_N)
        for name, values_N in terms.stats.items():
            self._add("student_entropy" if name == "entropy" else name, values_N)
        assert num_items_in_batch is not None
        return loss_sum / num_items_in_batch * self.accelerator.num_processes

    def _add_rollout_kl(self, inputs: dict[str, torch.Tensor], nll_N: torch.Tensor | None) -> None:
        """KL(writer || student) on what the student wrote, nats a token, by its own samples: 0 where the weights that
        wrote are those that train, in the same precision."""
        if "written_logprobs" not in inputs or nll_N is None:
            return
        gap_N = inputs["written_logprobs"][:, 1:][inputs["learnt"][:, 1:]] + nll_N.detach()
        gap_N = gap_N[~gap_N.isnan()]
        self._add("rollout_kl", gap_N)
        self._sums["rollout_tokens"] += len(gap_N)

    def _signal(self, model: Any, inputs: dict[str, torch.Tensor]) -> Hidden | None:
        if self.teacher is None:
            return None
        with self._clock("teacher"):
            return teacher_hidden(self.teacher, model, inputs)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.args.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As transformers', but under a budget of seconds or tokens: linear warmup over `warmup_steps`, then linear
        decay in the share of the budget that is used (constant if the recipe says so)."""
        budget = self.budget
        if budget is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = max(self.args.get_warmup_steps(num_training_steps), 1)
        constant = transformers.SchedulerType(self.args.lr_scheduler_type).value.startswith("constant")

        def factor(step: int) -> float:
            return min((step + 1) / warmup, 1.0) * (1.0 if constant else max(1.0 - budget.fraction(), 0.0))

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)  # pyright: ignore
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # -- what is logged ------------------------------------------------------------------------------------------

    def _add(self, name: str, values_N: torch.Tensor | None) -> None:
        if values_N is not None:
            self._sums[name] += values_N.detach().sum().double()

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds[part] += time.perf_counter() - start

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._step_numbers())
        super().log(logs, start_time)

    def _step_numbers(self) -> dict[str, float]:
        """Means over the tokens (or rows) of all steps since the last log, on all ranks."""
        names = sorted(self._sums)
        sums = torch.tensor([float(self._sums[name]) for name in names], dtype=torch.float64, device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(sums)
        totals = dict(zip(names, sums.tolist(), strict=True))
        rows, tokens = max(totals.pop("rows"), 1.0), max(totals.pop("tokens"), 1.0)
        apart, written = totals.pop("rollout_kl"), totals.pop("rollout_tokens")
        seconds = {f"{part}_s": self._seconds[part] for part in ("rollout", "teacher", "student")}
        numbers = {
            "completion_tokens": tokens / rows,
            "length_limit_share": totals.pop("at_limit") / rows,
            "padding_share": totals.pop("padding") / max(totals.pop("cells"), 1.0),
            "student_share": totals.pop("by_student") / rows,
            **{name: total / tokens for name, total in totals.items()},
            **({"rollout_kl": apart / written} if written else {}),
            **seconds,
            "tokens_per_s": tokens / max(sum(seconds.values()), 1e-9),
        }
        self._sums.clear()
        self._seconds.clear()
        return numbers

    # -- evaluation and checkpoints ------------------------------------------------------------------------------

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The evaluator's numbers: fixed prompts, fixed seeds."""
        assert self.evaluator is not None
        start = time.perf_counter()
        with self._precision():
            metrics = self.evaluator(self.model, self.state.global_step)
        reshard(self.model)
        self.evaluation_seconds += time.perf_counter() - start
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_output_dir(self, trial: Any) -> str:
        return self.checkpoints.place

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As transformers', but whole or not at all: temporary folder, fsync, rename."""
        with self.checkpoints.whole(self.state, self.accelerator, self.args):
            super()._save_checkpoint(model, trial)
