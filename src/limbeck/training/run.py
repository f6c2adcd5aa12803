"""One training: parts in, a trained student out, every log in the run's folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limbeck.methods import METHODS
from limbeck.recipe import Recipe
from limbeck.training.build import Parts, build_credit, build_objective, build_source
from limbeck.training.callbacks import Bar, Budget, RunLog
from limbeck.training.trainer import Trainer


def train(
    recipe: Recipe,
    parts: Parts,
    folder: Path,
    *,
    resume: bool = False,
    budget: Budget | None = None,
    evaluator: Callable[[Any, int], dict[str, float]] | None = None,
    callbacks: tuple[Any, ...] = (),
    quiet: bool = False,
) -> tuple[Trainer, float]:
    """Trains `parts.student` in place. Returns the trainer and the seconds that training took, evaluation apart."""
    source = build_source(recipe, parts, upcoming=lambda step: trainer.upcoming(step))
    log = RunLog(folder, parts.tokenizer)
    bar = Bar(METHODS[recipe.method].label, budget)
    trainer = Trainer(
        model=parts.student,
        args=parts.args,
        examples=parts.train,
        source=source,
        objective=build_objective(recipe, rewarded=parts.reward is not None),
        credit=build_credit(recipe, parts),
        beside=parts.beside,
        samples=getattr(recipe, "samples", 1),
        inner_epochs=getattr(recipe, "inner_epochs", 1),
        teacher=parts.teacher if METHODS[recipe.method].signal != "none" else None,
        tokenizer=parts.tokenizer,
        autocast=parts.autocast,
        evaluator=evaluator,
        budget=budget,
        callbacks=[log, *([] if quiet else [bar]), *callbacks],
    )
    log.trainer = trainer
    if budget is not None:
        budget.trainer = trainer
    checkpoint = None
    if resume:
        checkpoint, faults = trainer.checkpoints.newest()
        for fault in faults:
            bar.progress.console.print(f"passed over {fault}")
        log.trim(int(checkpoint.name.split("-")[1]))
        trainer.remember(checkpoint)
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        bar.close()
    return trainer, time.perf_counter() - start - trainer.evaluation_seconds
