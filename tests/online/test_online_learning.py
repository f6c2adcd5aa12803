"""A draft that learns beside the service, whole, and what is put in place of what, when."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from online_helpers import GREEDY, VOCABULARY, all_traces, llama, prompts, saved, submit_all

from limbeck.decoding import Sampling, generate
from limbeck.decoding.controller import Fixed
from limbeck.decoding.drafts.layers import layers_draft
from limbeck.decoding.requests import Observed, Request
from limbeck.decoding.speculative import Engine
from limbeck.errors import CheckpointError, RecipeError, RolloutError
from limbeck.online import (
    Buffer,
    Learning,
    ModelLearner,
    Pace,
    Service,
    Trace,
    Training,
    Version,
    Watch,
    model_learner,
)
from limbeck.online.buffer import Role
from limbeck.online.coins import HeldOut
from limbeck.online.gate import Gate, Verdict
from limbeck.online.updater import Result, Worker
from limbeck.online.versions import Versions


def _learning(model: Any, draft: Any, folder: Path, **changes: Any) -> Learning:
    build = partial(model_learner, saved(model, folder / "model"), layers=[0])
    training = Training(learning_rate=3e-3, epochs=4)
    pace = Pace(update_size=10**9, update_seconds=1e9)
    settings = {"buffer": Buffer(positions="all"), "training": training, "pace": pace, **changes}
    return Learning(draft, build, folder / "versions", **settings)


def _traffic(service: Service, count: int, start: int = 0, **changes: Any) -> None:
    texts = prompts(count, seed=start + 1)
    submit_all(service, Sampling(32), texts, start=start, **changes).wait(60)


def _until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_the_whole_learns_while_it_serves(tmp_path: Path) -> None:
    """Service, engine, buffer, updater, gate, swap; then the updater is killed, and another goes on."""
    model = llama(scale=0.2)
    engine = Engine(model, None, {"cut": layers_draft(model, [0])}, Fixed("cut", 3), max_batch=4)
    learning, texts = _learning(model, engine.drafts["cut"], tmp_path), prompts(4, seed=99)
    draft: Any = engine.drafts["cut"]
    expected = [one.tokens for one in generate(model, [list(text) for text in texts], replace(GREEDY, max_tokens=80))]

    def numbers() -> dict[str, Any]:
        return service.snapshot()["drafts"]["cut"]

    with Service(engine, learning={"cut": learning}, held_out=HeldOut(warm_share=0.6, warm_requests=64)) as service:
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
        _until(lambda: numbers()["swaps"] == 1)
        seen = numbers()
        assert draft.version == 1 and learning.versions.newest() == 1
        assert [mark["kind"] for mark in service.snapshot()["marks"]] == ["update", "swap"]
        _traffic(service, 30, start=100)
        after = numbers()
        old_alpha = before["alpha_sum"] / before["verified"]
        new_alpha = (after["alpha_sum"] - seen["alpha_sum"]) / (after["verified"] - seen["verified"])
        assert new_alpha > old_alpha + 0.01, (old_alpha, new_alpha)

        assert learning.updater.process.pid is not None
        os.kill(learning.updater.process.pid, signal.SIGKILL)
        service.force_update()
        _traffic(service, 8, start=200)  # serving goes on
        _until(lambda: numbers()["updates"] == 2)
        assert numbers()["restarts"] == 1
    assert learning.updater.process.exitcode == 0  # an updater that waits for work goes by itself, it is not killed


def test_a_request_teaches_the_draft_that_serves_it(tmp_path: Path) -> None:
    model = llama()
    drafts = {name: layers_draft(model, [0]) for name in ("cut", "other")}
    engine = Engine(model, None, drafts, Fixed("cut", 3), max_batch=4)
    learning = _learning(model, drafts["cut"], tmp_path)
    learning.updater = _Fake([])  # pyright: ignore
    with Service(engine, learning={"cut": learning}) as service:
        for start, route in ((0, "other"), (10, "cut"), (20, None)):
            submit_all(service, Sampling(10), prompts(2), start=start, route=route).wait()
    assert {trace.id for trace in all_traces(learning.buffer)} == {"r10", "r11", "r20", "r21"}


class _Fake:
    """An updater that answers at once, as told; what it is asked is kept."""

    def __init__(self, results: list[Any]) -> None:
        self.results, self.jobs, self.worked, self.restarts = results, [], 0.0, 0
        self.shares: list[float] = []

    def run(self, job: Any) -> Any:
        self.jobs.append(job)
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    def set_share(self, share: float) -> None:
        self.shares.append(share)

    def set_busy(self, busy: bool) -> None: ...

    def ready(self) -> None: ...

    def end(self) -> None: ...


class _Here(_Fake):
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
    learning = _learning(model, engine.drafts["cut"], folder)
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
            _until(lambda back=back: learning.tally.rollbacks == back)
            assert _is_version(draft, learning, number)
        with pytest.raises(RolloutError, match="before"):
            first.roll_back()
        _until(lambda: learning.versions.numbers() == [0])
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
    learning = _learning(model, engine.drafts["cut"], tmp_path, watch=Watch(least=1))
    learning.updater = _Fake([])  # pyright: ignore
    with Service(engine, learning={"cut": learning}, held_out=HeldOut(warm_share=1.0)) as service:
        submit_all(service, Sampling(24), prompts(8), train=False).wait()
        assert not all_traces(learning.buffer) and learning.buffer.bytes == 0
        assert not learning.watch.recent and not learning._seen
        submit_all(service, Sampling(24), prompts(8), start=20).wait()
        assert {trace.id for trace in all_traces(learning.buffer)} == {f"r{place}" for place in range(20, 28)}
        assert len(learning.watch.recent) == 8
    assert not (tmp_path / "versions").exists()


@pytest.mark.parametrize("broken", ["observe", "close"])
def test_an_error_of_the_learning_ends_the_learning_alone(tmp_path: Path, broken: str) -> None:
    model = llama()
    engine = Engine(model, None, {"cut": layers_draft(model, [0])}, Fixed("cut", 3), max_batch=4)
    learning = _learning(model, engine.drafts["cut"], tmp_path)
    learning.updater = _Fake([])  # pyright: ignore
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
    learning, fake = _with_versions(tmp_path / "raises", [better])
    learning.draft.prepare = lambda *_: 1 / 0  # pyright: ignore
    with pytest.raises(ZeroDivisionError):
        learning._update()
    assert learning.tally.swaps == 0 and learning.versions.numbers() == [0] and learning.serving == 0
    assert learning.watch.floor is None

    learning, fake = _with_versions(tmp_path / "ended", [better])
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
    learning = _learning(model, engine.drafts["cut"], tmp_path)
    learning.updater = _Fake([])  # pyright: ignore
    service = Service(engine, learning={"cut": learning})
    service._turn = lambda: 1 / 0  # pyright: ignore
    service.start()
    _until(lambda: service.failure is not None, 5)
    learning._thread.join(5)
    assert not learning._thread.is_alive()
    service.stop()


def test_a_swap_is_noted_in_the_engines_thread(tmp_path: Path) -> None:
    """With the watch's new reference: what it has counted until then is of the version before."""
    learning, _ = _with_versions(tmp_path, [Result(Verdict("better", 0.2, 50.0, 9), 1, 0.3, 0.5)])
    learning.watch.recent.extend([0.5] * 20)
    asked: list[Any] = []

    def later(action: Callable[[], None]) -> None:
        asked.append((learning.watch.floor, learning.serving))
        action()
        asked.append((learning.watch.floor, learning.serving))

    learning._post = later
    learning._update()
    assert asked == [(None, 0), (0.5, 1)]


