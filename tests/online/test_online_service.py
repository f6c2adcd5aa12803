"""The service: requests from any thread, numbers that add up, and a draft that learns beside it, whole."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from online_helpers import VOCABULARY, Listener, all_traces, llama, prompts, saved

from limbeck.decoding import Sampling, generate
from limbeck.decoding.controller import Fixed
from limbeck.decoding.drafts.layers import layers_draft
from limbeck.decoding.requests import Counters, Request
from limbeck.decoding.speculative import Engine
from limbeck.errors import CheckpointError, RolloutError
from limbeck.online import (
    Buffer,
    Learning,
    ModelLearner,
    Pace,
    Routing,
    Service,
    Trace,
    Training,
    Version,
    Watch,
    model_learner,
)
from limbeck.online.buffer import Role
from limbeck.online.gate import Verdict
from limbeck.online.updater import Result

GREEDY = Sampling(20, temperature=0.0)


def _service(model: Any = None, *, drafts: int = 1, gamma: int = 3, **changes: Any) -> Service:
    model = model or llama()
    named = {name: layers_draft(model, [0]) for name in ("cut", "other")[:drafts]}
    engine = Engine(model, None, named, Fixed("cut" if drafts else None, gamma), max_batch=4)
    return Service(engine, **changes)


def _submit_all(service: Service, sampling: Sampling, texts: list[Any], start: int = 0, **changes: Any) -> Listener:
    listener = Listener()
    for place, text in enumerate(texts, start):
        request = Request(f"r{place}", text, replace(sampling, seed=place), (place,), **changes)
        service.submit(request, listener.expect(request.id))
    return listener


def test_it_serves_what_plain_decoding_writes() -> None:
    model, texts = llama(), prompts(12)
    with _service(model) as service:
        listener = _submit_all(service, GREEDY, texts)
        listener.wait()
    expected = generate(model, [list(text) for text in texts], GREEDY)
    assert [listener.tokens(f"r{place}") for place in range(12)] == [one.tokens for one in expected]
    assert listener.threads == {service._thread.ident}
    for events in listener.events.values():
        assert [event.finish_reason is None for event in events] == [True] * (len(events) - 1) + [False]


def test_the_numbers_add_up() -> None:
    with _service(plain_every=5) as service:
        listener = _submit_all(service, Sampling(30), prompts(20))
        time.sleep(0.3)
        listener.wait()
        time.sleep(0.7)
        seen = service.snapshot()
    spent = sum(seconds for name, seconds in seen["ledger"].items() if name != "training")
    assert spent == pytest.approx(seen["wall_s"], abs=0.6)  # the wait of this moment is not counted yet
    spent = sum(service.ledger.seconds(service.engine.seconds).values())
    ended = service.ledger.started + spent
    assert abs(time.perf_counter() - ended) < 0.1
    counts, draft = list(listener.events.values()), seen["drafts"]["cut"]
    finals = [events[-1].counters for events in counts]
    assert seen["tokens"] == sum(len(listener.tokens(id)) for id in listener.events) == seen["finished"] * 30 == 600
    assert draft["verified"] == sum(one.verified for one in finals if one)
    assert draft["accepted"] == sum(one.accepted for one in finals if one) == sum(draft["kept"])
    assert draft["alpha_sum"] == pytest.approx(sum(one.alpha_sum for one in finals if one))
    assert sum(draft["lengths"]) == draft["proposals"]
    assert sum(n * count for n, count in enumerate(draft["lengths"])) == draft["accepted"]
    assert seen["speedup"] is not None and 0 < seen["speedup"] < 5 and seen["plain_tokens_per_s"] > 0
    plain = sum(sample.rounds for sample in service.ledger.plain.values())
    drafted = sum(sample.rounds for sample in service.ledger.drafted.values())
    assert 0.1 < plain / (plain + drafted) < 0.35  # one in five, and the ends of requests
    assert seen["history"] and seen["running"] == seen["waiting"] == 0


def test_cancelled_requests_and_listeners_that_raise_harm_nobody() -> None:
    def broken(event: Any) -> None:
        raise ValueError("on_event")

    with _service() as service:
        listener = _submit_all(service, Sampling(80), prompts(6))
        service.submit(Request("broken", (1, 2), Sampling(80)), broken)
        service.cancel("r1")
        service.cancel("nobody")
        listener.wait()
        more = _submit_all(service, GREEDY, prompts(3), start=50)
        more.wait()
        assert not service._open
    reasons = [events[-1].finish_reason for events in listener.events.values()]
    assert reasons == ["length", "cancelled", *["length"] * 4]


def test_refusals() -> None:
    with _service() as service:
        listener = Listener()
        service.submit(Request("a", (1, 2), Sampling(60)), listener.expect("a"))
        with pytest.raises(RolloutError, match="new id"):
            service.submit(Request("a", (1, 2), Sampling(4)), listener.receive)
        with pytest.raises(RolloutError, match="route"):
            service.submit(Request("b", (1, 2), Sampling(4), route="nobody"), listener.receive)
        with pytest.raises(RolloutError, match="learns"):
            service.force_update()
        assert "b" not in service._open
        listener.wait()
    with pytest.raises(RolloutError, match="stopped"):
        service.submit(Request("c", (1, 2), Sampling(4)), listener.receive)
    with pytest.raises(RolloutError, match="name one of them"):
        Service(service.engine, learning={"nobody": None})  # pyright: ignore[reportArgumentType]


def test_a_broken_round_tells_everybody() -> None:
    service = _service()
    service.engine.controller.plan = lambda rows: 1 / 0  # pyright: ignore
    with service:
        listener = _submit_all(service, Sampling(10), prompts(6))
        listener.wait()
        assert "ZeroDivisionError" in service.snapshot()["failure"]
        with pytest.raises(RolloutError, match="ZeroDivisionError"):
            service.submit(Request("z", (1,), Sampling(2)), listener.receive)
    assert {events[-1].finish_reason for events in listener.events.values()} == {"error"}


def test_stopping_cancels_what_is_open() -> None:
    with _service() as service:
        listener = _submit_all(service, Sampling(80), prompts(10))
    listener.wait(1)
    assert "cancelled" in {events[-1].finish_reason for events in listener.events.values()}


def test_tags_choose_drafts() -> None:
    service = _service(drafts=2, routing=Routing(["cut", "other"], {"sql": "other"}))
    with service:
        _submit_all(service, Sampling(10), prompts(4), route="sql").wait()
        _submit_all(service, Sampling(10), prompts(2), start=10).wait()
    drafted = {name: counts.proposals for name, counts in service.counts.items()}
    assert drafted["other"] > drafted["cut"] > 0


# -- learning ----------------------------------------------------------------------------------------------------


def _learning(model: Any, draft: Any, folder: Path, **changes: Any) -> Learning:
    build = partial(model_learner, saved(model, folder / "model"), layers=[0])
    training = Training(learning_rate=3e-3, epochs=4)
    pace = Pace(update_size=10**9, update_seconds=1e9)
    settings = {"buffer": Buffer(positions="all"), "training": training, "pace": pace, **changes}
    return Learning(draft, build, folder / "versions", **settings)


def _traffic(service: Service, count: int, start: int = 0, **changes: Any) -> None:
    texts = prompts(count, seed=start + 1)
    _submit_all(service, Sampling(32), texts, start=start, **changes).wait(60)


def _until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_the_whole_learns_while_it_serves(tmp_path: Path) -> None:
    """Service, engine, buffer, updater's process, gate, swap; then the process is killed; back; restart."""
    model = llama(scale=0.2)
    engine = Engine(model, None, {"cut": layers_draft(model, [0])}, Fixed("cut", 3), max_batch=4)
    learning, texts = _learning(model, engine.drafts["cut"], tmp_path), prompts(4, seed=99)
    draft: Any = engine.drafts["cut"]
    expected = [one.tokens for one in generate(model, [list(text) for text in texts], replace(GREEDY, max_tokens=80))]

    def numbers() -> dict[str, Any]:
        return service.snapshot()["drafts"]["cut"]

    with Service(engine, learning={"cut": learning}, warm_share=0.6) as service:
        _traffic(service, 60)
        assert learning.buffer.new > 300
        service.force_update()
        running = threading.Event()

        def stream() -> None:  # greedy requests across the swap
            while not running.is_set():
                written = _submit_all(service, replace(GREEDY, max_tokens=80), texts)
                written.wait(60)
                assert [written.tokens(f"r{place}") for place in range(4)] == expected

        thread = threading.Thread(target=stream)
        thread.start()
        _until(lambda: numbers()["updates"] == 1)
        running.set()
        thread.join()
        seen = numbers()
        assert seen["swaps"] == 1 and draft.version == 1 and learning.versions.newest() == 1
        assert [mark["kind"] for mark in service.snapshot()["marks"]] == ["update", "swap"]
        _traffic(service, 30, start=100)
        old, new = (sums[0] / sums[1] for sums in service.snapshot()["drafts"]["cut"]["by_version"].values())
        assert new > old + 0.01, (old, new)

        assert learning.updater.process.pid is not None
        os.kill(learning.updater.process.pid, signal.SIGKILL)
        service.force_update()
        _traffic(service, 8, start=200)  # serving goes on
        _until(lambda: numbers()["updates"] == 2)
        assert numbers()["restarts"] == 1

        serving = draft.version
        service.roll_back("cut")
        _until(lambda: numbers()["rollbacks"] == 1)
        assert draft.version == serving - 1
        if draft.version:
            service.roll_back()
            _until(lambda: numbers()["rollbacks"] == 2)
        with pytest.raises(RolloutError, match="before"):
            service.roll_back()
        assert learning.versions.newest() == 0
        own = dict(draft.reader.model.named_parameters())  # pyright: ignore
        assert all(torch.equal(own[name], weight) for name, weight in learning.versions.weights(0).items())
        swaps = numbers()["swaps"]
        service.force_update()
        _until(lambda: numbers()["swaps"] > swaps)
        served = learning.serving
        assert served >= 2 and served not in (1, serving)  # no number is given twice

    again = Engine(model, None, {"cut": layers_draft(model, [0])}, Fixed("cut", 3), max_batch=4)
    learning = _learning(model, again.drafts["cut"], tmp_path)
    with Service(again, learning={"cut": learning}):
        assert again.drafts["cut"].version == served == learning.serving
    other = llama(scale=0.2, seed=5)
    third = Engine(other, None, {"cut": layers_draft(other, [0])}, Fixed("cut", 3), max_batch=4)
    foreign = _learning(other, third.drafts["cut"], tmp_path)
    with pytest.raises(CheckpointError, match="another"):
        Service(third, learning={"cut": foreign}).start()
    foreign.stop()


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


