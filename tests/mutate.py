"""Breaks the code in each of the ways listed in mutations.toml and sees whether the named test notices.

    make mutate                                  all of them
    python tests/mutate.py --only divergences    those whose file, test or text holds the word
    python tests/mutate.py --list

The repository is copied twice to a scratch folder; each copy takes one mutation at a time, and tests it in a fork of a
process that has imported what is heavy (warm_pytest.py). A mutation is `killed` when its test fails (pytest's exit
code 1) or hangs, `SURVIVED` when it passes, `BROKEN` when the entry itself is wrong: the text is not there exactly
once, the test cannot be collected, is skipped, or fails on unbroken code.
Exit code 0: all killed. 1: not.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COPIES = 2
TEST_TIMEOUT_S = 240  # one test; a hang counts as noticed
PROCESS_TIMEOUT_S = 420
SKIPPED_FOLDERS = (".git", ".venv", "runs", "dist", "build", "__pycache__", ".pytest_cache", ".ruff_cache")


@dataclass(frozen=True)
class Mutation:
    """One breakage: `text`, found once in `file`, becomes `replacement`; `test` (a pytest node id) must then fail."""

    file: str
    text: str
    replacement: str
    test: str

    def problem(self, root: Path) -> str | None:
        """Why this entry cannot be applied under `root`, or None."""
        path = root / self.file
        if not path.is_file():
            return f"no file {self.file}"
        count = path.read_text(encoding="utf-8").count(self.text)
        if count != 1:
            return f"expected the text once in {self.file}, found it {count} times"
        if self.text == self.replacement:
            return "the replacement is the text itself"
        return None

    @property
    def title(self) -> str:
        """One line to know it by."""
        change = " ".join(self.text.split()) + "  ->  " + " ".join(self.replacement.split())
        return f"{self.file.removeprefix('src/limbeck/')}: {change if len(change) <= 90 else change[:87] + '...'}"


@dataclass(frozen=True)
class Verdict:
    mutation: Mutation
    outcome: str  # killed | SURVIVED | BROKEN
    why: str
    seconds: float


def load(path: Path = ROOT / "tests" / "mutations.toml") -> list[Mutation]:
    """The list, in file order. TypeError on an entry with a missing or unknown key."""
    with path.open("rb") as file:
        entries = tomllib.load(file).get("mutation", [])
    return [Mutation(**entry) for entry in entries]


def copy_tree(place: Path) -> Path:
    """A copy of the repository as `place`/main, with the folder `shared` beside it if the repository has one."""
    copy = place / "main"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*SKIPPED_FOLDERS))
    shared = ROOT.parent / "shared"
    if shared.is_dir():
        (place / "shared").symlink_to(shared)
    return copy


class Runner:
    """Runs tests of one copy of the repository, on the copy's own source."""

    def __init__(self, copy: Path) -> None:
        self.copy, self.output = copy, copy.parent / "output.txt"
        environment = os.environ | {
            "PYTHONPATH": str(copy / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        warm = [sys.executable, str(Path(__file__).with_name("warm_pytest.py"))]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(warm, cwd=copy, env=environment, **pipes)

    def run(self, tests: Sequence[str], *, limit: float | None = PROCESS_TIMEOUT_S) -> tuple[int | None, str]:
        """(exit code of pytest, output); exit code None: it took longer than `limit` seconds and was killed."""
        options = ["-m", "", "-rs", "--tb=line", "-p", "no:cacheprovider", f"--timeout={TEST_TIMEOUT_S}"]
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(self.output), *options, *tests]) + "\n")
        self.process.stdin.flush()
        group, hung = int(self.process.stdout.readline()), threading.Event()

        def end() -> None:
            hung.set()
            os.killpg(group, signal.SIGKILL)

        timer = threading.Timer(limit or threading.TIMEOUT_MAX, end)
        timer.start()
        code = int(self.process.stdout.readline())
        timer.cancel()
        return None if hung.is_set() else code, self.output.read_text(encoding="utf-8", errors="replace")

    def end(self) -> None:
        self.process.communicate()


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def judge(mutation: Mutation, runner: Runner) -> Verdict:
    """Applies one mutation to the runner's copy, runs its test, puts the file back."""
    start = time.monotonic()
    path = runner.copy / mutation.file
    original = path.read_text(encoding="utf-8")
    path.write_text(original.replace(mutation.text, mutation.replacement), encoding="utf-8")
    try:
        code, output = runner.run([mutation.test])
    finally:
        path.write_text(original, encoding="utf-8")
    if code == 1:
        outcome, why = "killed", ""
    elif code is None:
        outcome, why = "killed", "it hung"
    elif code == 0 and " passed" in last_line(output):
        outcome, why = "SURVIVED", f"{mutation.test} passes"
    else:
        outcome, why = "BROKEN", f"{mutation.test}: pytest exit code {code}, {last_line(output)}"
    return Verdict(mutation, outcome, why, time.monotonic() - start)


