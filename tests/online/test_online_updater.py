"""The process that trains: when it starts, what it takes of a core, and that it never outlives the one it works for."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from online_helpers import llama, prompts, record, saved, until

from limbeck.decoding.drafts.layers import layers_draft
from limbeck.online import Buffer, Lot, Training, model_learner
from limbeck.online.gate import Gate
from limbeck.online.updater import Job, Updater, UpdaterLost


def test_the_updater_is_nice_once_its_share_is_bounded(tmp_path: Path) -> None:
    """Before, a busy server would leave it next to nothing."""
    build = partial(model_learner, saved(llama(), tmp_path / "model"), layers=[0])
    updater = Updater(build, tmp_path / "versions", Training(), Gate(), threads=1)
    own, found = os.getpriority(os.PRIO_PROCESS, 0), list[int]()
    for share in (1.0, 0.1, 0.1):
        updater.set_share(share)
        updater.run(Job(0, Lot([], [], [], [])))
        found.append(os.getpriority(os.PRIO_PROCESS, updater.process.pid) - own)
    updater.end()
    nicer = max(10 - own, 0)
    assert found == [0, nicer, nicer]


def test_the_updater_uses_idle_time(tmp_path: Path) -> None:
    """An update beside requests takes one epoch here, one without takes up to 24: the second job, of a process that is
    warm by then, takes far more of a core than the first."""
    model = llama(scale=0.2)
    buffer = Buffer(positions="all", top=32)
    record(model, layers_draft(model, [0]), buffer, prompts(24), keep=lambda place: place % 2 == 0, tokens=32)
    lot, build = buffer.take(10**6), partial(model_learner, saved(model, tmp_path / "model"), layers=[0])
    training = Training(epochs=1, idle_epochs=24, idle_patience=99)
    updater = Updater(build, tmp_path / "versions", training, Gate(), threads=1)
    spent: list[float] = []
    for busy in (True, False):
        updater.set_busy(busy)
        before = updater.worked
        updater.run(Job(0, lot))
        spent.append(updater.worked - before)
    updater.end()
    assert spent[1] > 2 * spent[0]


def _train_until_killed(folder: Path, connection: Any) -> None:
    """Of a process that serves: its updater is held in the middle of a job."""
    updater = Updater(
        partial(model_learner, folder / "model", layers=[0]), folder / "versions", Training(), Gate(), threads=1
    )
    updater.set_held(True)
    updater.ready()
    connection.send(updater.process.pid)
    updater.run(Job(0, Lot([], [], [], [])))


def test_an_updater_ends_with_the_one_that_it_trains_for(tmp_path: Path) -> None:
    """Killed, which nobody can catch."""
    saved(llama(), tmp_path / "model")
    context = multiprocessing.get_context("forkserver")
    connection, theirs = context.Pipe()
    server = context.Process(target=_train_until_killed, args=(tmp_path, theirs))
    server.start()
    try:
        assert connection.poll(60)
        updater = connection.recv()
        time.sleep(0.2)
        assert psutil.pid_exists(updater)
    finally:
        server.kill()
        server.join()
    until(lambda: not psutil.pid_exists(updater), 10)


def beginning(updater: Updater) -> tuple[threading.Thread, list[UpdaterLost]]:
    lost: list[UpdaterLost] = []

    def begin() -> None:
        try:
            updater.ready()
        except UpdaterLost as error:
            lost.append(error)

    thread = threading.Thread(target=begin)
    thread.start()
    return thread, lost


def test_an_updater_that_still_loads_is_ended_at_once(tmp_path: Path) -> None:
    """It has nothing to lose yet, and would notice only after it has loaded: here in a minute."""
    updater = Updater(partial(time.sleep, 60), tmp_path, Training(), Gate(), threads=1)  # pyright: ignore
    thread, lost = beginning(updater)
    until(lambda: updater.process is not None)
    start = time.perf_counter()
    updater.end()
    assert time.perf_counter() - start < 10 and not updater.process.is_alive()
    thread.join(10)
    assert len(lost) == 1


class Starting:
    """A context whose processes start as told, in the place of one whose library takes long to load."""

    Pipe = staticmethod(multiprocessing.Pipe)

    def __init__(self, start: Callable[[], object]) -> None:
        self.start = start

    def Process(self, **_: Any) -> Any:
        return SimpleNamespace(start=self.start, pid=None)


def test_nobody_waits_for_a_process_that_is_not_there_yet(tmp_path: Path) -> None:
    updater = Updater(partial(time.sleep, 60), tmp_path, Training(), Gate(), threads=1)  # pyright: ignore
    loaded = threading.Event()
    updater.context = Starting(lambda: loaded.wait(60))
    thread, lost = beginning(updater)
    updater.end()
    thread.join(10)
    assert "told to end" in str(lost[0]) and not loaded.is_set()
    loaded.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_that_cannot_be_made_is_lost(tmp_path: Path) -> None:
    def start() -> None:
        raise OSError("no more processes")

    updater = Updater(partial(time.sleep, 60), tmp_path, Training(), Gate(), threads=1)  # pyright: ignore
    updater.context = Starting(start)
    with pytest.raises(UpdaterLost, match="no process could be made"):
        updater.ready()
