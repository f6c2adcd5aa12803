"""The engine: greedy output is plain greedy output whatever drafts; requests join, leave and end in mid-block."""

from __future__ import annotations

import threading
from dataclasses import replace
from time import perf_counter
from typing import Any

import pytest
import torch
from decoding_helpers import STOP, VOCABULARY
from speculative_helpers import DRAFTS, copy_of, requests_of, serve, target
from test_decoding_generate import letters, prompts_of
from transformers import LlamaForCausalLM

from limbeck.decoding import (
    Adaptive,
    Completion,
    Engine,
    Fixed,
    NgramDraft,
    Request,
    Sampling,
    generate,
    layers_draft,
    packed,
    speculate,
)
from limbeck.errors import ModelError, PreflightError, RolloutError
from limbeck.models import set_vocabulary

PROMPTS = prompts_of(9)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return target()


PENALISED = Sampling(
    25, temperature=0, repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.1, no_repeat_ngram_size=3,
    stop_tokens=(STOP, 7), min_tokens=5,
)  # fmt: skip


def ends(completions: list[Completion]) -> list[tuple[list[int], str]]:
    return [(completion.tokens, completion.finish_reason) for completion in completions]


# -- greedy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("sampling", [Sampling(25, temperature=0, stop_tokens=(STOP,)), PENALISED], ids=["", "penal"])
def test_greedy_is_plain_greedy(model: LlamaForCausalLM, kind: str, sampling: Sampling):
    expected = generate(model, PROMPTS, sampling)
    for gamma, max_batch in ((1, 1), (3, 4), (7, 9)):
        found = speculate(model, DRAFTS[kind](model), PROMPTS, sampling, gamma=gamma, max_batch=max_batch)
        assert ends(found) == ends(expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=0)


def test_engines_share_a_reader_by_turns(model: LlamaForCausalLM):
    """One drafts, the other does not: neither sees what the other has left in the cache."""
    sampling = Sampling(20, temperature=1, seed=3, stop_tokens=(STOP,))
    drafted = Engine(model, None, {"layers": layers_draft(model, [0])}, Fixed("layers", 3), max_batch=3)
    plain = Engine(model, None, {}, Fixed(None, 0), max_batch=2, reader=drafted.reader)
    alone = Engine(model, None, {}, Fixed(None, 0), max_batch=2)
    assert plain.reader is drafted.reader
    for start in (0, 4):
        requests = requests_of(PROMPTS[start : start + 4], sampling)
        serve(drafted, requests)
        expected = [event.tokens for event in serve(alone, requests)]
        assert [event.tokens for event in serve(plain, requests)] == expected


def test_without_a_draft_it_writes_what_generate_writes(model: LlamaForCausalLM):
    for sampling in (
        Sampling(20, seed=4, n=2, stop_tokens=(STOP,)),
        Sampling(20, temperature=1.5, top_k=9, top_p=0.8, repetition_penalty=1.2, min_tokens=3, stop_tokens=(STOP, 5)),
    ):
        expected = generate(model, PROMPTS, sampling)
        for max_batch in (1, 5):
            assert ends(speculate(model, None, PROMPTS, sampling, max_batch=max_batch)) == ends(expected)


def test_every_length_limit_inside_a_block(model: LlamaForCausalLM):
    draft = copy_of(model)  # all accepted: blocks are whole
    for most in range(1, 12):
        sampling = Sampling(most, temperature=0)
        assert ends(speculate(model, draft, PROMPTS, sampling, gamma=4)) == ends(generate(model, PROMPTS, sampling))
    long = [[5, 6, 7] * 20 + [8]]  # 61 of 64: the context ends in the first block
    found = speculate(model, draft, long, Sampling(30, temperature=0), gamma=6)
    assert ends(found) == ends(generate(model, long, Sampling(30, temperature=0))) and len(found[0].tokens) == 3


