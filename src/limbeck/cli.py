"""The command line: thin. Every command calls one function of the library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import transformers
import typer
from rich.console import Console

from limbeck.errors import LimbeckError

app = typer.Typer(
    help="limbeck distils a large language model into a small one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
INTERRUPTED = 130

RecipeArg = Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="a recipe file, or the name of a packaged one")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="dotted overrides of the recipe")]


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="the folder for runs and report")] = Path("runs/quickstart"),
    rebuild_teacher: Annotated[bool, typer.Option(help="train the embedded teacher anew (minutes), then stop")] = False,
) -> None:
    """The embedded task: one teacher distilled four ways, one table, one report."""
    from limbeck.quickstart import quickstart as run
    from limbeck.quickstart import rebuild_teacher as rebuild

    if rebuild_teacher:
        rebuild(out)
    else:
        run(out)


@app.command()
def distill(
    recipe: RecipeArg,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option(help="check everything, show one example and a forecast, train nothing")
    ] = False,
    resume: Annotated[bool, typer.Option(help="go on from the newest whole checkpoint in `output`")] = False,
    budget: Annotated[
        str | None, typer.Option(help="wall clock of training instead of max_steps: 90s, 10m, 1h")
    ] = None,
) -> None:
    """One run: train, evaluate, report."""
    from limbeck import pipeline
    from limbeck.doctor import dry_run as check
    from limbeck.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or [])
    if dry_run:
        check(loaded, console)
        return
    limit = pipeline.Limit.parse(budget=budget, steps=None, tokens=None) if budget else None
    run = pipeline.distill(loaded, resume=resume, limit=limit)
    if pipeline.ranks.first():
        console.print(f"student  {run.student_path}\nreport   {run.report_path}")


@app.command()
def compare(
    recipe: RecipeArg,
    overrides: Overrides = None,
    methods: Annotated[str, typer.Option(help="comma-separated")] = "sft,seqkd,kd,gkd",
    budget: Annotated[str | None, typer.Option(help="wall clock of training a run: 90s, 10m, 1h")] = None,
    steps: Annotated[int | None, typer.Option(help="optimiser steps a run")] = None,
    tokens: Annotated[int | None, typer.Option(help="trained tokens a run")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="training seeds")] = 3,
) -> None:
    """Several methods from one start under one budget: a table with paired intervals, and one report."""
    from limbeck import pipeline
    from limbeck.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or [])
    chosen = pipeline.Limit.parse(budget=budget, steps=steps, tokens=tokens)
    pipeline.compare(loaded, methods=methods.split(","), limit=chosen, seeds=list(range(seeds)), console=console)


@app.command()
def evaluate(
    model: str,
    data: Annotated[str, typer.Option(help="JSONL, Parquet, hub id or embedded:test:200")],
    metrics: Annotated[str, typer.Option(help="comma-separated names, or module:function")] = "rouge_l",
    seeds: Annotated[int, typer.Option(min=1, help="sampling seeds")] = 5,
    teacher: Annotated[str | None, typer.Option(help="adds forward and reverse KL to this teacher")] = None,
    prompts: Annotated[int, typer.Option(help="how many rows")] = 200,
    max_tokens: int = 128,
    template: Annotated[
        str | None, typer.Option(help="`chat` renders the rows by the tokenizer's chat template")
    ] = None,
) -> None:
    """Fixed prompts, fixed seeds: metrics with intervals, loss on the reference text, speed."""
    from limbeck import pipeline

    pipeline.evaluate_folder(
        model,
        data,
        metrics=metrics.split(","),
        seeds=seeds,
        teacher=teacher,
        prompts=prompts,
        max_tokens=max_tokens,
        template=template,
        console=console,
    )


@app.command()
def report(
    runs: list[Path],
    out: Annotated[Path | None, typer.Option(help="the HTML file (default: report.html in the folder)")] = None,
) -> None:
    """report.html for a run, for several side by side, or for a `compare` folder."""
    from limbeck.report import write_report

    console.print(f"report   {write_report(runs if len(runs) > 1 else runs[0], out)}")


@app.command()
def methods() -> None:
    """The registry: who writes, what the teacher says, what the student minimises, when to choose it."""
    from limbeck.doctor import methods_table

    console.print(methods_table())


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE.yaml]")] = None, overrides: Overrides = None
) -> None:
    """This machine; and for a recipe: tokenizers, EOS, templates, memory forecast, seconds per step."""
    from limbeck.doctor import machine, run_doctor
    from limbeck.recipe import Recipe

    machine(console)
    if recipe is not None:
        run_doctor(Recipe.load(recipe, overrides or []), console)


@app.callback()
def _root() -> None:
    pass


def main() -> None:
    """Exit codes: 0 done, 2 a mistake that the message explains, 130 interrupted."""
    transformers.utils.logging.disable_progress_bar()  # weight shards; the runs have a bar of their own
    try:
        app()
    except LimbeckError as error:
        Console(stderr=True).print(f"limbeck: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except SystemExit as exit_:
        if exit_.code == INTERRUPTED:
            Console(stderr=True).print(
                "limbeck: interrupted; --resume goes on from the last checkpoint, if one was saved"
            )
        raise
