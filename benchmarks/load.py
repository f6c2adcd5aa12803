"""`limbeck serve` under load: many clients at once, updates in turn allowed and not."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Any

import numpy as np
import psutil

from benchmarks.common import MIB, Result, Row, shared
from benchmarks.serving import ratio_interval
from benchmarks.stories import held_out


@dataclass
class Asked:
    """Every answer of a load: (when it was asked for, seconds), and how many of them were not the one expected."""

    answers: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    wrong: int = 0
    lost: int = 0


def load(case: str, quick: bool) -> Iterator[Result]:
    """64 clients, each with its own prompts, greedy, so that each answer is known before; windows in which updates may
    run, and stand still, in turn."""
    clients, windows, seconds = (4, 2, 2.0) if quick else (64, 30, 20.0)
    target = shared("models/stories260k")
    prompts = [f"{' '.join(story.split()[:8])} {number}" for number, story in enumerate(held_out(quick)[:clients])]
    bodies = [{"model": target.name, "prompt": text, "max_tokens": 40, "temperature": 0} for text in prompts]
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        command = [
            sys.executable,
            "-m",
            "limbeck",
            "serve",
            "--target",
            str(target),
            "--port",
            str(port),
            "--out",
            folder,
        ]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            numbers = loaded(port, server.pid, bodies, windows, seconds)
        finally:
            server.terminate()
            server.wait(30)
    yield Result("serving-load", case, "as served", "limbeck serve", "ours", numbers)


def loaded(port: int, server: int, bodies: list[dict[str, Any]], windows: int, seconds: float) -> dict[str, float]:
    client = Client(port)
    client.wait()
    expected = [client.written(body) for body in bodies]
    asked, end = Asked(), threading.Event()
    threads = [
        threading.Thread(target=ask, args=(Client(port), body, text, asked, end))
        for body, text in zip(bodies, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    bounds: list[tuple[float, float]] = []
    memory: list[float] = []
    trained: list[float] = []

    def training_s() -> float:
        return client.call("GET", "/dashboard.json")["ledger"]["training"]

    for window in range(windows):
        client.press("pause" if window % 2 else "resume")
        time.sleep(seconds / 10)  # a step that runs is left to end
        start, worked = time.perf_counter(), training_s()
        time.sleep(seconds * 9 / 10)
        bounds.append((start, time.perf_counter()))
        trained.append(training_s() - worked)
        memory.append(family_bytes(server) / MIB)
    end.set()
    for thread in threads:
        thread.join()
    counts = client.call("GET", "/dashboard.json")["drafts"]["layers"]
    inside = [np.array([took for begun, took in asked.answers if low <= begun < high]) for low, high in bounds]
    pairs = list(zip(inside[::2], inside[1::2], strict=True))
    middle, _, high = ratio_interval(pairs, lambda took: np.quantile(took, 0.99))
    third = max(1, len(memory) // 3)
    return {
        "answers": len(asked.answers),
        "wrong": asked.wrong,
        "lost": asked.lost,
        "p99_s": float(np.quantile(np.hstack(inside[::2]), 0.99)),
        "p99_s, paused": float(np.quantile(np.hstack(inside[1::2]), 0.99)),
        "ratio": middle,
        "ratio_high": high,
        "mib, second third": float(np.mean(memory[third : 2 * third])),
        "mib, last third": float(np.mean(memory[-third:])),
        "training_s": sum(trained[::2]),
        "training_s, paused": sum(trained[1::2]),
        "updates": counts["updates"],
        "swaps": counts["swaps"],
    }


class Client:
    """One connection, kept open; of one thread."""

    def __init__(self, port: int) -> None:
        self.connection = HTTPConnection("127.0.0.1", port, timeout=120)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON of the answer. HTTPException for another status than 200, OSError for no connection."""
        headers = {"content-type": "application/json", "X-Limbeck-Dashboard": "1"}
        try:
            self.connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = self.connection.getresponse()
            text = response.read()
        except (OSError, HTTPException):
            self.connection.close()
            raise
        if response.status != 200:
            raise HTTPException(f"{path}: expected 200, found {response.status}: {text[:200]!r}")
        return json.loads(text)

    def wait(self) -> None:
        """Until the server answers. TimeoutError after a minute."""
        for _ in range(600):
            try:
                self.call("GET", "/health")
                return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("expected a server that answers within a minute, found none")

    def written(self, body: dict[str, Any]) -> str:
        return self.call("POST", "/v1/completions", body)["choices"][0]["text"]

    def press(self, button: str) -> None:
        self.call("POST", f"/dashboard/{button}")


def ask(client: Client, body: dict[str, Any], text: str, asked: Asked, end: threading.Event) -> None:
    """Asks for `text`, and again once it is answered."""
    while not end.is_set():
        start = time.perf_counter()
        try:
            found = client.written(body)
        except (OSError, HTTPException):
            asked.lost += 1
            continue
        asked.answers.append((start, time.perf_counter() - start))
        asked.wrong += found != text


def family_bytes(process: int) -> int:
    """Resident bytes of a process and its children."""
    parent = psutil.Process(process)
    return sum(one.memory_info().rss for one in (parent, *parent.children(recursive=True)))


ROWS = [
    Row(
        "serving-load",
        "stories260k with a cold draft, 64 clients for ten minutes, windows of 20 s in turn with updates and without "
        "(those that run stand still): s to an answer of 40 tokens, 95 % bound over pairs of windows",
        "ratio",
        lambda quick: ["64 clients"],
        load,
    ),
]
