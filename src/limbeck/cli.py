"""The command line: thin. Every command calls one function of the library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
import yaml
from rich.console import Console

from limbeck import ranks
from limbeck.errors import LimbeckError, RecipeError

app = typer.Typer(
    help="limbeck distils a large language model into a small one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
INTERRUPTED = 130

Routes = Annotated[
    list[str] | None, typer.Option("--route", help="NAME=FOLDER: another draft, for requests with this `route`")
]
Context = Annotated[int | None, typer.Option(min=2, help="tokens of prompt and completion, at most: bounds memory")]
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
    if ranks.first():
        console.print(f"student  {run.student_path}")
        if run.report_path.exists():
            console.print(f"report   {run.report_path}")


@app.command()
def compare(
    recipe: RecipeArg,
    overrides: Overrides = None,
    methods: Annotated[
        str, typer.Option(help="comma-separated; gkd:lmbda=0.5+samples=2 changes a recipe")
    ] = "sft,seqkd,kd,gkd",
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
    models: Annotated[
        list[str],
        typer.Argument(help="folders, .gguf files or hub ids; of several, which share memory, the paired differences"),
    ],
    data: Annotated[
        list[str], typer.Option(help="JSONL, Parquet, hub id or embedded:test:200; once for each data set")
    ],
    metrics: Annotated[
        str,
        typer.Option(
            help="comma-separated: rouge_l, accuracy, distinct_4, ... or module:function; with options, a list as in a "
            "recipe: '[rouge_l, {name: regex, pattern: ...}]'"
        ),
    ] = "rouge_l",
    seeds: Annotated[
        str | None, typer.Option(help="how many samples a prompt (5), or the seeds: 10,20,30,40,50")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="instead of --seeds: samples a prompt, and pass@k and maj@k of them")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="adds forward and reverse KL to this teacher")] = None,
    exposure: Annotated[
        bool, typer.Option("--exposure", help="excess accumulated error on the student's own text; needs --teacher")
    ] = False,
    calibration: Annotated[
        bool, typer.Option("--calibration", help="ECE of tokens, and of label words where rows have `labels`")
    ] = False,
    prompts: Annotated[int, typer.Option(min=1, help="how many rows of each data set")] = 200,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest completion")] = 128,
    no_repeat_ngram_size: Annotated[int, typer.Option(min=0, help="ban repeated n-grams of this many tokens")] = 0,
    template: Annotated[
        str | None, typer.Option(help="`chat` renders the rows by the tokenizer's chat template")
    ] = None,
    precision: Annotated[str, typer.Option(help="auto (bf16 where that is faster), fp32 or bf16")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="a folder for evaluation.json and pictures; a stopped evaluation goes on from it"),
    ] = None,
) -> None:
    """Fixed prompts, fixed seeds: metrics with intervals, loss on the reference text, speed."""
    from limbeck import pipeline

    pipeline.evaluate_folder(
        models[0] if len(models) == 1 else models,
        data[0] if len(data) == 1 else data,
        metrics=_metrics(metrics),
        seeds=_seeds(seeds),
        samples=samples,
        teacher=teacher,
        prompts=prompts,
        max_tokens=max_tokens,
        template=template,
        no_repeat_ngram_size=no_repeat_ngram_size,
        with_exposure=exposure,
        with_calibration=calibration,
        precision=_one_of("--precision", precision, ("auto", "fp32", "bf16")),
        out=out,
        console=console,
    )


def _metrics(text: str) -> list[Any]:
    """Names between commas, or a YAML list of what a recipe's `evaluation.metrics` takes."""
    if not text.lstrip().startswith("["):
        return [name.strip() for name in text.split(",") if name.strip()]
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"--metrics: expected a list in YAML, found {text!r}: {' '.join(str(error).split())}"
        ) from None
    if any(not isinstance(metric, str | dict) for metric in found):
        raise RecipeError(f"--metrics: expected names and tables with a name, found {text!r}")
    return found


