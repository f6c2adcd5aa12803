"""Long prompts are read in pieces, between the rounds of others; memory is that of the requests there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from speculative_helpers import DRAFTS, full_logits, requests_of, serve, target
from test_decoding_families import VOCABULARY, tiny

from limbeck.decoding import Engine, Fixed, NgramDraft, Observation, Request, Sampling, generate, layers_draft
from limbeck.decoding import ragged_cache as caches
from limbeck.decoding.pieces import PIECE, together
from limbeck.errors import RolloutError

GREEDY = Sampling(20, temperature=0)


def long_target(**changes: Any) -> Any:
    return target(max_position_embeddings=4096, **changes)


def text(length: int, seed: int = 0, size: int = 24) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, size, (length,), generator=generator).tolist()


PROMPTS = [text(1300), [5, 6, 7], text(600, 1), text(513, 2), text(40, 3), text(1024, 4)]


def widths_of(module: Any) -> list[int]:
    """Columns, padding included, of every pass from now on."""
    seen: list[int] = []
    module.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].numel()))
    return seen


def test_rows_are_read_together_where_they_are_alike():
    groups = together([3, 500, 100, 120, 2000, 110])
    assert groups == [[4], [1], [3, 5, 2], [0]]
    assert together([300, 250, 260, 200]) == [[0], [2], [1, 3]]  # 2 x 260 are more than a piece
    assert together([]) == [] and together([7]) == [[0]]


# -- the target --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["layers", "feature", "ngram"])
def test_prompts_in_pieces_change_no_greedy_token(kind: str):
    model = long_target()
    expected = [completion.tokens for completion in generate(model, PROMPTS, GREEDY)]
    for max_batch in (1, 4):
        draft = DRAFTS[kind](model)
        engine = Engine(model, None, {"draft": draft}, Fixed("draft", 3), max_batch=max_batch)
        events = serve(engine, requests_of(PROMPTS, GREEDY))
        assert [event.tokens for event in events] == expected
        assert all(event.counters is not None and event.counters.rounds <= 20 for event in events)


@pytest.mark.parametrize("family", ["gemma3", "mistral", "gpt2", "llama4"])
def test_windows_and_chunks_hold_across_pieces(family: str):
    length = {"n_positions": 2048} if family == "gpt2" else {"max_position_embeddings": 2048}
    model: Any = tiny(family, **length)
    prompts = [text(1100, 5, VOCABULARY), [5, 6, 7]]
    sampling = Sampling(6, temperature=0)
    engine = Engine(model, None, {}, Fixed(None, 0), max_batch=2)
    found = [event.tokens for event in serve(engine, requests_of(prompts, sampling))]
    assert found == [completion.tokens for completion in generate(model, prompts, sampling)]


def test_others_are_served_while_a_prompt_is_read():
    """One piece a step; a short prompt that comes later has not to wait for the whole long one."""
    model = long_target()
    engine = Engine(model, None, {"draft": layers_draft(model, [0])}, Fixed("draft", 2), max_batch=3)
    engine.add(Request("first", (5, 6, 7), Sampling(200, temperature=0)))
    engine.step()
    widths = widths_of(model.get_input_embeddings())
    engine.add(Request("long", tuple(text(2000)), GREEDY))
    firsts: dict[str, int] = {}
    for step in range(1, 10):
        if step == 2:
            engine.add(Request("short", (8, 9), GREEDY))
        events = engine.step()
        assert any(event.id == "first" and event.tokens for event in events)
        for event in events:
            firsts.setdefault(event.id, step)
    assert firsts == {"first": 1, "short": 3, "long": 5}  # 2000 columns are four pieces, the short one has one turn
    assert max(widths) == PIECE
    while engine.busy:
        engine.step()


@pytest.mark.parametrize("leaver", ["long", "first"])
def test_a_prompt_that_is_being_read_can_be_cancelled(leaver: str):
    """NaN that it has brought stays with it, also where it has moved to another's slot meanwhile."""
    model: Any = tiny("phi", max_position_embeddings=2048)
    prompts = [text(300, 6, 30), [5, 6, 7], [8, 9]]  # short ones beside a long one, in the second slot
    expected = [completion.tokens for completion in generate(model, prompts, GREEDY)]
    bad = next(token for token in range(30, VOCABULARY) if not any(token in tokens for tokens in expected))
    engine = Engine(model, None, {}, Fixed(None, 0), max_batch=2)
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = torch.nan
    engine.add(Request("first", (5, 6, 7), Sampling(1000, temperature=0, stop_tokens=(bad,))))
    engine.add(Request("long", (bad,) * 700, GREEDY))  # the buffers of its first piece hold all of it
    events = engine.step() + engine.step()
    assert {event.id for event in events} == {"first"} and [row.read for row in engine.rows] == [3, 512]
    engine.cancel(leaver)
    assert [(event.id, event.finish_reason) for event in engine.step() if event.id == leaver] == [(leaver, "cancelled")]
    for name in ("first", "long"):
        engine.cancel(name)
    engine.step()
    found = {event.id: event.tokens for event in serve(engine, requests_of(prompts, GREEDY))}
    assert [found[str(index)] for index in range(3)] == expected


