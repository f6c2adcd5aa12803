"""A draft that learns beside the service, whole, and what is put in place of what, when."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from online_helpers import (
    GREEDY,
    FakeUpdater,
    all_traces,
    learning_of,
    llama,
    prompts,
    small_trace,
    submit_all,
    until,
    with_versions,
)

from limbeck.decoding import Sampling, generate
from limbeck.decoding.controller import Fixed
from limbeck.decoding.drafts.layers import layers_draft
from limbeck.decoding.speculative import Engine
from limbeck.errors import CheckpointError, RecipeError, RolloutError
from limbeck.online import (
    Buffer,
    Learning,
    Pace,
    Service,
    Training,
    Version,
    Watch,
)
from limbeck.online.coins import HeldOut
from limbeck.online.gate import Gate, Verdict
from limbeck.online.updater import Result, Worker
from limbeck.online.versions import Versions


def _traffic(service: Service, count: int, start: int = 0, **changes: Any) -> None:
    texts = prompts(count, seed=start + 1)
    submit_all(service, Sampling(32), texts, start=start, **changes).wait(60)


def test_the_whole_learns_while_it_serves(tmp_path: Path) -> None:
    """Service, engine, buffer, updater, gate, swap; then the updater is killed, and another goes on."""
    model = llama(scale=0.2)
    engine = Engine(model, None, {"cut": layers_draft(model, [0])}, Fixed("cut", 3), max_batch=4)
    learning, texts = learning_of(model, engine.drafts["cut"], tmp_path), prompts(4, seed=99)
    draft: Any = engine.drafts["cut"]
    expected = [one.tokens for one in generate(model, [list(text) for text in texts], replace(GREEDY, max_tokens=80))]

    def numbers() -> dict[str, Any]:
        return service.snapshot()["drafts"]["cut"]

    with Service(engine, learning={"cut": learning}, held_out=HeldOut(0.6)) as service:
        _traffic(service, 60)
        assert learning.buffer.new > 300
        before = numbers()
        service.force_update()
        across: list[list[list[int]]] = []  # greedy requests, the first of them before the swap and the last after it
        while not across or numbers()["updates"] == 0:
            written = submit_all(service, replace(GREEDY, max_tokens=80), texts)
            written.wait(60)
            across.append([written.tokens(f"r{place}") for place in range(4)])
        assert across == [expected] * len(across) and len(across) > 1
        until(lambda: numbers()["swaps"] == 1)
        seen = numbers()
        assert draft.version == 1 and learning.versions.newest() == 1
        assert [mark["kind"] for mark in service.snapshot()["marks"]] == ["update", "swap"]
        _traffic(service, 30, start=100)
        after = numbers()
        old_alpha = before["alpha_sum"] / before["verified"]
        new_alpha = (after["alpha_sum"] - seen["alpha_sum"]) / (after["verified"] - seen["verified"])
        assert new_alpha > old_alpha + 0.01, (old_alpha, new_alpha)

        loaded = psutil.Process(learning.updater.process.pid).ppid()
        os.kill(learning.updater.process.pid, signal.SIGKILL)
        service.force_update()
        _traffic(service, 8, start=200)  # serving goes on
        until(lambda: numbers()["updates"] == 2)
        assert numbers()["restarts"] == 1
        # The next one is a fork of the same process, which has loaded the library.
        assert psutil.Process(learning.updater.process.pid).ppid() == loaded != os.getpid()
    assert learning.updater.process.exitcode == 0  # an updater that waits for work goes by itself, it is not killed


def test_a_request_teaches_the_draft_that_serves_it(tmp_path: Path) -> None:
    model = llama()
    drafts = {name: layers_draft(model, [0]) for name in ("cut", "other")}
    engine = Engine(model, None, drafts, Fixed("cut", 3), max_batch=4)
    learning = learning_of(model, drafts["cut"], tmp_path)
    learning.updater = FakeUpdater([])  # pyright: ignore
    with Service(engine, learning={"cut": learning}) as service:
        for start, route in ((0, "other"), (10, "cut"), (20, None)):
            submit_all(service, Sampling(10), prompts(2), start=start, route=route).wait()
    assert {trace.id for trace in all_traces(learning.buffer)} == {"r10", "r11", "r20", "r21"}


class _Here(FakeUpdater):
    """An updater that works in the learning's own thread."""

    def __init__(self, build: Callable[[], Any], folder: Path) -> None:
        super().__init__([])
        self.made, self.worker = partial(self._make, build, folder), None

    def _make(self, build: Callable[[], Any], folder: Path) -> Worker:
        return Worker(build(), Versions(folder), Training(learning_rate=3e-3), Gate(), 0, lambda: None)

    def ready(self) -> None:
        self.worker = self.worker or self.made()

    def run(self, job: Any) -> Any:
        self.ready()
        assert self.worker is not None
        return self.worker.run(job)