def test_a_request_that_says_no_is_nowhere(tmp_path: Path) -> None:
    model = llama()
    engine = Engine(model, None, {"cut": layers_draft(model, [0])}, Fixed("cut", 3), max_batch=4)
    learning = _learning(model, engine.drafts["cut"], tmp_path, watch=Watch(least=1))
    learning.updater = _Fake([])  # pyright: ignore
    with Service(engine, learning={"cut": learning}, warm_share=1.0) as service:
        _submit_all(service, Sampling(24), prompts(8), train=False).wait()
        assert not all_traces(learning.buffer) and learning.buffer.bytes == 0
        assert not learning.watch.recent and not learning._started
        _submit_all(service, Sampling(24), prompts(8), start=20).wait()
        assert {trace.id for trace in all_traces(learning.buffer)} == {f"r{place}" for place in range(20, 28)}
        assert len(learning.watch.recent) == 8
    assert not (tmp_path / "versions").exists()


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
    return learning, fake


def test_training_backs_off_when_it_does_not_help_and_comes_back(tmp_path: Path) -> None:
    learning, fake = _with_versions(
        tmp_path,
        [
            Result(Verdict("undecided", 0.0, 1.0, 3), None, 0.1, 0.3),
            Result(Verdict("undecided", 0.0, 1.0, 3), None, 0.3, 0.3),
            Result(Verdict("worse", -0.2, 1.0, 9), None, 0.3, 0.3),
            Result(Verdict("better", 0.01, 50.0, 9), 1, 0.3, 0.31),
            Result(Verdict("better", 0.2, 50.0, 9), None, 0.3, 0.5, error="no room"),
            Result(Verdict("better", 0.2, 50.0, 9), 1, 0.3, 0.5),
        ],
    )
    due: list[bool] = []
    for _ in range(6):
        learning.buffer.new = 100  # twice the update size
        due.append(learning._due())
        learning._update()
    # Cold, cold, two updates that did not help, one that did.
    assert fake.shares == pytest.approx([1.0, 1.0, 0.05, 0.025, 0.1, 0.1])
    assert due == [True, True, True, False, True, True]
    assert learning.cold  # the last gained much: the cap is lifted
    tally = learning.tally
    assert (tally.undecided, tally.refusals, tally.swaps, tally.failures) == (2, 1, 2, 1)
    assert learning.draft.version == 1