def test_the_hidden_states_of_a_prompt_in_pieces_are_whole():
    model = long_target()
    seen: dict[str, list[torch.Tensor]] = {}
    logits: dict[str, list[torch.Tensor]] = {}

    def watch(observation: Observation) -> None:
        for row in observation.rows:
            assert row.hidden_TF is not None
            seen.setdefault(row.request.id, []).append(row.hidden_TF.clone())
            logits.setdefault(row.request.id, []).append(row.logits_nV.clone())

    draft = DRAFTS["feature"](model)
    engine = Engine(model, None, {"draft": draft}, Fixed("draft", 3), max_batch=4, observer=watch)
    events = serve(engine, requests_of(PROMPTS, GREEDY))
    for prompt, event in zip(PROMPTS, events, strict=True):
        whole = [*prompt, *event.tokens]
        with torch.no_grad():
            states = model(input_ids=torch.tensor([whole]), output_hidden_states=True).hidden_states
        expected_TF = torch.cat([states[tap][0] for tap in engine.taps], -1)[:-1]
        torch.testing.assert_close(torch.cat(seen[event.id]), expected_TF, atol=1e-4, rtol=0)
        assert len(seen[event.id][0]) == len(prompt) and len(seen[event.id]) == len(logits[event.id])
        expected_NV = full_logits(model, whole)[len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.cat(logits[event.id]), expected_NV, atol=1e-4, rtol=0)


# -- the drafts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["layers", "feature"])
def test_drafts_read_in_pieces_too(kind: str):
    """And what they propose is what they propose after one reading."""
    model = long_target()
    draft: Any = DRAFTS[kind](model)
    widths = widths_of(draft.reader.model.get_input_embeddings() if kind == "layers" else draft.net.fuse)
    engine = Engine(model, None, {"draft": draft}, Fixed("draft", 3), max_batch=4)
    events = serve(engine, requests_of(PROMPTS, Sampling(20, temperature=1.2, seed=3)))
    unit = 1 if kind == "layers" else draft.net.fuse.in_features
    assert max(widths) <= (PIECE if kind == "layers" else 2 * PIECE) * unit
    assert all(event.counters is not None and event.counters.drafted > 5 for event in events)
    alone: list[list[int]] = []
    for request in requests_of(PROMPTS, Sampling(20, temperature=1.2, seed=3)):
        engine = Engine(model, None, {"draft": DRAFTS[kind](model)}, Fixed("draft", 3), max_batch=1)
        alone += [event.tokens for event in serve(engine, [request])]
    assert alone == [event.tokens for event in events]  # whoever was beside them


def test_a_row_that_joins_pads_no_other_row():
    """One of three rows has 400 columns to read: they are read for it alone."""
    model = long_target()
    for kind in ("layers", "feature"):
        draft: Any = DRAFTS[kind](model)
        unit = 1 if kind == "layers" else draft.net.fuse.in_features
        engine = Engine(model, None, {"draft": draft}, Fixed("draft", 2), max_batch=3)
        for request in requests_of([[5, 6], [7, 8]], Sampling(30, temperature=0)):
            engine.add(request)
        engine.step()
        engine.step()
        widths = widths_of(draft.reader.model.get_input_embeddings() if kind == "layers" else draft.net.fuse)
        engine.add(Request("long", tuple(text(400)), GREEDY))
        engine.step()
        assert 398 * unit <= max(widths) <= 401 * unit