def _serving(folder: Path, model: Any) -> tuple[Service, Learning, Any]:
    """A service whose updater is in this process, as if it were started (again) with this folder."""
    engine = Engine(model, None, {"cut": layers_draft(model, [0])}, Fixed("cut", 3), max_batch=4)
    learning = learning_of(model, engine.drafts["cut"], folder)
    learning.updater = _Here(learning.build, folder / "versions")  # pyright: ignore
    return Service(engine, learning={"cut": learning}), learning, engine.drafts["cut"]


def _is_version(draft: Any, learning: Learning, number: int) -> bool:
    own, weights = dict(draft.reader.model.named_parameters()), learning.versions.weights(number)
    return draft.version == number and all(torch.equal(own[name], weight) for name, weight in weights.items())


def test_a_start_takes_up_the_newest_version_and_it_is_rolled_back_to_the_first(tmp_path: Path) -> None:
    model = llama(scale=0.2)
    first, learning, draft = _serving(tmp_path, model)
    learning.updater.ready()
    for number in (1, 2):
        weights = {name: weight + 0.01 * number for name, weight in learning.versions.weights(0).items()}
        learning.versions.save(Version(number, weights, learning.versions.load(0).state))
    with first:
        assert _is_version(draft, learning, 2) and learning.serving == 2 and not learning.cold
        for back, number in enumerate((1, 0), 1):
            first.roll_back("cut")
            until(lambda back=back: learning.tally.rollbacks == back)
            assert _is_version(draft, learning, number)
        with pytest.raises(RolloutError, match="before"):
            first.roll_back()
        until(lambda: learning.versions.numbers() == [0])
    assert [mark["kind"] for mark in first.snapshot()["marks"]] == ["rollback"] * 2 and learning.versions.next() == 3
    again, learning, draft = _serving(tmp_path, model)
    with again:
        assert _is_version(draft, learning, 0) and learning.cold


def test_a_start_refuses_another_drafts_versions(tmp_path: Path) -> None:
    """Also where there is none yet but the first."""
    _, learning, _ = _serving(tmp_path, llama(scale=0.2))
    learning.updater.ready()
    assert learning.versions.newest() == 0
    foreign, _, _ = _serving(tmp_path, llama(scale=0.2, seed=5))
    with pytest.raises(CheckpointError, match="another"):
        foreign.start()


def test_a_request_that_says_no_is_nowhere(tmp_path: Path) -> None:
    model = llama()
    engine = Engine(model, None, {"cut": layers_draft(model, [0])}, Fixed("cut", 3), max_batch=4)
    learning = learning_of(model, engine.drafts["cut"], tmp_path, watch=Watch(least=1))
    learning.updater = FakeUpdater([])  # pyright: ignore
    with Service(engine, learning={"cut": learning}, held_out=HeldOut(1.0)) as service:
        submit_all(service, Sampling(24), prompts(8), train=False).wait()
        assert not all_traces(learning.buffer) and learning.buffer.bytes == 0
        assert not learning.watch.recent and not learning._seen
        submit_all(service, Sampling(70), prompts(8), start=20).wait()
        assert {trace.id for trace in all_traces(learning.buffer)} == {f"r{place}" for place in range(20, 28)}
        assert len(learning.watch.recent) == 8
    assert not (tmp_path / "versions").exists()


