"""`limbeck doctor`, `--dry-run` and `limbeck methods`: what is here, what a recipe would do, before it does it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from limbeck.data import collate, dataset_rollout, describe
from limbeck.methods import METHODS
from limbeck.models import completion_hidden, probe_autocast
from limbeck.models.teaching import teacher_hidden
from limbeck.ops.chunked import head_logits
from limbeck.ops.products import onednn_wins, packable, packing_pays
from limbeck.recipe import Recipe
from limbeck.report import cpu_name
from limbeck.training import Parts, build, train
from limbeck.training.memory import memory_forecast

TOP = 32


def methods_table() -> Table:
    """The registry as a table."""
    table = Table(title="methods", show_lines=True)
    for heading in ("method", "source", "signal", "objective", "paper", "when to choose it"):
        table.add_column(heading)
    for name, method in METHODS.items():
        table.add_row(name, method.source, method.signal, method.objective, method.paper, method.when)
    return table


def machine(console: Console) -> None:
    """CPU, memory, accelerators, and whether bf16 pays here."""
    memory = psutil.virtual_memory()
    console.print(f"cpu         {cpu_name()}, {torch.get_num_threads()} threads")
    console.print(f"memory      {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    console.print(f"gpu         {', '.join(names) or 'none'}")
    console.print(f"torch       {torch.__version__}")
    for width in (64, 1024):
        console.print(f"precision   {probe_autocast('cuda' if names else 'cpu', width)[1]}")
    kept = [str(dtype).removeprefix("torch.") for dtype in packable() if packing_pays(dtype)]
    console.print(f"products    float32 by {'oneDNN' if onednn_wins() else 'torch itself'}, on the CPU")
    console.print(f"writing     weights kept in oneDNN's order: {', '.join(kept) or 'none'}")


def dry_run(recipe: Recipe, console: Console) -> Parts:
    """Every check, the data's summary, one rendered example with its loss mask, a memory forecast. Trains nothing."""
    parts = build(recipe)
    console.print(f"method      {METHODS[recipe.method].label}: {METHODS[recipe.method].when}")
    console.print(f"data        {parts.summary}; {len(parts.held_out)} held out")
    console.print(f"stop        {[parts.tokenizer.convert_ids_to_tokens(token) for token in parts.stop_tokens]}")
    for note in parts.notes:
        console.print(f"note        {note}")
    for name, size in memory_forecast(parts).items():
        console.print(f"{name:<28}{size / 2**20:10.0f} MiB")
    console.print("\nexample 0, what is learnt between ⟦ ⟧:")
    console.print(describe(parts.train[0], parts.tokenizer), markup=False, highlight=False)
    return parts


def run_doctor(recipe: Recipe, console: Console) -> None:
    """`dry_run`, then the teacher's mass in the student's top tokens on ten rows, and the seconds of a step."""
    parts = dry_run(recipe, console)
    if parts.teacher is not None:
        console.print(f"\nteacher's mass in the student's top {TOP} tokens, ten rows: {teacher_mass(parts):.3f}")
        console.print("(near 0: the two models do not speak of the same tokens; a cut student starts low and rises)")
    with tempfile.TemporaryDirectory() as folder:
        short = recipe.replaced(output=folder, training={**recipe.training, "max_steps": 3, "save_strategy": "no"})
        parts = build(short)
        _, seconds = train(short, parts, Path(folder), quiet=True)
    console.print(f"seconds a step: {seconds / 3:.2f} (mean of three, the first one warms up)")


@torch.no_grad()
def teacher_mass(parts: Parts) -> float:
    """Mean probability that the teacher gives to the student's TOP likeliest tokens, on ten held-out rows."""
    rollouts = [dataset_rollout(example) for example in parts.held_out[:10] if any(example.mask)]
    if not rollouts:
        return float("nan")
    batch = {
        name: tensor.to(parts.student.device)
        for name, tensor in collate(rollouts, parts.tokenizer.pad_token_id).items()
    }
    hidden_NH, _, head = completion_hidden(parts.student, batch)
    signal = teacher_hidden(parts.teacher, parts.student, batch)
    top_NK = head_logits(hidden_NH, head).topk(min(TOP, head.size), dim=-1).indices
    return head_logits(signal.hidden_NH, signal.head).softmax(-1).gather(-1, top_NK).sum(-1).mean().item()
