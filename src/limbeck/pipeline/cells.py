"""Cells of long work: each is computed once, kept on disk under a digest of what it depends on, and not run again."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.report import environment

Say = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """`result`: what was computed, in `seconds`; `environment`: where, when, by which command and commit."""

    name: str
    facts: dict[str, Any]
    result: dict[str, Any]
    seconds: float
    environment: dict[str, Any]


class Cells:
    """The cells of one study or evaluation in `folder` (None: nothing is kept). Each is written aside and renamed: what
    was killed goes on after the last."""

    def __init__(self, folder: Path | None, say: Say) -> None:
        self.folder, self.say = folder, say
        self.all: list[Cell] = []

    def get(self, name: str, facts: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of this cell, computed unless one with these facts is there."""
        digest = hashlib.sha256(json.dumps([name, facts], sort_keys=True, default=str).encode()).hexdigest()[:16]
        path = None if self.folder is None else self.folder / f"{name.replace('/', '-')}-{digest}.json"
        if path is not None and path.exists():
            cell = Cell(**json.loads(path.read_text()))
            self.say(f"{name}: done before")
        else:
            self.say(f"{name}: begins")
            start = time.perf_counter()
            result = compute()
            seconds = time.perf_counter() - start
            command = shlex.join(["limbeck", *sys.argv[1:]])
            cell = Cell(name, facts, result, seconds, environment(command, facts.get("seed", 0)))
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                aside = path.with_suffix(".partial")
                aside.write_text(json.dumps(vars(cell), default=str))
                aside.rename(path)
            self.say(f"{name}: {seconds:.0f} s")
        self.all.append(cell)
        return cell.result