@pytest.mark.parametrize("broken", ["observe", "close"])
def test_an_error_of_the_learning_ends_the_learning_alone(tmp_path: Path, broken: str) -> None:
    model = llama()
    engine = Engine(model, None, {"cut": layers_draft(model, [0])}, Fixed("cut", 3), max_batch=4)
    learning = learning_of(model, engine.drafts["cut"], tmp_path)
    learning.updater = FakeUpdater([])  # pyright: ignore
    setattr(learning.buffer, broken, lambda _: 1 / 0)
    with Service(engine, learning={"cut": learning}) as service:
        listener = submit_all(service, GREEDY, prompts(6))
        listener.wait()
        seen = service.snapshot()
        assert seen["failure"] is None
        draft = seen["drafts"]["cut"]
        assert draft["broken"] and draft["failures"] == 1 and "ZeroDivisionError" in draft["last_error"]
    assert {events[-1].finish_reason for events in listener.events.values()} == {"length"}


def test_what_cannot_be_put_in_place_is_withdrawn_and_not_counted(tmp_path: Path) -> None:
    better = Result(Verdict("better", 0.2, 50.0, 9), 1, 0.3, 0.5)
    learning, fake = with_versions(tmp_path / "raises", [better])
    learning.draft.prepare = lambda *_: 1 / 0  # pyright: ignore
    with pytest.raises(ZeroDivisionError):
        learning._update()
    assert learning.tally.swaps == 0 and learning.versions.numbers() == [0] and learning.serving == 0
    assert learning.watch.floor is None

    learning, fake = with_versions(tmp_path / "ended", [better])
    learning._post = lambda action: None  # the engine has ended
    learning.give_up()
    learning._update()
    assert learning.tally.swaps == 0 and learning.versions.numbers() == [0, 1]  # it has passed: the next start has it
    learning.serving = 1
    learning.ask_roll_back()
    learning._look_back()
    assert learning.tally.rollbacks == 0 and learning.versions.numbers() == [0, 1]


def test_a_service_that_ends_lets_go_of_a_swap(tmp_path: Path) -> None:
    """The engine fails while the learning waits for it to put a version in place."""
    model = llama()
    engine = Engine(model, None, {"cut": layers_draft(model, [0])}, Fixed("cut", 3), max_batch=4)
    learning = learning_of(model, engine.drafts["cut"], tmp_path)
    learning.updater = FakeUpdater([])  # pyright: ignore
    service = Service(engine, learning={"cut": learning})
    service._turn = lambda: 1 / 0  # pyright: ignore
    service.start()
    until(lambda: service.failure is not None, 5)
    learning._thread.join(5)
    assert not learning._thread.is_alive()
    service.stop()


def test_an_updater_that_is_begun_while_the_service_stops_is_ended(tmp_path: Path) -> None:
    class Late(FakeUpdater):
        alive = False
        told = threading.Event()

        def ready(self) -> None:
            assert self.told.wait(10)
            self.alive = True

        def end(self) -> None:
            self.alive = False
            self.told.set()

    learning = learning_of(llama(), layers_draft(llama(), [0]), tmp_path)
    updater = learning.updater = Late([])  # pyright: ignore
    learning.start(lambda action: action(), lambda kind, version: None, threading.Lock())
    learning.stop()
    assert updater.told.is_set() and not updater.alive


def test_a_swap_is_noted_in_the_engines_thread(tmp_path: Path) -> None:
    """With the watch's new reference: what it has counted until then is of the version before."""
    learning, _ = with_versions(tmp_path, [Result(Verdict("better", 0.2, 50.0, 9), 1, 0.3, 0.5)])
    learning.watch.recent.extend([0.5] * 20)
    asked: list[Any] = []

    def later(action: Callable[[], None]) -> None:
        asked.append((learning.watch.floor, learning.serving))
        action()
        asked.append((learning.watch.floor, learning.serving))

    learning._post = later
    learning._update()
    assert asked == [(None, 0), (0.5, 1)]


