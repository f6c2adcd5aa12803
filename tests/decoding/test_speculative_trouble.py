"""NaN in the target, and drafts side by side: nothing of one reaches the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from speculative_helpers import requests_of, serve, target
from test_decoding_families import tiny

from limbeck.decoding import (
    Adaptive,
    Counters,
    Draft,
    Engine,
    FeatureDraft,
    FeatureNet,
    Fixed,
    NgramDraft,
    Request,
    Sampling,
    feature_shape,
    generate,
    layers_draft,
)
from limbeck.decoding.controller import Round
from limbeck.decoding.drafts import GoOn, Proposal
from limbeck.decoding.live import Live
from limbeck.errors import PreflightError

PROMPTS = [[5, 6, 7], [8, 9], [4], [3, 4, 5], [6, 5, 9, 8]]


def model_of(family: str) -> Any:
    return target() if family == "lean" else tiny(family)


# -- NaN ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0, 3])
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("family", ["lean", "phi", "mixtral"])
def test_a_request_that_the_target_cannot_serve_ends_alone(family: str, temperature: float, gamma: int):
    """NaN in one request touches no neighbour, nor whoever takes its slot, also when others leave in the same round."""
    good, broken = model_of(family), model_of(family)
    size: int = good.config.vocab_size
    lengths = [1, 12, 7, 12, 9]
    requests = [
        Request(f"{index}", tuple(prompt), Sampling(length, temperature=temperature, seed=3), (index,))
        for index, (prompt, length) in enumerate(zip([PROMPTS[0], [*range(3, 15)], *PROMPTS[2:]], lengths, strict=True))
    ]

    def engine(model: Any, bad: int | None = None) -> Engine:
        others = torch.tensor([token for token in range(size) if token != bad])
        draft = layers_draft(good, [0], ids_D=others)
        return Engine(model, None, {"layers": draft}, Fixed("layers", gamma), max_batch=3)

    for bad in range(15, size):
        expected = serve(engine(good, bad), requests)
        if not any(bad in event.tokens for event in expected):
            break
    else:
        raise AssertionError("every token is written")
    spoilt_engine = engine(broken, bad)
    with torch.no_grad():
        broken.get_input_embeddings().weight[bad] = torch.nan
    # The last of the first three, whose first leaves at once; then beside others that are in the middle.
    spoilt = [Request(name, (5, bad, *[6] * 8), requests[1].sampling) for name in ("x", "y")]
    mixed = [*requests[:2], spoilt[0], *requests[2:4], spoilt[1], *requests[4:]]
    found = {event.id: event for event in serve(spoilt_engine, mixed)}
    for request in spoilt:
        event = found[request.id]
        assert event.finish_reason == "error" and event.error and "NaN" in event.error and event.tokens == []
    for event in expected:
        assert found[event.id].error is None and found[event.id].tokens == event.tokens


class Stubborn(NgramDraft):
    """Proposes one token, whatever came before."""

    def __init__(self, token: int) -> None:
        super().__init__(shared_tokens=0)
        self.token = token
        self.asked = 0

    def propose(self, rows: Sequence[Live], most: Sequence[int], go_on: GoOn) -> Proposal:
        self.asked += len(rows)
        return Proposal(rows, [[self.token] * count for count in most], [[0.5] * count for count in most])


@pytest.mark.parametrize("family", ["lean", "phi"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_drafted_token_that_the_target_cannot_read_ends_no_request(family: str, temperature: float):
    """Its NaN reaches the tokens before it in some kernels: the row goes on without drafts, and what was read is
    forgotten."""
    broken: Any = model_of(family)
    sampling = Sampling(14, temperature=temperature, seed=4)
    written = {token for c in generate(broken, PROMPTS, sampling) for token in c.tokens}
    bad = next(token for token in range(10, broken.config.vocab_size) if token not in written)
    draft = Stubborn(bad)
    engine = Engine(broken, None, {"bad": draft}, Fixed("bad", 2), max_batch=3)
    with torch.no_grad():
        broken.get_input_embeddings().weight[bad] = torch.nan
    events = serve(engine, requests_of(PROMPTS, sampling))
    assert all(event.error is None and len(event.tokens) == 14 and bad not in event.tokens for event in events)
    if temperature == 0:
        assert [event.tokens for event in events] == [c.tokens for c in generate(broken, PROMPTS, sampling)]
    assert draft.asked == len(PROMPTS)  # once for each


# -- drafts side by side -----------------------------------------------------------------------------------------------


def tapping(model: Any, taps: tuple[int, ...]) -> FeatureDraft:
    torch.manual_seed(sum(taps))
    return FeatureDraft(FeatureNet(feature_shape(model, taps, inner=24)), model)


def test_every_draft_reads_the_hidden_states_of_its_own_layers():
    """Beside drafts that read others, each proposes what it proposes alone."""
    model = target()
    makers: dict[str, tuple[int, ...]] = {"one": (1,), "two": (2, 0), "three": (1, 2)}
    sampling = Sampling(15, temperature=1.1, seed=6)
    requests = [
        Request(f"{name}{index}", tuple(prompt), sampling, (index,), route=name)
        for index, prompt in enumerate(PROMPTS)
        for name in makers
    ]

    def served(names: list[str]) -> dict[str, tuple[list[int], Counters]]:
        drafts: dict[str, Draft] = {name: tapping(model, makers[name]) for name in names}
        engine = Engine(model, None, {**drafts, "ngram": NgramDraft(size=2)}, Fixed(None, 3), max_batch=4)
        wanted = [request for request in requests if request.route in names]
        events = serve(engine, wanted)
        return {e.id: (e.tokens, replace(e.counters, alpha_sum=0.0)) for e in events if e.counters}

    together = served(list(makers))
    alone = served(["one"]) | served(["two"]) | served(["three"])
    assert together == alone


def test_a_controller_that_chooses_a_draft_which_is_not_there_is_refused():
    model, ngram = target(), NgramDraft()
    for controller, missing in (
        (Fixed("layers", 2), "layers"),
        (Adaptive("layers", ngram=("ngram", ngram)), "layers"),
        (Adaptive(None, ngram=("other", ngram)), "other"),
    ):
        with pytest.raises(PreflightError, match=rf"engine's drafts \(ngram\), found {missing}"):
            Engine(model, None, {"ngram": ngram}, controller, max_batch=2)
    assert Engine(model, None, {"ngram": ngram}, Adaptive(None, ngram=("ngram", ngram)), max_batch=2)


def test_probing_leaves_nothing_behind():
    model: Any = tiny("phi")
    weight = model.get_input_embeddings().weight
    controller = Adaptive(None)
    engine = Engine(model, None, {}, controller, max_batch=2)
    kept = weight[0].clone()
    with torch.no_grad():
        weight[0] = torch.nan  # the token that is tried
    engine.probe((1, 14, 200))
    with torch.no_grad():
        weight[0] = kept
    assert sorted(controller.verify.known) == [1, 14]  # 200 are more than the context
    prompts = [[5, 6, 7], [*range(5, 17)]]  # the second reads columns that are the probe's in the first one's slot
    sampling = Sampling(8, temperature=0)
    events = serve(engine, requests_of(prompts, sampling))
    assert [event.tokens for event in events] == [c.tokens for c in generate(model, prompts, sampling)]


class Timed(Adaptive):
    """Of a slow target and quick drafts, whatever this machine does meanwhile."""

    def record(self, round_: Round) -> None:
        step_s, verify_s = dict.fromkeys(round_.step_seconds, 0.01), 0.2 + 0.001 * round_.rows * round_.width
        drafting = {name: 0.01 * (round_.width - 1) for name in round_.draft_seconds}
        seconds = verify_s + sum(drafting.values())
        super().record(
            replace(
                round_, seconds=seconds, verify_seconds=verify_s, draft_seconds=drafting, step_seconds=step_s, read={}
            )
        )


def test_adaptive_with_two_routes_changes_no_greedy_token():
    model = target()
    drafts: dict[str, Draft] = {"good": layers_draft(model, range(2)), "bad": layers_draft(target(scale=0.6), [0])}
    sampling = Sampling(50, temperature=0)
    prompts = [prompt for prompt in PROMPTS for _ in drafts]
    routes = [*drafts] * len(PROMPTS)
    requests = [
        replace(request, route=route) for request, route in zip(requests_of(prompts, sampling), routes, strict=True)
    ]
    controller = Timed(None, max_gamma=4)
    events = serve(Engine(model, None, drafts, controller, max_batch=3), requests)
    assert [event.tokens for event in events] == [c.tokens for c in generate(model, prompts, sampling)]
    drafted = {name: sum(e.counters.drafted for e, r in zip(events, routes, strict=True) if e.counters and r == name)
               for name in drafts}  # fmt: skip
    assert drafted["good"] > drafted["bad"] > 0