def _with_versions(folder: Path, results: list[Any]) -> tuple[Learning, Any]:
    """Learning with two versions on disk and an updater that answers so; no thread, no engine."""
    draft = layers_draft(llama(), [0])
    draft.bind(VOCABULARY)
    learning = _learning(llama(), draft, folder, pace=Pace(update_size=50, update_seconds=1e9))
    weights = {name: weight.detach() for name, weight in ModelLearner(llama(layers=1)).trained().items()}
    for number in (0, 1):
        learning.versions.save(Version(number, {name: weight + number for name, weight in weights.items()}))
    fake = _Fake(results)
    learning.updater = fake  # pyright: ignore
    learning.buffer.traces.append(_trace(1, "train"))
    learning.buffer.held["gate"].extend(_trace(2 + place) for place in range(learning.gate.least))
    return learning, fake


def test_training_backs_off_when_it_does_not_help_and_comes_back(tmp_path: Path) -> None:
    learning, fake = _with_versions(
        tmp_path,
        [
            Result(Verdict("undecided", 0.0, 1.0, 5), None, 0.3, 0.3),
            Result(Verdict("undecided", 0.0, 1.0, 6), None, 0.1, 0.3),
            Result(Verdict("undecided", 0.0, 1.0, 6), None, 0.3, 0.3),
            Result(Verdict("worse", -0.2, 1.0, 9), None, 0.3, 0.3),
            Result(Verdict("better", 0.005, 50.0, 9), 1, 0.3, 0.305),
            Result(Verdict("better", 0.2, 50.0, 9), None, 0.3, 0.5, error="no room"),
            Result(Verdict("better", 0.2, 50.0, 9), 1, 0.3, 0.5),
        ],
    )
    due: list[bool] = []
    for _ in range(7):
        learning.buffer.new = 100  # twice the update size
        due.append(learning._due())
        learning._update()
    # Cold: a gate of too few requests says nothing; one that gains. Two updates that did not help, one that did.
    assert fake.shares == pytest.approx([1.0, 1.0, 1.0, 0.05, 0.025, 0.1, 0.1])
    assert due == [True, True, True, True, False, True, True]
    assert learning.cold  # the last gained much: the cap is lifted
    tally = learning.tally
    assert (tally.undecided, tally.refusals, tally.swaps, tally.failures) == (3, 1, 2, 1)
    assert learning.draft.version == 1


