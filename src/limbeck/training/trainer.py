"""The one trainer: rollouts belong to the optimiser step, the reduction happens once.

What comes in: examples (rows of a data set). What goes out of `get_batch_samples`: micro-batches of rollouts, as plain
dicts. What `compute_loss` returns: the sum of per-token losses over the count of completion tokens in the whole
optimiser step, on all ranks.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed.fsdp import FSDPModule

from limbeck.data import at_learnt, collate, micro_batches
from limbeck.data.corpus import Corpus
from limbeck.errors import TrainingError
from limbeck.models import autocast_to, completion_hidden, fast_linears
from limbeck.models.teaching import teacher_hidden
from limbeck.objectives.policy import GRADIENT_NORMS
from limbeck.ops.pages import give_back
from limbeck.training.callbacks import Budget
from limbeck.training.checkpoints import Checkpoints
from limbeck.training.meter import Meter
from limbeck.training.order import EpochOrder
from limbeck.types import Context, Credit, Example, Hidden, Objective, Rollout, Source

SIGNAL_STATS = ("forward_kl", "reverse_kl", "agreement", "entropy")
NORM_STEPS = 50
"""Where there is credit, the norms of both terms' gradients are logged every so many steps."""


@dataclass(frozen=True)
class Beside:
    """A second term of the loss on plain text, divided by its own count of tokens; it takes the teacher's signal only
    where it `needs_teacher`."""

    corpus: Corpus
    objective: Objective
    weight: float
    needs_teacher: bool = False