def test_every_stop_token_inside_a_block(model: LlamaForCausalLM):
    draft = copy_of(model)
    seen: set[int] = set()
    for stop in range(VOCABULARY):
        sampling = Sampling(20, temperature=0, stop_tokens=(stop,))
        found = speculate(model, draft, PROMPTS, sampling, gamma=6)
        assert ends(found) == ends(generate(model, PROMPTS, sampling))
        seen |= {len(completion.tokens) % 7 for completion in found if completion.finish_reason == "stop"}
    assert len(seen) >= 6, seen  # at almost every place of a block


def test_stop_strings_inside_a_block(model: LlamaForCausalLM):
    tokenizer = letters()
    draft = copy_of(model)
    seen: set[int] = set()
    for strings in (("bcd", "ae"), ("<end>",), ("d",), ("ke", "fg", "oa", "mm")):
        sampling = Sampling(20, temperature=0, stop_strings=strings)
        expected = generate(model, PROMPTS, sampling, tokenizer=tokenizer)
        assert ends(speculate(model, draft, PROMPTS, sampling, gamma=5, tokenizer=tokenizer)) == ends(expected)
        seen |= {len(completion.tokens) % 6 for completion in expected if completion.finish_reason == "stop"}
    assert len(seen) >= 4


def test_requests_of_every_kind_side_by_side(model: LlamaForCausalLM):
    """Greedy and sampled, penalised or not, with routes to different drafts or none: one batch."""
    kinds = [
        Sampling(15, temperature=0), PENALISED, Sampling(9, temperature=0.7, seed=3),
        Sampling(12, temperature=1.3, top_k=5), Sampling(15, temperature=1.3, top_p=0.9, seed=1),
    ]  # fmt: skip
    drafts = {"layers": layers_draft(model, [0]), "ngram": NgramDraft(size=1), "copy": copy_of(model, 0.05)}
    routes = [None, "layers", "ngram", "copy"]
    requests = [
        Request(f"{index} {kind}", tuple(prompt), sampling, (index,), route=routes[(index + kind) % 4])
        for index, prompt in enumerate(PROMPTS[:4])
        for kind, sampling in enumerate(kinds)
    ]
    results: list[list[Any]] = []
    for max_batch in (1, 20, 7):
        fresh = {**drafts, "ngram": NgramDraft(size=1, shared_tokens=0)}
        engine = Engine(model, None, fresh, Fixed(None, 3), max_batch=max_batch)
        results.append([(event.tokens, event.finish_reason) for event in serve(engine, requests)])
    assert results[0] == results[1] == results[2]
    for request, (tokens, _) in zip(requests, results[0], strict=True):
        if request.sampling.temperature == 0:
            assert generate(model, [request.tokens], request.sampling)[0].tokens == tokens


@pytest.mark.parametrize("kind", ["layers", "layers int8", "layers of some tokens", "feature"])
def test_a_swap_in_the_middle_changes_no_greedy_token(model: LlamaForCausalLM, kind: str):
    sampling = Sampling(30, temperature=0)
    draft = DRAFTS[kind](model)
    net: Any = draft.net if kind == "feature" else draft.reader.model  # type: ignore[attr-defined]
    state = {name: torch.randn_like(weight) * 0.1 for name, weight in net.named_parameters()}

    def swap(steps: int) -> None:
        if steps % 3 == 0:
            draft.prepare({name: weight * (1 + steps) for name, weight in state.items()}, steps)()

    engine = Engine(model, None, {"draft": draft}, Fixed("draft", 3), max_batch=4)
    found = serve(engine, requests_of(PROMPTS, sampling), after=swap)
    assert draft.version >= 9
    assert [event.tokens for event in found] == [c.tokens for c in generate(model, PROMPTS, sampling)]


