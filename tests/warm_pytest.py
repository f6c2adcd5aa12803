"""Runs pytest in forks of a process that has imported the heavy libraries: a small test ends in one second, not ten.

Started in the folder whose tests are meant, with its `src` first in PYTHONPATH; the folder's own code is imported by
the forks alone. A line of standard input is a JSON list, the file for the output and pytest's arguments; two lines
answer it: the fork's process id, which leads its own process group, and its exit code.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

import pytest

LIBRARIES = (
    "accelerate",
    "datasets",
    "fastapi.testclient",
    "peft",
    "prometheus_client",
    "pytest_benchmark.plugin",
    "rouge_score.rouge_scorer",
    "sacrebleu",
    "schemathesis.pytest.plugin",
    "scipy.stats",
    "torch.utils.data",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "typer",
    "uvicorn",
    "yaml",
)


def main() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    for line in sys.stdin:
        output, *arguments = json.loads(line)
        process = os.fork()
        if process == 0:
            _run(output, arguments)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def _run(output: str, arguments: list[str]) -> None:
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, stream in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(source, stream)
    try:
        code = int(pytest.main(arguments))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