def test_training_backs_off_when_it_does_not_help_and_comes_back(tmp_path: Path) -> None:
    learning, fake = with_versions(
        tmp_path,
        [
            Result(Verdict("undecided", 0.0, 1.0, 5), None, 0.3, 0.3),
            Result(Verdict("undecided", 0.0, 1.0, 6), None, 0.1, 0.3),
            Result(Verdict("undecided", 0.0, 1.0, 6), None, 0.3, 0.3),
            Result(Verdict("worse", -0.2, 1.0, 9), None, 0.3, 0.3),
            Result(Verdict("better", 0.005, 50.0, 9), 1, 0.3, 0.305),  # by a hair: it serves, and costs as much
            Result(Verdict("better", 0.2, 50.0, 9), None, 0.3, 0.5, error="no room"),
            Result(Verdict("better", 0.2, 50.0, 9), 1, 0.4, 0.6),
            Result(Verdict("better", 0.2, 50.0, 9), 1, 0.3, 0.4),
            Result(Verdict("undecided", 0.0, 1.0, 9), None, 0.3, 0.3),
        ],
    )
    due: list[bool] = []
    for _ in range(9):
        learning.buffer.new = 100  # twice the update size
        due.append(learning._due())
        learning._update()
    # Cold: a gate of too few requests says nothing; one that gains. Three updates that did not help, one that did, to
    # where it is not cold; one that leaves it cold, without a bound for the next.
    assert fake.shares == pytest.approx([1.0, 1.0, 1.0, 0.05, 0.025, 0.0125, 0.0125, 0.1, 1.0])
    assert due == [True, True, True, True, False, False, False, True, True]
    assert not learning.cold
    tally = learning.tally
    assert (tally.undecided, tally.refusals, tally.swaps, tally.failures) == (4, 1, 3, 1)
    assert learning.draft.version == 1


def test_a_cold_drafts_first_updates_wait_for_less() -> None:
    pace = Pace(update_size=400)
    assert [pace.size(cold=True, updates=updates, backoff=1) for updates in range(4)] == [100, 200, 400, 400]
    assert [pace.size(cold=False, updates=0, backoff=backoff) for backoff in (1, 4)] == [400, 1600]


def test_paused_learning_is_not_due_and_time_alone_makes_it_due(tmp_path: Path) -> None:
    learning, fake = with_versions(tmp_path, [])
    learning.cold = False
    learning.buffer.new = 40
    assert not learning._due()
    learning._last -= 2e9
    assert learning._due()
    learning.pause()
    assert not learning._due() and fake.held
    learning.ask_roll_back()  # what runs may end
    assert not fake.held
    learning._look_back()
    assert fake.held
    learning.resume()
    assert learning._due() and not fake.held


def test_an_update_waits_until_the_gate_could_decide(tmp_path: Path) -> None:
    learning, _ = with_versions(tmp_path, [])
    learning.buffer.new = 10**6
    assert learning._due()
    learning.buffer.held["gate"].pop()
    assert not learning._due()
    learning._last -= 2e9
    assert not learning._due()
    learning.force()
    assert learning._due()
    with pytest.raises(RecipeError, match="at least 6 requests"):
        learning_of(llama(), learning.draft, tmp_path / "few", buffer=Buffer(held_out=5))


def test_a_reduced_head_follows_the_traffic(tmp_path: Path) -> None:
    """In the draft that serves, before the update that trains on it; tokens that nobody uses leave."""
    learning, fake = with_versions(tmp_path, [Result(Verdict("undecided", 0.0, 1.0, 9))] * 2)
    learning.draft.restrict(torch.arange(10))
    ids_NK = np.tile(np.array([[3, 40, 41]], np.int32), (6, 1))
    mass = np.log(np.tile(np.array([[0.5, 0.3, 0.1]]), (6, 1))).astype(np.float16)
    trace = replace(
        small_trace(50, "train"), positions=np.arange(1, 7, dtype=np.int32), ids_NK=ids_NK, logprobs_NK=mass
    )
    learning.buffer._file(trace)
    learning._update()
    ids_D = learning.draft.ids_D
    assert ids_D is not None and len(ids_D) == 10 and {3, 40, 41} <= set(ids_D.tolist())
    assert fake.jobs[0].ids.tolist() == ids_D.tolist() and learning.tally.reranks == 1
    learning._update()
    assert learning.tally.reranks == 1  # as it is, it is the best