def test_paused_learning_is_not_due_and_time_alone_makes_it_due(tmp_path: Path) -> None:
    learning, _ = _with_versions(tmp_path, [])
    learning.buffer.new = 40
    assert not learning._due()
    learning._last -= 2e9
    assert learning._due()
    learning.pause()
    assert not learning._due()


def test_an_update_waits_until_the_gate_could_decide(tmp_path: Path) -> None:
    learning, _ = _with_versions(tmp_path, [])
    learning.buffer.new = 10**6
    assert learning._due()
    learning.buffer.held["gate"].pop()
    assert not learning._due()
    learning._last -= 2e9
    assert not learning._due()
    learning.force()
    assert learning._due()
    with pytest.raises(RecipeError, match="at least 6 requests"):
        _learning(llama(), learning.draft, tmp_path / "few", buffer=Buffer(held_out=5))


def test_a_fall_of_live_acceptance_rolls_back_unless_the_traffic_changed(tmp_path: Path) -> None:
    for gain, back in ((0.05, True), (-0.05, False)):
        learning, fake = _with_versions(tmp_path / str(back), [Result(Verdict("undecided", gain, 1.0, 5))])
        learning.serving = 1
        learning._swapped_at = 1

        def requests(alpha: float, count: int, learning: Learning = learning) -> None:
            for place in range(count):
                request = Request(f"{alpha}-{place}", (1,), Sampling(4))
                raw = alpha + 0.001 * (place % 7)
                # Of the version before, and by another draft: neither counts.
                for version, own, value in ((0, True, 1 - raw), (1, False, 1 - raw), (1, True, raw)):
                    many: Any = ((2,) * 20, 20, (0.0,) * 20, (value,) * 20)  # drafted, accepted, alpha, alpha_raw
                    shown = Observed(request, [1] * 21, 1, torch.zeros(20, VOCABULARY), *many, version=version)
                    learning.observe(shown, own=own)
                learning.close(request)

        requests(0.6, 64)
        learning.watch.swapped()
        requests(0.6, 40)
        assert not learning._doubt
        requests(0.2, 20)
        assert learning._doubt
        learning._look_back()
        assert fake.jobs[0].other == 0 and learning.tally.rollbacks == int(back)
        assert learning.serving == (0 if back else 1)
        assert learning.versions.numbers() == ([0] if back else [0, 1])


def test_without_a_comparison_it_rolls_back_and_says_so(tmp_path: Path) -> None:
    for answer in (CheckpointError("not whole"), Result(Verdict("undecided", 0.0, 1.0, 0), error="not whole")):
        learning, _ = _with_versions(tmp_path / type(answer).__name__, [answer])
        learning.serving, learning._doubt = 1, True
        learning._look_back()
        assert learning.serving == 0 and learning.tally.rollbacks == 1
        assert (learning.tally.failures, learning.tally.last_error) == (1, "CheckpointError: not whole")


def _trace(number: int, role: Role = "gate") -> Trace:
    one = np.zeros((1, 2), np.float16)
    position = np.array([2], np.int32)
    return Trace(number, "t", np.array([1, 2, 3], np.int32), position, one, one, one[:, 0], role, time.time() + 99)