def pass_unbroken(tests: Sequence[str], runners: Sequence[Runner]) -> bool:
    """Whether all tests pass on the code as it is, in the very processes that will judge; prints what fails."""
    print(f"{len(tests)} tests on the unbroken code ...", flush=True)
    files = sorted({test.partition("::")[0] for test in tests})
    shares = [
        [test for test in tests if test.partition("::")[0] in files[k :: len(runners)]] for k in range(len(runners))
    ]
    with ThreadPoolExecutor(len(runners)) as pool:
        jobs = [
            pool.submit(runner.run, share, limit=None) for runner, share in zip(runners, shares, strict=True) if share
        ]
    found = [job.result() for job in jobs]
    for code, output in found:
        if code != 0:
            print(output)
    return all(code == 0 for code, _ in found)


def judge_all(mutations: Sequence[Mutation], runners: Sequence[Runner]) -> list[Verdict]:
    """Every mutation on whichever runner is free, one line printed as each ends."""
    free: queue.SimpleQueue[Runner] = queue.SimpleQueue()
    for runner in runners:
        free.put(runner)
    lock, ended = threading.Lock(), 0

    def one(mutation: Mutation) -> Verdict:
        nonlocal ended
        runner = free.get()
        try:
            verdict = judge(mutation, runner)
        finally:
            free.put(runner)
        with lock:
            ended += 1
            counted = f"{ended:3}/{len(mutations)}"
            print(f"{counted} {verdict.outcome:8} {verdict.seconds:5.1f} s  {mutation.title}", flush=True)
        return verdict

    with ThreadPoolExecutor(len(runners)) as pool:
        return list(pool.map(one, mutations))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Breaks the code; the tests must notice.")
    parser.add_argument("--only", default="", metavar="WORD", help="entries whose file, test or text holds this")
    parser.add_argument("--list", action="store_true", help="print the entries and stop")
    options = parser.parse_args(arguments)

    mutations = [m for m in load() if options.only in f"{m.file}\n{m.test}\n{m.text}"]
    if options.list or not mutations:
        for mutation in mutations:
            print(f"{mutation.title}\n    {mutation.test}")
        print(f"{len(mutations)} mutations")
        return 0 if mutations else 1

    start = time.monotonic()
    broken = [Verdict(m, "BROKEN", problem, 0.0) for m in mutations if (problem := m.problem(ROOT))]
    sound = [m for m in mutations if m.problem(ROOT) is None]
    with tempfile.TemporaryDirectory(prefix="limbeck-mutate-") as scratch:
        runners = [Runner(copy_tree(Path(scratch) / str(k))) for k in range(COPIES)]
        try:
            if not pass_unbroken(sorted({m.test for m in sound}), runners):
                print("mutate: expected every named test to pass on the unbroken code, found the above: fix that first")
                return 1
            verdicts = broken + judge_all(sound, runners)
        finally:
            for runner in runners:
                runner.end()

    counts = {word: sum(v.outcome == word for v in verdicts) for word in ("killed", "SURVIVED", "BROKEN")}
    for verdict in verdicts:
        if verdict.outcome != "killed":
            print(f"{verdict.outcome}: {verdict.mutation.title}\n    {verdict.why}")
    summary = ", ".join(f"{count} {word.lower()}" for word, count in counts.items())
    print(f"{len(verdicts)} mutations in {time.monotonic() - start:.0f} s: {summary}")
    return 0 if counts["killed"] == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
