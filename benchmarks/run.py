"""`make bench`, or `python -m benchmarks.run [--only NAME ...] [--quick] [--write]` from the repository root."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import divergence, load, policy, products, rollouts, serving, steps, stories
from benchmarks.common import Result, Row, Skipped, say
from benchmarks.report import print_row, with_ratios, write_json, write_section
from limbeck.report.environment import environment

ROOT = Path(__file__).resolve().parents[1]
ROWS = {
    row.name: row
    for module in (products, divergence, rollouts, steps, stories, policy, serving, load)
    for row in module.ROWS
}

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


def measure(row: Row, case: str, quick: bool, out: Path) -> None:
    """In the child: results go to `out` one by one, so that what was measured before a crash is kept."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory ends, this process goes first
    with out.open("a") as file:
        try:
            for result in row.run(case, quick):
                print(json.dumps(asdict(result)), file=file, flush=True)
        except Skipped as why:
            skipped = Result(row.name, case, "", "", "none", note=f"skipped: {why}")
            print(json.dumps(asdict(skipped)), file=file, flush=True)


def results_of(row: Row, quick: bool) -> list[Result]:
    """Each case in a process of its own, for the sake of its peak memory. A case that crashed says so."""
    results: list[Result] = []
    for case in row.cases(quick):
        say(f"{row.name}: {case}")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "results.jsonl"
            command = [sys.executable, "-m", "benchmarks.run", "--only", row.name, "--child", case, "--out", str(out)]
            done = subprocess.run(
                command + ["--quick"] * quick, cwd=ROOT, env=os.environ | QUIET, stdout=sys.stderr.fileno()
            )
            written = out.read_text().splitlines() if out.exists() else []
        results += [Result(**json.loads(line)) for line in written]
        if done.returncode:
            results.append(Result(row.name, case, "", "", "none", note=f"failed: exit code {done.returncode}"))
    return with_ratios(results, row)


def machine() -> dict[str, Any]:
    """What the numbers were measured on, by which command."""
    command = shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]])
    found = environment(command, seed=0, dtype="fp32, bf16")
    return {**found, "threads": torch.get_num_threads(), "peers": {name: installed(name) for name in PACKAGES}}


PACKAGES = ("trl", "liger-kernel")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="limbeck beside its peers.")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--write", action="store_true", help="add a dated section to docs/benchmarks.md")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results.json", help="default: %(default)s")
    parser.add_argument("--child", metavar="CASE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick and options.write:
        parser.error("--quick measures nothing that is worth a section: leave --write out")
    return options


def main() -> int:
    options = parsed()
    if options.child:
        measure(ROWS[options.only[0]], options.child, options.quick, options.out)
        return 0
    console = Console(width=None if sys.stdout.isatty() else 200)
    described = machine()
    tables: list[tuple[Row, list[Result]]] = []
    for name in options.only:
        row = replace(ROWS[name], about="tiny sizes (--quick)") if options.quick else ROWS[name]
        results = results_of(row, options.quick)
        tables.append((row, results))
        print_row(row, results, console)
        write_json(options.out, described, [result for _, table in tables for result in table])
    console.print(f"{described['cpu']}, {described['threads']} threads, torch {described['torch']}; {options.out}")
    if options.write:
        write_section(ROOT / "docs" / "benchmarks.md", described, tables)
    wrong = [result for _, table in tables for result in table if result.note.startswith(("MISMATCH", "failed"))]
    for result in wrong:
        console.print(f"{result.row}, {result.case} {result.dtype}: {result.who} {result.note}", style="bold red")
    return int(any(result.side != "peer" for result in wrong))


if __name__ == "__main__":
    sys.exit(main())
