"""Time to the same quality: trl trains for a while, then limbeck trains until its held-out loss is as low."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.common import Result, Row, peer, say, shared
from benchmarks.training import PLAIN_ARGUMENTS, gkd_trainer
from limbeck.recipe import Recipe
from limbeck.training import build, train

CASES = {
    "forward KL, fixed text": ("kd", {"lmbda": 0.0, "beta": 0.0}),
    "JSD, half on-policy": ("gkd", {"lmbda": 0.5, "beta": 0.5}),
}
"""Our method in the recipe `stories`, and trl's settings of the same."""

OURS: dict[str, dict[str, dict[str, Any]]] = {
    "kd": {"limbeck": {}},
    "gkd": {"limbeck": {}, "limbeck, lmbda_unit=step": {"lmbda_unit": "step"}},
}
"""By method. trl draws by the step whether all of it is the student's own text."""

STORY_TOKENS = 256


@torch.inference_mode()
def story_loss(model: Any, tokenizer: Any, stories: list[str]) -> float:
    """Mean loss per token (nats): BOS + story + EOS cut to 256 tokens, BOS given, as in ../shared/measure."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for story in stories:
        tokens = tokenizer(story, add_special_tokens=False)["input_ids"]
        tokens_BT = torch.tensor([[tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id][:STORY_TOKENS]])
        logprobs_TV = model(tokens_BT).logits[0, :-1].float().log_softmax(-1)
        total -= logprobs_TV.gather(1, tokens_BT[0, 1:, None]).sum().item()
        count += tokens_BT.shape[1] - 1
    model.train(training)
    return total / count


@dataclass
class Watch(TrainerCallback):
    """Reads the held-out loss every `every` s of training and at `limit` s, the clock standing meanwhile; training ends
    at `limit`, or once the loss is `target` or less. `points`: (s, loss, steps)."""

    loss: Callable[[], float]
    every: float
    limit: float
    target: float = -1.0
    points: list[tuple[float, float, int]] = field(default_factory=list[tuple[float, float, int]])
    start: float = 0.0
    due: float = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start, self.due = time.perf_counter(), min(self.every, self.limit)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        elapsed = now - self.start
        if elapsed < self.due:
            return
        loss = self.loss()
        self.points.append((elapsed, loss, state.global_step))
        self.due = min(elapsed + self.every, max(self.limit, elapsed))
        control.should_training_stop = loss <= self.target or elapsed >= self.limit
        self.start += time.perf_counter() - now

    @property
    def numbers(self) -> dict[str, float]:
        seconds, loss, steps = self.points[-1]
        return {"seconds": seconds, "held_out_loss": loss, "steps": steps}


def recipe(method: str, output: str) -> Recipe:
    """The packaged recipe at a constant rate after its warm-up, so that no schedule knows when it will end."""
    settings = [
        f"teacher={shared('models/stories260k')}",
        f"data.train={shared('data/tinystories_train.jsonl')}",
        f"data.eval={shared('data/tinystories_test.jsonl')}",
        "training.max_steps=1000000",
        "training.lr_scheduler_type=constant_with_warmup",
        "training.per_device_train_batch_size=16",
        "training.learning_rate=0.002",
        "training.adam_beta2=0.999",
        f"output={output}",
    ]
    loaded = Recipe.load("stories", settings)
    return loaded.with_method(method, training=PLAIN_ARGUMENTS)


def held_out(quick: bool) -> list[str]:
    rows = shared("data/tinystories_test.jsonl").read_text().splitlines()[: 4 if quick else 200]
    return [next(iter(json.loads(row).values())) for row in rows]


def theirs(gkd: Any, made: Recipe, settings: dict[str, float], stories: list[str], limit: float) -> Watch:
    parts = build(made)
    watch = Watch(lambda: story_loss(parts.student, parts.tokenizer, stories), limit, limit)
    trainer = gkd_trainer(
        gkd,
        parts.student,
        parts.teacher,
        parts.tokenizer,
        parts.train,
        callbacks=[watch],
        **{**made.training, "output_dir": made.output},
        max_new_tokens=made.sampling.max_tokens,
        seed=made.seed,
        **settings,
    )
    trainer.train()
    return watch


def ours(made: Recipe, stories: list[str], limit: float, target: float) -> Watch:
    parts = build(made)
    loss = lambda: story_loss(parts.student, parts.tokenizer, stories)  # noqa: E731
    watch = Watch(loss, limit / 60, limit, target)
    train(made, parts, Path(made.output), callbacks=(watch,), quiet=True)
    return watch


def run(case: str, quick: bool) -> Iterator[Result]:
    method, settings = CASES[case]
    seconds = 2.0 if quick else 180.0
    stories = held_out(quick)
    gkd = peer("trl.experimental.gkd")
    with tempfile.TemporaryDirectory() as folder:
        made = recipe(method, folder)
        target = -1.0
        if gkd is None:
            yield Result("stories", case, "fp32", "trl GKDTrainer", "peer", note="not installed")
        else:
            say(f"  trl: {seconds:g} s")
            watch = theirs(gkd, made, settings, stories, seconds)
            target = watch.numbers["held_out_loss"]
            yield Result("stories", case, "fp32", "trl GKDTrainer", "peer", watch.numbers)
        for who, changes in OURS[method].items():
            say(f"  {who}: to a loss of {target:.4f}" if gkd else f"  {who}: {seconds:g} s")
            watch = ours(made.replaced(**changes), stories, seconds if gkd is None else 1.5 * seconds, target)
            numbers = watch.numbers
            if gkd is not None and numbers["held_out_loss"] > target:
                numbers["not_reached_in_s"] = numbers.pop("seconds")
            yield Result("stories", case, "fp32", who, "ours", numbers)


ROWS = [
    Row(
        "stories",
        "stories260k into its own layers 0, 2, 4, batch 16: seconds that limbeck needs to the held-out loss that trl "
        "has reached when its time is over",
        "seconds",
        lambda quick: list(CASES),
        run,
    )
]
