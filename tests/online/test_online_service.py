"""The service: requests from any thread, numbers that add up, and a draft that learns beside it, whole."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from online_helpers import GREEDY, FakeUpdater, Listener, learning_of, llama, prompts, submit_all

from limbeck.decoding import FeatureDraft, FeatureNet, Sampling, feature_shape, generate
from limbeck.decoding.controller import Fixed, Round
from limbeck.decoding.drafts.layers import layers_draft
from limbeck.decoding.requests import Observed, Request
from limbeck.decoding.speculative import Engine
from limbeck.errors import RolloutError
from limbeck.online import Buffer, Routing, Service
from limbeck.online.coins import HeldOut
from limbeck.online.ledger import Ledger, Watched
from limbeck.online.service import ServiceEnded


def _service(model: Any = None, *, drafts: int = 1, gamma: int = 3, **changes: Any) -> Service:
    model = model or llama()
    named = {name: layers_draft(model, [0]) for name in ("cut", "other")[:drafts]}
    engine = Engine(model, None, named, Fixed("cut" if drafts else None, gamma), max_batch=4)
    return Service(engine, **changes)


def test_it_serves_what_plain_decoding_writes() -> None:
    model, texts = llama(), prompts(12)
    with _service(model) as service:
        listener = submit_all(service, GREEDY, texts)
        listener.wait()
    expected = generate(model, [list(text) for text in texts], GREEDY)
    assert [listener.tokens(f"r{place}") for place in range(12)] == [one.tokens for one in expected]
    assert listener.threads == {service._thread.ident}
    for events in listener.events.values():
        assert [event.finish_reason is None for event in events] == [True] * (len(events) - 1) + [False]


def test_the_numbers_add_up() -> None:
    with _service(plain_every=5) as service:
        listener = submit_all(service, Sampling(30), prompts(20))
        time.sleep(0.3)
        listener.wait()
        time.sleep(0.7)
        seen = service.snapshot()
    spent = sum(seconds for name, seconds in seen["ledger"].items() if name != "training")
    assert spent == pytest.approx(seen["wall_s"], abs=0.05) and seen["ledger"]["idle"] > 0.6
    counts, draft = list(listener.events.values()), seen["drafts"]["cut"]
    finals = [events[-1].counters for events in counts]
    assert seen["tokens"] == sum(len(listener.tokens(id)) for id in listener.events) == 600
    assert draft["verified"] == sum(one.verified for one in finals if one)
    assert draft["accepted"] == sum(one.accepted for one in finals if one) == sum(draft["kept"])
    assert draft["alpha_sum"] == pytest.approx(sum(one.alpha_sum for one in finals if one))
    assert sum(draft["lengths"]) == draft["proposals"]
    assert sum(n * count for n, count in enumerate(draft["lengths"])) == draft["accepted"]
    assert seen["speedup"] is not None and 0 < seen["speedup"] < 5 and seen["plain_tokens_per_s"] > 0
    plain, served = (
        sum(sample.rounds for sample in kind.values()) for kind in (service.ledger.plain, service.ledger.served)
    )
    assert 0.1 < plain / served < 0.35  # one in five, and the ends of requests
    assert seen["running"] == seen["waiting"] == 0


def test_cancelled_requests_and_listeners_that_raise_harm_nobody() -> None:
    def broken(event: Any) -> None:
        raise ValueError("on_event")

    with _service() as service:
        listener = submit_all(service, Sampling(80), prompts(6))
        service.submit(Request("broken", (1, 2), Sampling(80)), broken)
        service.cancel("r1")
        service.cancel("nobody")
        listener.wait()
        more = submit_all(service, GREEDY, prompts(3), start=50)
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
    with pytest.raises(ServiceEnded, match="stopped"):
        service.submit(Request("c", (1, 2), Sampling(4)), listener.receive)
    with pytest.raises(RolloutError, match="name one of them"):
        Service(service.engine, learning={"nobody": None})  # pyright: ignore[reportArgumentType]


def test_a_broken_round_tells_everybody() -> None:
    service, submitted = _service(), threading.Event()
    service.engine.controller.plan = lambda rows: submitted.wait(5) / 0  # pyright: ignore
    with service:
        listener = submit_all(service, Sampling(10), prompts(6))
        submitted.set()
        listener.wait()
        assert "ZeroDivisionError" in service.snapshot()["failure"]
        with pytest.raises(RolloutError, match="ZeroDivisionError"):
            service.submit(Request("z", (1,), Sampling(2)), listener.receive)
    assert {events[-1].finish_reason for events in listener.events.values()} == {"error"}


def test_an_error_beside_the_engine_ends_the_service_with_a_word() -> None:
    """Not in `step`, but in what is done with its events: nobody is left waiting, nothing hangs."""
    service, submitted = _service(), threading.Event()
    with service:
        service.routing.record = lambda *_: submitted.wait(5) / 0  # pyright: ignore
        listener = submit_all(service, Sampling(10), prompts(6), route="cut")
        submitted.set()
        listener.wait()
        assert "ZeroDivisionError" in service.snapshot()["failure"]
        with pytest.raises(RolloutError, match="ZeroDivisionError"):
            service.submit(Request("z", (1,), Sampling(2)), listener.receive)
    assert {events[-1].finish_reason for events in listener.events.values()} <= {"error", "length"}


def test_stopping_cancels_what_is_open() -> None:
    with _service() as service:
        listener = submit_all(service, Sampling(80), prompts(10))
    listener.wait(1)
    assert "cancelled" in {events[-1].finish_reason for events in listener.events.values()}


def test_tags_choose_drafts() -> None:
    service = _service(drafts=2, routing=Routing(["cut", "other"], {"sql": "other"}))
    with service:
        submit_all(service, Sampling(10), prompts(4), route="sql").wait()
        submit_all(service, Sampling(10), prompts(2), start=10).wait()
    drafted = {name: counts.proposals for name, counts in service.counts.items()}
    assert drafted["other"] > drafted["cut"] > 0


def _round(rows: int, tokens: int, seconds: float, drafting: float) -> Round:
    return Round(rows, 1, tokens, seconds, 0.0, {"cut": drafting} if drafting else {}, {})


def test_speedup_is_of_rounds_with_as_many_requests() -> None:
    """With 2 requests: plainly 10 tokens in 2 s, in all 30 in 3 s; 3 requests were never decoded plainly, 4 always."""
    ledger = Ledger(decay=1.0)
    for rows, tokens, seconds, drafting in ((2, 20, 1.0, 0.1), (2, 10, 2.0, 0.0), (3, 50, 1.0, 0.1)):
        ledger.add_round(_round(rows, tokens, seconds, drafting), alone=True)
    assert ledger.speedup == pytest.approx(30 * 0.2 / 3)
    ledger.add_round(_round(4, 50, 9.0, 0.0), alone=True)
    assert ledger.speedup == pytest.approx((30 * 0.2 + 9) / 12)
    assert ledger.plain_tokens_per_s == pytest.approx(60 / 11)
    assert Ledger().speedup is None and Ledger().plain_tokens_per_s is None


def test_speedup_pays_for_training() -> None:
    """Everything takes twice as long while a draft is trained: decoded plainly or not, it counts as what it cost."""
    ledger = Ledger(decay=1.0)
    watched = Watched(Fixed("cut", 3), ledger, 0, lambda _: None, lambda: training.pop(0))
    training: list[bool] = []
    for drafting, seconds, trained in (
        (0.0, 1.0, [False, False]),
        (0.0, 2.0, [True, True]),
        (0.0, 2.0, [False, True]),  # it began, or ended, in the middle
        (0.0, 2.0, [True, False]),
        (0.1, 1.0, [True, True]),
    ):
        training += trained
        watched.plan([])
        watched.record(_round(1, 2 if drafting else 1, seconds, drafting))
    assert ledger.plain[1].rounds == 1 and ledger.served[1].rounds == 5
    assert ledger.speedup == pytest.approx(6 / 8)
    assert ledger.plain_tokens_per_s == pytest.approx(1.0)


def test_the_ledger_is_told_who_trains() -> None:
    """While somebody holds the turn to train, no plain round is one of plain decoding."""
    with _service(plain_every=2) as service:
        with service._trains:
            submit_all(service, GREEDY, prompts(4)).wait()
        assert service.ledger.served and not service.ledger.plain
        submit_all(service, GREEDY, prompts(4), start=10).wait()
        assert service.ledger.plain


def test_marks_of_one_kind_do_not_push_out_the_others() -> None:
    service = _service()
    service._mark("cut", "swap", 1)
    for _ in range(5000):
        service._mark("cut", "update", 1)
    service._mark("cut", "rollback", 0)
    marks = service.snapshot()["marks"]
    assert [marks[0]["kind"], marks[-1]["kind"]] == ["swap", "rollback"] and 100 < len(marks) < 500
    assert [mark["t"] for mark in marks] == sorted(mark["t"] for mark in marks)


class Pupil:
    """In the place of what learns: which requests have taught it."""

    training_s = 0.0
    buffer = Buffer()

    def __init__(self, *, hungry: bool) -> None:
        self.hungry = hungry
        self.taught: set[str] = set()
        self.whole: set[str] = set()  # of these, those that are held out

    def start(self, *_: Any) -> None: ...

    def stop(self) -> None: ...

    def give_up(self) -> None: ...

    def tell(self, *, busy: bool) -> None: ...

    def observe(self, row: Observed, *, own: bool) -> None:
        self.taught.add(row.request.id)
        if row.request.keep_all:
            self.whole.add(row.request.id)

    def close(self, request: Request) -> None: ...


def test_a_request_teaches_the_draft_that_it_is_routed_to_alone() -> None:
    """By its name, or as the main one of those that name none; or as the one that has been the fastest. More is held
    out for the one that has too little to judge by, none of the other's."""
    pupils: Any = {"cut": Pupil(hungry=False), "other": Pupil(hungry=True)}
    routing, held_out = Routing(["cut", "other"], main="cut", explore=0.0), HeldOut(share=0.0, hungry=1.0)
    with _service(drafts=2, routing=routing, learning=pupils, held_out=held_out) as service:
        submit_all(service, GREEDY, prompts(1), route="other").wait()
        submit_all(service, GREEDY, prompts(1), start=1).wait()
        submit_all(service, GREEDY, prompts(1), start=2, route="cut").wait()
        routing.learned = True
        routing.record(None, "cut", 10, 10.0)
        routing.record(None, "other", 10, 1e-6)
        submit_all(service, GREEDY, prompts(1), start=3).wait()
        assert service.counts["other"].proposals and service.counts["cut"].proposals
    assert {name: pupil.taught for name, pupil in pupils.items()} == {"cut": {"r1", "r2"}, "other": {"r0", "r3"}}
    assert pupils["other"].whole == {"r0", "r3"} and not pupils["cut"].whole