def _seeds(text: str | None) -> int | list[int] | None:
    """`5` is their number; with a comma, as `10,20` or `10,`, they are the seeds themselves."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts) or (parts == [text.strip()] and int(text) == 0):
        raise RecipeError(f"--seeds: expected a number above 0 or seeds such as 10,20,30, found {text!r}")
    return [int(part) for part in parts] if "," in text else int(text)


@app.command()
def report(
    runs: list[Path],
    out: Annotated[Path | None, typer.Option(help="the HTML file (default: report.html in the folder)")] = None,
) -> None:
    """report.html for a run, for several side by side, or for a `compare` folder."""
    from limbeck.report import write_report

    console.print(f"report   {write_report(runs if len(runs) > 1 else runs[0], out)}")


@app.command()
def serve(
    target: Annotated[str, typer.Option(help="the model that is served: a folder, a .gguf file or a hub id")],
    draft: Annotated[
        str | None, typer.Option(help="a small model of the same vocabulary, or a feature draft; none: cut from target")
    ] = None,
    draft_kind: Annotated[
        str | None, typer.Option(help="layers, model, feature (on the target's hidden states) or ngram")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="comma-separated, for layers: 0,2,5; by default every other")
    ] = None,
    weights: Annotated[str, typer.Option(help="of the draft's model: own, or on a CPU int8 or int4")] = "own",
    head_rows: Annotated[
        int | None, typer.Option(min=1, help="tokens that the draft may write beside a request's own; by default all")
    ] = None,
    head_text: Annotated[str | None, typer.Option(help="a file of texts that says which tokens these are")] = None,
    positions: Annotated[
        str, typer.Option(help="all verified ones are trained on, or those where a drafted token was rejected")
    ] = "all",
    routes: Routes = None,
    learned_routing: Annotated[
        bool, typer.Option("--learned-routing", help="requests without a route get the fastest draft")
    ] = False,
    host: Annotated[str, typer.Option(help="others than this machine are served with keys alone")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help="a key a line")] = None,
    no_learning: Annotated[bool, typer.Option("--no-learning", help="the draft stays as it is")] = False,
    out: Annotated[Path, typer.Option(help="the folder for the draft's versions")] = Path("runs/serve"),
    name: Annotated[str | None, typer.Option(help="the model's name in the API; by default its folder's")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="completions written at once; others wait")] = 16,
    context: Context = None,
    gamma: Annotated[int | None, typer.Option(min=0, help="drafted tokens a round; by default as many as pay")] = None,
    stream_tokens: Annotated[
        int, typer.Option(min=1, help="tokens in a piece of a stream; more tell less of what was accepted")
    ] = 1,
    per_minute: Annotated[float | None, typer.Option(help="requests a minute of one key or address")] = None,
    in_flight: Annotated[int, typer.Option(min=1, help="completions of all clients, waiting ones included")] = 256,
) -> None:
    """An OpenAI-compatible server whose draft learns while it serves; dashboard at /."""
    try:
        from limbeck.online.server import Limits, serving
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"limbeck serve: expected the extra `serve`, found no {error.name}: pip install 'limbeck[serve]'"
        ) from None
    options = serving.Options(
        target,
        draft,
        draft_kind,
        layers=_numbers(layers),
        weights=weights,
        head_rows=head_rows,
        head_text=head_text,
        positions=_one_of("--positions", positions, ("all", "rejected")),
        host=host,
        port=port,
        api_key_file=api_key_file,
        learning=not no_learning,
        folder=out,
        name=name,
        max_batch=max_batch,
        context=context,
        gamma=gamma,
        stream_tokens=stream_tokens,
        limits=Limits(per_minute=per_minute, in_flight=in_flight),
        routes=serving.parse_routes(routes or []),
        learned_routing=learned_routing,
    )
    serving.serve(options, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))


def _one_of(option: str, value: str, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise RecipeError(f"{option}: expected {' or '.join(allowed)}, found {value!r}")
    return value


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise RecipeError(f"--layers: expected numbers such as 0,2,5, found {text!r}")
    return [int(part) for part in parts]


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="osd-acceptance, osd-shift, osd-speedup or osd-ablation")],
    target: Annotated[str, typer.Option(help="the model that answers: a folder, a .gguf file or a hub id")],
    domain: Annotated[
        list[str], typer.Option(help="NAME=FILE or NAME=FILE:prompt=COLUMN,completion=COLUMN; once for each domain")
    ],
    draft: Annotated[str | None, typer.Option(help="a model of the same vocabulary; none: cut from target")] = None,
    layers: Annotated[str | None, typer.Option(help="comma-separated, those of the draft that are kept")] = None,
    requests: Annotated[int, typer.Option(min=1, help="of each domain, or stage")] = 400,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 96,
    temperature: Annotated[float, typer.Option(min=0.0, help="that the target answers with; 0: greedy")] = 1.0,
    seeds: Annotated[int, typer.Option(min=1, help="orders of the stream")] = 3,
    update_size: Annotated[int, typer.Option(min=1, help="new positions that an update waits for")] = 4096,
    learning_rate: Annotated[float, typer.Option(help="of the draft's optimiser")] = 1e-3,
    gamma: Annotated[int, typer.Option(min=1, help="drafted tokens a round, where it is fixed")] = 4,
    head_rows: Annotated[int, typer.Option(min=0, help="rows of the draft's head that are kept; 0: all")] = 0,
    weights: Annotated[str, typer.Option(help="osd-speedup: the draft's weights: own, int8 or int4")] = "own",
    arms: Annotated[
        str, typer.Option(help="osd-acceptance: which drafts, of static, offline, online and idle")
    ] = "static,offline,online",
    out: Annotated[Path, typer.Option(help="the folder for NAME.md, NAME.csv and NAME.png")] = Path("docs/studies"),
    work: Annotated[Path, typer.Option(help="recorded answers and finished cells")] = Path("runs/studies"),
) -> None:
    """Online speculative decoding's claims, measured: cells that are done are not run again."""
    from limbeck.studies import Domain, Setting
    from limbeck.studies import study as run

    setting = Setting(
        target,
        [Domain.parse(text) for text in domain],
        draft,
        _numbers(layers),
        requests=requests,
        max_tokens=max_tokens,
        temperature=temperature,
        seeds=seeds,
        update_size=update_size,
        learning_rate=learning_rate,
        gamma=gamma,
        head_rows=head_rows,
        weights=weights,
        arms=[arm.strip() for arm in arms.split(",")],
        out=out,
        work=work,
    )
    page = run(name, setting, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
    console.print(f"page     {page}")


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
