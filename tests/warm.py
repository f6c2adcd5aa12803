"""Processes of their own, forked from one that has imported torch, transformers and limbeck: an interpreter that
imports them itself takes longer than most of what is run in it."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["limbeck.online.updater", "limbeck.training"])


class Warm:
    """Python `code` in a process, with `arguments` in sys.argv; `output` gets what it prints."""

    def __init__(self, code: str, *arguments: Any, output: Path, environment: Mapping[str, str] | None = None) -> None:
        self.output = output
        words = [str(argument) for argument in arguments]
        self.process = _CONTEXT.Process(target=_run, args=(code, words, str(output), dict(environment or {})))
        self.process.daemon = True
        self.process.start()

    def kill(self) -> None:
        """SIGKILL, and waits until it is dead."""
        self.process.kill()
        self.process.join()

    def done(self, timeout: float = 240) -> tuple[int | None, str]:
        """Its exit code (None: not ended after `timeout` seconds, and killed) and what it has printed."""
        self.process.join(timeout)
        code = self.process.exitcode
        self.kill()
        return code, self.output.read_text()


def printed(code: str, *arguments: Any, output: Path) -> str:
    """What `code` prints; AssertionError where it fails."""
    exit_code, text = Warm(code, *arguments, output=output).done()
    assert exit_code == 0, text
    return text


def two_ranks(script: Path, *arguments: Any, output: Path) -> None:
    """A file run by two processes with torchrun's variables; AssertionError where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    ranks = [
        Warm(
            code,
            *arguments,
            output=output.with_suffix(f".{rank}"),
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    for rank in ranks:
        exit_code, text = rank.done()
        assert exit_code == 0, text[-3000:]


def _run(code: str, words: list[str], output: str, environment: dict[str, str]) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(environment)
    sys.argv = ["-c", *words]
    exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})