@pytest.mark.parametrize("kind", ["layers", "layers int8", "feature"])
def test_after_a_swap_the_draft_is_what_it_would_have_been(
    model: LlamaForCausalLM, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """With whatever it has packed: served from the start, the new weights draft the same."""
    monkeypatch.setattr(packed, "LEAST", 1)
    monkeypatch.setattr(packed.products, "packing_pays", lambda dtype: dtype in packed.products.packable())
    old, new = DRAFTS[kind](model), DRAFTS[kind](target(scale=0.3))
    nets: list[Any] = [d.net if kind == "feature" else d.reader.model for d in (old, new)]  # type: ignore[attr-defined]
    old.prepare({name: weight.clone() for name, weight in nets[1].named_parameters()}, 1)()
    sampling = Sampling(20, temperature=1, seed=2)
    for draft in (old, new):
        draft.bind(VOCABULARY)
    if kind == "feature":  # its head is the target's
        new = DRAFTS[kind](model)
        new.net.load_state_dict(nets[1].state_dict())  # type: ignore[attr-defined]
    counters = []
    for draft in (old, new):
        engine = Engine(model, None, {"draft": draft}, Fixed("draft", 3), max_batch=3)
        counters.append([(event.tokens, event.counters) for event in serve(engine, requests_of(PROMPTS, sampling))])
    assert counters[0] == counters[1]


def test_weights_that_do_not_fit_are_refused(model: LlamaForCausalLM):
    draft = layers_draft(model, [0])
    with pytest.raises(ModelError, match="expected model.nothing no such weight"):
        draft.prepare({"model.nothing": torch.zeros(2)}, 1)
    with pytest.raises(ModelError, match="expected model.norm.weight"):
        draft.prepare({"model.norm.weight": torch.zeros(2)}, 1)
    assert draft.version == 0


# -- randomness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["layers", "layers of some tokens", "feature"])
def test_batch_composition_changes_nothing(model: LlamaForCausalLM, kind: str):
    """(Packed weights are for few rows alone, so that q, not the distribution, depends on the batch.)"""
    sampling = Sampling(15, temperature=1.2, top_p=0.95, seed=5, n=2, stop_tokens=(STOP,))
    whole = speculate(model, DRAFTS[kind](model), PROMPTS, sampling, gamma=3, max_batch=18)
    streams = [(index,) for index in range(9)]
    backwards = speculate(
        model, DRAFTS[kind](model), PROMPTS[::-1], sampling, gamma=3, max_batch=4, streams=streams[::-1]
    )
    pairs = [backwards[place : place + 2] for place in range(0, 18, 2)]
    assert ends([completion for pair in pairs[::-1] for completion in pair]) == ends(whole)
    alone = speculate(model, DRAFTS[kind](model), PROMPTS[3:4], sampling, gamma=3, streams=streams[3:4])
    assert ends(alone) == ends(whole[6:8])


def test_a_draft_changes_the_tokens_but_not_the_first(model: LlamaForCausalLM):
    """The draft's random numbers are others than the target's: equal ones would still look right in one row."""
    sampling = Sampling(12, n=8)
    plain = speculate(model, None, [[5, 6]], sampling)
    drafted = speculate(model, layers_draft(model, [0]), [[5, 6]], sampling, gamma=3)
    assert [c.tokens[0] for c in plain] == [c.tokens[0] for c in drafted]
    assert sum(one.tokens != other.tokens for one, other in zip(plain, drafted, strict=True)) > 5


# -- requests ----------------------------------------------------------------------------------------------------------


def test_requests_that_cannot_be_served_are_refused(model: LlamaForCausalLM):
    engine = Engine(model, None, {"layers": layers_draft(model, [0])}, Fixed("layers", 2), max_batch=2)
    good = Request("a", (5, 6), Sampling(4))
    for bad, words in (
        (replace(good, tokens=()), "at least one token"),
        (replace(good, tokens=(5,) * 64), "context's 64, found 64"),
        (replace(good, tokens=(5, VOCABULARY)), f"found {VOCABULARY}"),
        (replace(good, tokens=(5, -1)), "found -1"),
        (replace(good, sampling=Sampling(4, stop_tokens=(99,))), r"found \[99\]"),
        (replace(good, sampling=Sampling(4, n=2)), "n = 1"),
        (replace(good, sampling=Sampling(0)), "max_tokens of at least 1"),
        (replace(good, sampling=Sampling(4, stop_strings=("a",))), "tokenizer"),
        (replace(good, route="other"), "found 'other'"),
    ):
        with pytest.raises(RolloutError, match=words):
            engine.add(bad)
    assert not engine.busy


def test_another_vocabulary_is_refused_and_padding_rows_are_none(model: LlamaForCausalLM):
    other: Any = target(vocabulary=VOCABULARY + 8)
    with pytest.raises(PreflightError, match=f"vocabulary of {VOCABULARY} tokens, found {VOCABULARY + 8}"):
        speculate(model, layers_draft(other, [0]), PROMPTS, Sampling(4))
    set_vocabulary(other, VOCABULARY)
    sampling = Sampling(10, temperature=0)
    assert ends(speculate(model, layers_draft(other, [0]), PROMPTS, sampling)) == ends(
        generate(model, PROMPTS, sampling)
    )


def test_requests_are_cancelled_wherever_they_are(model: LlamaForCausalLM):
    engine = Engine(model, None, {"layers": layers_draft(model, [0])}, Fixed("layers", 2), max_batch=2)
    sampling = Sampling(20, temperature=0)
    for request in requests_of(PROMPTS[:4], sampling):
        engine.add(request)
    events = engine.step()
    assert {event.id for event in events} == {"0", "1"}
    engine.cancel("0")  # being served, in the first slot
    engine.cancel("2")  # waiting
    engine.cancel("nobody")
    while engine.busy:
        events += engine.step()
    written = {name: sum((event.tokens for event in events if event.id == name), []) for name in "0123"}
    ended = {event.id: event for event in events if event.finish_reason}
    assert len(ended) == 4 and ended["0"].finish_reason == ended["2"].finish_reason == "cancelled"
    assert ended["2"].counters is None and ended["0"].counters is not None
    expected = [completion.tokens for completion in generate(model, PROMPTS[:4], sampling)]
    # The row that took the freed slot and the one that came in are whole.
    assert [written["1"], written["3"]] == [expected[1], expected[3]]
    assert written["2"] == [] and written["0"] == expected[0][: len(written["0"])] != []


def test_requests_may_be_added_and_cancelled_from_other_threads(model: LlamaForCausalLM):
    engine = Engine(model, None, {"layers": layers_draft(model, [0])}, Fixed("layers", 2), max_batch=4)
    sampling = Sampling(10, temperature=0)
    expected = {str(i): generate(model, [prompt], sampling)[0].tokens for i, prompt in enumerate(PROMPTS)}
    found: dict[str, list[int]] = {}
    reasons: dict[str, str] = {}

    def client(name: str) -> None:
        for place, prompt in enumerate(PROMPTS):
            engine.add(Request(f"{name}{place}", tuple(prompt), sampling))
            if place % 3 == 2:
                engine.cancel(f"{name}{place}")

    threads = [threading.Thread(target=client, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    while engine.busy or any(thread.is_alive() for thread in threads):
        for event in engine.step():
            found.setdefault(event.id, []).extend(event.tokens)
            if event.finish_reason:
                reasons[event.id] = event.finish_reason
    assert len(reasons) == 36
    for name, reason in reasons.items():
        if reason == "length":
            assert found[name] == expected[name[1:]]
        else:
            assert reason == "cancelled" and int(name[1:]) % 3 == 2


def test_counters_add_up(model: LlamaForCausalLM):
    passes: list[int] = []
    engine = Engine(
        model, None, {"layers": layers_draft(model, [0])}, Fixed("layers", 3), max_batch=4,
        observer=lambda seen: passes.append(len(seen.rows)),
    )  # fmt: skip
    start = perf_counter()
    events = serve(engine, requests_of(PROMPTS, Sampling(17, seed=1, stop_tokens=(STOP,))))
    passed = perf_counter() - start
    assert engine.target_passes == len(passes)  # what is observed costs no pass
    for event in events:
        counters = event.counters
        assert counters is not None
        assert counters.accepted <= counters.verified <= counters.drafted <= 3 * (counters.rounds - 1)
        # Every pass gives one token beside the accepted ones, but for one that ends within them.
        assert len(event.tokens) in (counters.accepted + counters.rounds, counters.accepted + counters.rounds - 1)
        assert 0 <= counters.alpha_sum <= counters.verified
    assert sum(passes) == sum(event.counters.rounds for event in events if event.counters)
    parts = vars(engine.seconds).values()
    assert min(parts) > 0 and 0.8 * passed < sum(parts) <= passed  # the rest is the loop's, outside `step`


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["layers", "layers int8", "feature"])
def test_a_draft_that_gives_nan_is_benched_until_it_gets_new_weights(model: LlamaForCausalLM, kind: str):
    sampling = Sampling(24, temperature=0)
    draft = DRAFTS[kind](model)
    net: Any = draft.net if kind == "feature" else draft.reader.model  # type: ignore[attr-defined]
    good = {name: weight.clone() for name, weight in net.named_parameters()}
    engine = Engine(model, None, {"draft": draft}, Fixed("draft", 3), max_batch=3)
    benched: list[bool] = []

    def spoil(steps: int) -> None:
        benched.append(draft.benched)
        if steps == 2:
            draft.prepare({name: torch.full_like(weight, torch.nan) for name, weight in good.items()}, 1)()
        if steps == 5:
            draft.prepare(good, 2)()

    events = serve(engine, requests_of(PROMPTS, sampling), after=spoil)
    assert benched[:5] == [False, False, True, True, True] and not any(benched[5:])
    assert [event.tokens for event in events] == [c.tokens for c in generate(model, PROMPTS, sampling)]
    last = events[-1].counters
    assert last is not None and last.drafted > 0  # it drafts again


def test_nan_is_said(model: LlamaForCausalLM):
    broken: Any = target()
    with torch.no_grad():
        broken.model.embed_tokens.weight[23] = torch.nan  # not among the tokens that a new engine tries
    with pytest.raises(RolloutError, match="prompt 1: expected finite logits, found NaN"):
        speculate(broken, None, [[5, 6, 7], [5, 23]], Sampling(3))


def test_a_request_with_nothing_left_to_draw_ends(model: LlamaForCausalLM):
    each_once = Sampling(60, temperature=0, no_repeat_ngram_size=1)
    for kind in ("layers", "layers of some tokens", "ngram"):
        engine = Engine(model, None, {"draft": DRAFTS[kind](model)}, Fixed("draft", 4), max_batch=2)
        for event in serve(engine, requests_of([[6, 6], [7]], each_once)):
            assert event.finish_reason == "error" and event.error and "all ruled out" in event.error
            assert sorted([6 + int(event.id), *event.tokens]) == list(range(VOCABULARY))


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_draft_with_a_shorter_context(model: LlamaForCausalLM, temperature: float):
    sampling = Sampling(40, temperature=temperature)
    found = [
        speculate(
            model, layers_draft(target(max_position_embeddings=16), [0]), PROMPTS, sampling, gamma=4, max_batch=count
        )
        for count in (1, 4)
    ]
    expected = generate(model, PROMPTS, sampling)
    assert ends(found[0]) == ends(found[1])
    assert [len(c.tokens) for c in found[0]] == [len(c.tokens) for c in expected]
    if temperature == 0:
        assert ends(found[0]) == ends(expected)


def test_modes_and_weights_are_as_before(model: LlamaForCausalLM):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    draft = DRAFTS["layers int8"](model)
    assert [module.training for module in model.modules()] == modes
    speculate(model, draft, PROMPTS, Sampling(5))
    assert [module.training for module in model.modules()] == modes
    model.eval()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_adaptive_controller_changes_no_greedy_token(model: LlamaForCausalLM):
    sampling = Sampling(40, temperature=0)
    ngram = NgramDraft(size=2)
    controller = Adaptive("layers", ngram=("ngram", ngram), max_gamma=6)
    engine = Engine(model, None, {"layers": layers_draft(model, [0]), "ngram": ngram}, controller, max_batch=3)
    engine.probe()
    events = serve(engine, requests_of(PROMPTS * 2, sampling))
    assert [event.tokens for event in events] == [c.tokens for c in generate(model, PROMPTS * 2, sampling)]
    assert not controller.rows and controller.verify(1) > 0