# -- memory ------------------------------------------------------------------------------------------------------------


def columns(cache: caches.RaggedCache) -> tuple[int, int]:
    """(slots, columns) of the buffers."""
    layers = cache.cache.used()
    return (layers[0].keys.shape[0], layers[0].keys.shape[2]) if layers else (0, 0)


@pytest.mark.parametrize("kind", ["layers", "feature", "ngram"])
def test_the_context_bounds_requests_and_buffers(kind: str):
    model = long_target()
    draft: Any = DRAFTS[kind](model)
    engine = Engine(model, None, {"draft": draft}, Fixed("draft", 3), max_batch=4, context=100)
    assert engine.context == 100
    with pytest.raises(RolloutError, match="context's 100, found 100"):
        engine.add(Request("a", tuple(text(100)), GREEDY))
    prompts = [text(97), text(60, 1), text(99, 2)]
    sampling = Sampling(50, temperature=0)
    events = serve(engine, requests_of(prompts, sampling))
    assert [(len(event.tokens), event.finish_reason) for event in events] == [
        (3, "length"),
        (40, "length"),
        (1, "length"),
    ]
    expected = generate(model, prompts, sampling)
    assert all(c.tokens[: len(event.tokens)] == event.tokens for event, c in zip(events, expected, strict=True))
    own = {"layers": lambda: draft.reader.rows, "feature": lambda: draft.cache}
    for cache in [engine.reader.rows, *([own[kind]()] if kind in own else [])]:
        assert columns(cache)[1] <= 100 + 4  # a block's padding
    with pytest.raises(RolloutError, match="2 tokens or more, found 1"):
        Engine(model, None, {}, Fixed(None, 0), max_batch=1, context=1)
    whole = Engine(model, None, {}, Fixed(None, 0), max_batch=1, context=10_000)
    assert whole.context == 4096


def test_a_long_prompt_is_as_long_in_its_own_slot_alone():
    """Not in those of the requests that were there before it."""
    model = long_target()
    draft: Any = layers_draft(model, [0])
    engine = Engine(model, None, {"draft": draft}, Fixed("draft", 2), max_batch=6)
    for index in range(6):
        engine.add(Request(str(index), (5, 6, index + 3), Sampling(60 if index == 0 else 3, temperature=0)))
    for _ in range(4):
        engine.step()
    assert len(engine.rows) == 1 and columns(engine.reader.rows)[0] == 6
    engine.add(Request("long", tuple(text(900)), GREEDY))
    tokens: list[int] = []
    while engine.busy:
        tokens += [token for event in engine.step() if event.id == "long" for token in event.tokens]
    assert tokens == generate(model, [text(900)], GREEDY)[0].tokens
    for cache in (engine.reader.rows, draft.reader.rows):
        slots, width = columns(cache)
        assert slots == 2 and width >= 900


@pytest.mark.parametrize("kind", ["layers", "feature"])
def test_buffers_that_nobody_needs_are_given_back(kind: str, monkeypatch: pytest.MonkeyPatch):
    model = long_target()
    draft: Any = DRAFTS[kind](model)
    engine = Engine(model, None, {"draft": draft}, Fixed("draft", 2), max_batch=3)
    cache = draft.reader.rows if kind == "layers" else draft.cache
    expected = [completion.tokens for completion in generate(model, PROMPTS, GREEDY)]
    for most, left in ((1 << 30, True), (1000, False)):
        monkeypatch.setattr(caches, "_KEPT", most)
        for _ in range(2):
            events = serve(engine, requests_of(PROMPTS, GREEDY))
            assert [event.tokens for event in events] == expected
            assert (engine.reader.rows.bytes > 0) == (cache.bytes > 0) == left


def test_ngrams_keep_no_buffers():
    assert NgramDraft().behind(None) == 0  # type: ignore[arg-type]
