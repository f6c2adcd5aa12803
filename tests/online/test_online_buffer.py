"""What the buffer keeps: the right distribution at the right index, nothing that it must not, nothing for too long."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from online_helpers import VOCABULARY, all_traces, llama, prompts, record, show, target_logprobs

from limbeck.decoding import Sampling
from limbeck.decoding.controller import Fixed
from limbeck.decoding.drafts.layers import layers_draft
from limbeck.decoding.drafts.model import ModelDraft
from limbeck.decoding.requests import Observed, Request
from limbeck.decoding.speculative import Engine
from limbeck.models import cut_layers
from limbeck.online import Buffer


@pytest.mark.parametrize("positions", ["rejected", "all"])
def test_each_position_holds_the_distribution_that_its_token_is_drawn_from(positions: Any) -> None:
    """Against a plain forward of transformers over the whole text."""
    model, buffer = llama(), Buffer(positions=positions, top=VOCABULARY)
    texts, seen = record(model, layers_draft(model, [0]), buffer, prompts(9))
    assert len(buffer.traces) == 9
    for trace in buffer.traces:
        text = texts[trace.id]
        assert trace.tokens.tolist() == text[: len(trace.tokens)]
        expected_NV = target_logprobs(model, text)[trace.positions]
        found_NV = torch.zeros_like(expected_NV).scatter(
            1, torch.from_numpy(trace.ids_NK.astype(np.int64)), torch.from_numpy(trace.logprobs_NK).double()
        )
        assert torch.allclose(found_NV.exp(), expected_NV.exp(), atol=2e-3)
        rows = [row for row in seen if row.request.id == trace.id]
        wanted = [index for row in rows for index in _kept(row, positions)]
        assert trace.positions.tolist() == wanted


def _kept(row: Observed, positions: str) -> list[int]:
    if not row.drafted:
        return [row.start]
    if positions == "all":
        return [row.start + place for place in range(len(row.drafted))]
    return [row.start + row.accepted] if row.accepted < len(row.drafted) else []


def test_observing_costs_no_pass_of_the_target() -> None:
    passes: list[int] = []
    for observer in (None, partial(show, Buffer(positions="all"))):
        model = llama()
        engine = Engine(model, None, {"cut": layers_draft(model, [0])}, Fixed("cut", 3), max_batch=4, observer=observer)
        for place, text in enumerate(prompts(6)):
            engine.add(Request(str(place), text, Sampling(20, seed=place), (place,)))
        while engine.busy:
            engine.step()
        passes.append(engine.target_passes)
    assert passes[0] == passes[1] > 10


class _Tapping(ModelDraft):
    taps: Any = (1,)


def test_hidden_states_stand_at_their_columns() -> None:
    model, buffer = llama(), Buffer(top=4, taps=True)
    texts, _ = record(model, _Tapping(cut_layers(model, [0])), buffer, prompts(5))
    for trace in buffer.traces:
        with torch.no_grad():
            output = model(torch.tensor([texts[trace.id]]), output_hidden_states=True, use_cache=False)
        columns_TF = torch.from_numpy(trace.columns_TF).view(torch.bfloat16).float()
        assert len(columns_TF) == trace.positions[-1]  # the last position is predicted from the last column
        expected_TF = output.hidden_states[1][0, : len(columns_TF)]
        assert torch.allclose(columns_TF, expected_TF, rtol=1e-2, atol=1e-3)


def test_requests_that_say_no_leave_no_trace() -> None:
    model, buffer = llama(), Buffer(positions="all")
    _, seen = record(
        model,
        layers_draft(model, [0]),
        buffer,
        prompts(8),
        train=lambda place: place % 2 == 0,
        keep=lambda place: True,
    )
    assert {row.request.id for row in seen} == {"0", "2", "4", "6"}
    assert {trace.id for trace in all_traces(buffer)} == {"0", "2", "4", "6"}


ERROR = 0.4  # random models are flat


def test_top_is_the_least_that_keeps_the_error() -> None:
    model = llama(vocabulary=300, scale=0.25)
    buffer = Buffer(positions="all", error=ERROR, held_out=1)
    record(model, layers_draft(model, [0]), buffer, prompts(24, 300))
    tops = [8, 16, 32, 64, 128, 256]
    assert buffer.top in tops[1:-1]
    tails = {}
    for top in (buffer.top, buffer.top // 2):
        fixed = Buffer(positions="all", top=top)
        record(model, layers_draft(model, [0]), fixed, prompts(24, 300))
        tails[top] = fixed.numbers()["buffer_error"]
    assert tails[buffer.top] <= 1.1 * ERROR and tails[buffer.top // 2] > ERROR
    widths = {trace.ids_NK.shape[1] for trace in list(buffer.traces)[-4:]}
    assert widths == {buffer.top}
    for trace in buffer.traces:  # nothing of the mass is lost where a trace was cut to its narrowest piece
        mass_N = np.exp(trace.logprobs_NK.astype(np.float64)).sum(-1) + np.exp(trace.tail_N)
        assert np.allclose(mass_N, 1, atol=5e-3)


def test_held_out_requests_are_trained_on_only_when_they_leave() -> None:
    model, buffer = llama(), Buffer(held_out=2, replay=3)
    record(model, layers_draft(model, [0]), buffer, prompts(20), keep=lambda place: place >= 4)
    new = buffer.new
    lot = buffer.take(10**6)
    assert len(lot.stop) == len(lot.gate) == 2
    apart = {trace.number for trace in lot.stop + lot.gate}
    assert not apart & {trace.number for trace in lot.train}
    assert len(lot.train) == 16 and len(buffer.past) == 3
    assert new == sum(trace.size for trace in lot.train)
    assert {trace.role for trace in lot.train} == {"train"}
    assert {trace.role for trace in lot.gate} == {"gate"} and {trace.role for trace in lot.stop} == {"stop"}
    assert buffer.new == 0 and lot.replay == []


def test_a_lot_trains_on_what_is_new_and_replays_the_newest_before_it_and_what_is_remembered() -> None:
    model, buffer = llama(), Buffer(held_out=1, replay=4)
    draft = layers_draft(model, [0])
    record(model, draft, buffer, prompts(30))
    first = buffer.take(10**6).train
    assert [trace.number for trace in first] == list(range(1, 31))
    record(model, draft, buffer, prompts(5, seed=2))
    lot = buffer.take(sum(trace.size for trace in first[-3:]))
    assert [trace.number for trace in lot.train] == list(range(31, 36))
    remembered = {trace.number for trace in buffer.past} - set(range(31, 36))
    assert {trace.number for trace in lot.replay} == {28, 29, 30} | remembered
    assert any(number < 28 for number in remembered)  # sampled from the whole past, not from its end
    record(model, draft, buffer, prompts(9, seed=3))
    few = buffer.take(10**6, sum(trace.size for trace in list(buffer.traces)[-2:]))
    assert [trace.number for trace in few.train] == [43, 44]  # the newest; the others are older than they
    assert {trace.number for trace in few.replay} == set(range(1, 43))
    again = buffer.take(0)  # nothing is new: then all
    assert [trace.number for trace in again.train] == list(range(1, 45)) and again.replay == []


def test_bounded_in_bytes() -> None:
    model, buffer = llama(), Buffer(positions="all", most_bytes=20_000, held_out=1)
    record(model, layers_draft(model, [0]), buffer, prompts(30), keep=lambda place: place % 5 == 0)
    kept = [trace.number for trace in buffer.traces]
    assert 0 < buffer.bytes <= 20_000
    assert buffer.bytes == sum(trace.bytes for trace in all_traces(buffer))
    assert kept == sorted(kept) and kept[-1] >= 25  # the newest


def test_nothing_outlives_its_time() -> None:
    clock = [1000.0]
    model, buffer = llama(), Buffer(seconds=60, replay=4, held_out=2, now=lambda: clock[0])
    record(model, layers_draft(model, [0]), buffer, prompts(10), keep=lambda place: place % 2 == 0)
    engine = Engine(model, None, {"cut": layers_draft(model, [0])}, Fixed("cut", 3), max_batch=2)
    engine.observer = partial(show, buffer)
    engine.add(Request("open", (1, 2, 3), Sampling(40, seed=1)))
    for _ in range(4):
        engine.step()
    clock[0] += 59
    buffer.expire()
    assert all_traces(buffer) and buffer._growing["open"].positions
    clock[0] += 1
    buffer.expire()
    assert not all_traces(buffer) and buffer.bytes == 0 and not buffer._growing["open"].positions
    assert buffer.take(100).train == [] and buffer.numbers()["buffer_positions"] == 0
    while engine.busy:  # what is still to come of the open request would not be whole: it is gone for good
        engine.step()
    assert buffer.bytes == 0
    buffer.close("open")
    assert not all_traces(buffer) and not buffer._growing


def test_a_request_that_is_too_large_is_dropped_whole() -> None:
    """While it is still served: no columns without those before them, no positions without their distributions."""
    model, buffer = llama(), Buffer(positions="all", taps=True, most_bytes=3000)
    _, seen = record(model, _Tapping(cut_layers(model, [0])), buffer, prompts(3), tokens=60)
    assert seen and not all_traces(buffer) and buffer.bytes == 0
    small = Buffer(positions="all", taps=True, most_bytes=10**6)
    record(model, _Tapping(cut_layers(model, [0])), small, prompts(3), tokens=60)
    assert min(trace.bytes for trace in all_traces(small)) > 3000


@pytest.mark.parametrize("positions", ["rejected", "all"])
def test_whole_traces_are_read_without_counting_as_seen(positions: Any) -> None:
    """Where rejected positions alone are kept, only those held out are whole."""
    model, buffer = llama(), Buffer(positions=positions)
    record(model, layers_draft(model, [0]), buffer, prompts(8), keep=lambda place: place % 2 == 0)
    new, numbers = buffer.new, {trace.id: trace.number for trace in all_traces(buffer)}
    assert new > 0
    whole = [trace for trace in all_traces(buffer) if positions == "all" or int(trace.id) % 2 == 0]
    found = buffer.whole_since(0)
    assert [trace.number for trace in found] == sorted(trace.number for trace in whole)
    last = sorted(numbers.values())[-3]
    assert [trace.number for trace in buffer.whole_since(last)] == [
        trace.number for trace in found if trace.number > last
    ]
    assert buffer.new == new


def test_traces_travel_at_their_own_size() -> None:
    model, buffer = llama(), Buffer(positions="all")
    record(model, layers_draft(model, [0]), buffer, prompts(10))
    lot = buffer.take(10**6)
    sent = pickle.dumps(lot, protocol=5)
    assert len(sent) < 1.2 * sum(trace.bytes for trace in lot.train) + 5000
    again = pickle.loads(sent).train[3]
    assert np.array_equal(again.positions, lot.train[3].positions)
    assert np.array_equal(again.logprobs_NK, lot.train[3].logprobs_NK)