class Seen:
    """In the place of what learns: the hidden states that it is shown."""

    buffer, hungry = Buffer(), False

    def __init__(self) -> None:
        self.hidden: list[torch.Tensor | None] = []

    def observe(self, row: Observed, *, own: bool) -> None:
        self.hidden.append(row.hidden_TF)


def test_each_draft_learns_from_the_layers_that_it_reads() -> None:
    """Two drafts of other layers on one engine, and one that reads none."""
    model, taps = llama(), {"low": (0, 1), "high": (1, 2)}
    drafts = {name: FeatureDraft(FeatureNet(feature_shape(model, own)), model) for name, own in taps.items()}
    engine = Engine(model, None, {**drafts, "cut": layers_draft(model, [0])}, Fixed(None, 0), max_batch=4)
    learning: Any = {name: Seen() for name in engine.drafts}
    Service(engine, learning=learning)
    engine.add(Request("r", (5, 6, 7), Sampling(4, temperature=0.0)))
    while engine.busy:
        engine.step()
    assert set(learning["cut"].hidden) == {None}
    for name, own in taps.items():
        columns_TF = torch.cat(learning[name].hidden)
        with torch.no_grad():
            states = model(torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states
        expected_TF = torch.cat([states[tap][0] for tap in own], -1)
        assert torch.allclose(columns_TF[:3], expected_TF, atol=1e-5), name


def test_a_snapshot_has_the_training_of_now(tmp_path: Path) -> None:
    """Not that of the snapshot before."""
    model = llama()
    engine = Engine(model, None, {"cut": layers_draft(model, [0])}, Fixed("cut", 3), max_batch=4)
    learning = learning_of(model, engine.drafts["cut"], tmp_path)
    fake = learning.updater = FakeUpdater([])  # pyright: ignore
    service = Service(engine, learning={"cut": learning})
    for worked in (1.5, 4.0):
        fake.worked = worked
        assert service.snapshot()["ledger"]["training"] == worked