def reshard(model: Any) -> None:
    """A forward without a backward leaves FSDP2's last group (final norm and output head) gathered: an optimiser made,
    or a checkpoint written, after it would hold copies that training does not touch."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Trainer(transformers.Trainer):
    """`transformers.Trainer` with limbeck's source, signal and objective.

    `teacher`: a model, None (no signal: SFT, SeqKD), or ADAPTERS (see `limbeck.models.teaching`).
    `evaluator(model, step)` returns the numbers of one evaluation (`eval_*`). `credit` gives the rollouts of a step
    their advantages; `samples` of a prompt stand together. `beside`: a term on plain text. `inner_epochs`: optimiser
    steps on the same rollouts, whose teacher's hidden states are kept meanwhile.
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
        credit: Credit | None = None,
        beside: Beside | None = None,
        samples: int = 1,
        inner_epochs: int = 1,
        autocast: torch.dtype | None = None,
        evaluator: Callable[[Any, int], dict[str, float]] | None = None,
        budget: Budget | None = None,
        callbacks: list[Any] | None = None,
    ) -> None:
        reshard(model)
        for given in (model, teacher):
            if isinstance(given, torch.nn.Module):
                fast_linears(given)
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
        self.credit = credit
        self.beside = beside
        self.samples = samples
        self.inner_epochs = inner_epochs
        self.autocast = autocast
        self.evaluator = evaluator
        self.budget = budget
        self.checkpoints = Checkpoints(str(args.output_dir))
        self.rollouts: list[Rollout] = []
        self.tokens_seen = 0
        self.evaluation_seconds = 0.0
        self._order: EpochOrder | None = None
        self._signals: dict[int, Hidden] = {}
        self._counts = (1, 1, 1)  # of the optimiser step on all ranks: learnt tokens, written sequences, corpus tokens
        self._meter = Meter()
        self._seconds: dict[str, float] = defaultdict(float)

    # -- data: one optimiser step's rows in, its micro-batches out -------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        examples: list[Example] = self.train_dataset  # pyright: ignore[reportAssignmentType]
        self._order = EpochOrder(
            len(examples),
            self.args.seed,
            strategy=self.args.train_sampling_strategy,
            lengths=[len(example.tokens) for example in examples],
            batch=self._sequences * self.args.world_size // self.samples,
            copies=self.samples,
            passes=self.inner_epochs,
        )
        return self._order

    @property
    def _sequences(self) -> int:
        """Of one optimiser step on one rank."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps

    def upcoming(self, step: int, steps: int = 16) -> list[Example]:
        """The rows of the optimiser steps [step, step + steps) on one process; empty on several."""
        if self.args.world_size > 1 or self._order is None:
            return []
        batch = self._sequences
        last = step + min(steps, self.state.max_steps - step) if self.state.max_steps > 0 else step + steps
        return [self.train_dataset[row] for row in self._order.rows(step * batch, last * batch)]  # pyright: ignore

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Example]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """Writes the rollouts of one optimiser step (or takes those of the first inner epoch), groups them by length,
        cuts them into as many micro-batches as the loader gave. Returns them with the learnt tokens on all ranks."""
        give_back()  # what the step before has left
        batches: list[list[Example]] = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is not None:
                batches.append(batch)
        examples = [example for batch in batches for example in batch]
        if self.state.global_step % self.inner_epochs == 0:
            self._signals.clear()
            with self._clock("rollout"):
                self.rollouts = self.source(examples, self.state.global_step)
                if self.credit is not None:
                    self.rollouts = self.credit(self.rollouts)
        micro = [self._collate(part) for part in micro_batches(self.rollouts, len(batches))] if batches else []
        for place, inputs in enumerate(micro):
            inputs["place"] = torch.tensor(place)
        corpus_tokens = self._add_corpus(micro, examples)
        counts = [
            sum(rollout.learnt for rollout in self.rollouts),
            sum("advantage" in r.columns for r in self.rollouts),
        ]
        gathered: Any = self.accelerator.gather(torch.tensor([[*counts, corpus_tokens]], device=device))
        learnt, sequences, corpus_tokens = gathered.sum(0).clamp(min=1).tolist()
        self._counts = learnt, sequences, corpus_tokens
        self._count_rollouts(learnt, micro)
        return micro, torch.tensor(learnt, device=device)

    def _collate(self, rollouts: list[Rollout]) -> dict[str, Any]:
        batch = collate(rollouts, self.processing_class.pad_token_id)  # pyright: ignore
        return {**batch, "rows": torch.tensor([rollout.index for rollout in rollouts])}

    def _add_corpus(self, micro: list[dict[str, Any]], examples: list[Example]) -> int:
        """Gives each micro-batch its share of plain text, a block a sequence. Returns how many tokens are learnt."""
        if self.beside is None or not examples:
            return 0
        blocks = self.beside.corpus.draw(examples, self.args.seed, self.state.global_step)
        for place, inputs in enumerate(micro):
            inputs["corpus"] = self._collate(blocks[place :: len(micro)])
        return sum(block.learnt for block in blocks)

    def _count_rollouts(self, learnt: int, micro: list[dict[str, Any]]) -> None:
        self.tokens_seen += learnt
        rows = len(self.rollouts)
        self._meter.add("completion_tokens", sum(rollout.learnt for rollout in self.rollouts), rows)
        self._meter.add("length_limit_share", sum(r.finish_reason == "length" for r in self.rollouts), rows)
        self._meter.add("student_share", sum(rollout.writer == "student" for rollout in self.rollouts), rows)
        for inputs in micro:
            mask_BT = inputs["attention_mask"]
            self._meter.add("padding_share", int((mask_BT == 0).sum()), mask_BT.numel())
        rewards = [rollout.reward for rollout in self.rollouts if rollout.reward is not None]
        if rewards:
            self._meter.add("reward", sum(rewards), len(rewards))

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
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Sum of loss_N over the learnt tokens / the optimiser step's count of learnt tokens on all ranks, and the same
        of the corpus by its own count, times the number of processes: DDP and FSDP average gradients over them."""
        learnt, sequences, corpus_tokens = self._counts
        found = inputs.get("columns", {})
        columns_N = {name: at_learnt(values_BT, inputs["learnt"]) for name, values_BT in found.items()}
        context = Context(columns_N, learnt, sequences)
        with self._precision():
            signal = self._signal(model, inputs)
            hidden_NH, tokens_N, head = completion_hidden(model, inputs)
            stats = SIGNAL_STATS if signal is not None else ("entropy",)
            if self.credit is not None and self.state.global_step % NORM_STEPS == 0:
                stats = (*stats, GRADIENT_NORMS)
            terms = self.objective(hidden_NH, head, signal, tokens_N, context=context, stats=stats)
            loss = terms.loss_N.sum() / learnt
            if "corpus" in inputs:
                loss = loss + self._corpus_loss(model, inputs["corpus"]) / corpus_tokens
        if not torch.isfinite(loss):
            raise TrainingError(
                f"step {self.state.global_step + 1}: expected a finite loss; found {loss.item()} in the "
                f"micro-batch of rows {inputs['rows'].tolist()}; lower training.learning_rate or max_grad_norm, "
                "or look at these rows"
            )
        for name, values_N in {"divergence": terms.divergence_N, "cross_entropy": terms.nll_N, **terms.stats}.items():
            if values_N is not None:
                self._meter.add_values("student_entropy" if name == "entropy" else name, values_N)
        self._add_rollout_kl(columns_N, terms.nll_N)
        return loss * self.accelerator.num_processes

    def _corpus_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """The sum over the corpus's tokens, weighted."""
        assert self.beside is not None
        signal = None
        if self.beside.needs_teacher:
            with self._clock("teacher"):
                signal = teacher_hidden(self.teacher, model, inputs)
        hidden_NH, tokens_N, head = completion_hidden(model, inputs)
        context = Context({}, self._counts[2], 1)
        terms = self.beside.objective(hidden_NH, head, signal, tokens_N, context=context)
        self._meter.add_values("corpus_loss", terms.loss_N)
        return self.beside.weight * terms.loss_N.sum()

    def _add_rollout_kl(self, columns_N: dict[str, torch.Tensor], nll_N: torch.Tensor | None) -> None:
        """KL(writer || student) on what the student wrote alone, nats a token, by its own samples: 0 where the weights
        that wrote are those that train, in the same precision."""
        if "student_logprobs" not in columns_N or "teacher_logprobs" in columns_N or nll_N is None:
            return
        gap_N = columns_N["student_logprobs"] + nll_N.detach()
        self._meter.add_values("rollout_kl", gap_N[~gap_N.isnan()])

    def _signal(self, model: Any, inputs: dict[str, torch.Tensor]) -> Hidden | None:
        if self.teacher is None:
            return None
        place = int(inputs["place"])
        if place in self._signals:
            return self._signals[place]
        with self._clock("teacher"):
            signal = teacher_hidden(self.teacher, model, inputs)
        if self.inner_epochs > 1:
            self._signals[place] = signal
        return signal

    def _precision(self) -> torch.autocast:
        return autocast_to(self.args.device, self.autocast)

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
        """Means since the last log, on all ranks, and this rank's seconds."""
        sums = self._meter.read()
        seconds = {f"{part}_s": self._seconds[part] for part in ("rollout", "teacher", "student")}
        self._seconds.clear()
        return {
            **{name: total / max(count, 1) for name, (total, count) in sums.items() if count},
            **seconds,
            "tokens_per_s": sums["completion_tokens"][0] / max(sum(seconds.values()), 1e-9),
        }

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
            if self.credit is not None or self.inner_epochs > 1:
                folder = Path(self.checkpoints.place) / f"checkpoint-{self.state.global_step}"
                self._memory(folder).write_text(
                    json.dumps(
                        {
                            "rollouts": [asdict(rollout) for rollout in self.rollouts],
                            "credit": self.credit.state if self.credit is not None else {},
                        }
                    )
                )

    def _memory(self, folder: Path) -> Path:
        """What a rank remembers between steps: the rollouts of inner epochs, and the credit's state."""
        return folder / f"memory-{self.args.process_index}.json"

    def remember(self, checkpoint: Path) -> None:
        """Takes up the rollouts and the credit's state that a checkpoint holds."""
        memory = self._memory(checkpoint)
        if memory.exists():
            found = json.loads(memory.read_text())
            self.rollouts = [Rollout(**rollout) for rollout in found["rollouts"]]
            if self.credit is not None:
                self.credit.state = found["credit"]