def test_paused_learning_is_not_due_and_time_alone_makes_it_due(tmp_path: Path) -> None:
    learning, _ = _with_versions(tmp_path, [])
    learning.buffer.new = 40
    assert not learning._due()
    learning._last -= 2e9
    assert learning._due()
    learning.pause()
    assert not learning._due()


def test_a_fall_of_live_acceptance_rolls_back_unless_the_traffic_changed(tmp_path: Path) -> None:
    for gain, back in ((0.05, True), (-0.05, False)):
        learning, fake = _with_versions(tmp_path / str(back), [Result(Verdict("undecided", gain, 1.0, 5))])
        learning.serving = 1
        learning.buffer.held["gate"].append(_trace(5))

        def requests(alpha: float, count: int, learning: Learning = learning) -> None:
            for place in range(count):
                request = Request(f"{alpha}-{place}", (1,), Sampling(4))
                learning._started[request.id] = 1
                learning.close(request, Counters(verified=20, alpha_sum=20 * (alpha + 0.001 * (place % 7))))

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


def _trace(number: int, role: Role = "gate") -> Trace:
    one = np.zeros((1, 2), np.float16)
    position = np.array([2], np.int32)
    return Trace(number, "t", np.array([1, 2, 3], np.int32), position, one, one, one[:, 0], role, time.time() + 99)
