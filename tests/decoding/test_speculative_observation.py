"""What the engine shows of its passes: the right distribution at the right index, and nothing that costs a pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from speculative_helpers import DRAFTS, copy_of, feature, full_logits, requests_of, serve, target
from test_decoding_generate import prompts_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from limbeck.decoding import Engine, Fixed, Observation, Observed, Request, Sampling, layers_draft
from limbeck.decoding.drafts import Block, Proposal
from limbeck.decoding.judge import _Unit
from limbeck.decoding.live import Live

STOP = 2
SAMPLING = Sampling(17, temperature=1.1, top_p=0.9, repetition_penalty=1.2, seed=2, stop_tokens=(STOP,))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return target()


class Watch:
    """Keeps what each pass showed, the views copied."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Observed]] = {}
        self.logits: dict[str, list[torch.Tensor]] = {}
        self.hidden: dict[str, list[torch.Tensor]] = {}

    def __call__(self, seen: Observation) -> None:
        for row in seen.rows:
            self.rows.setdefault(row.request.id, []).append(row)
            self.logits.setdefault(row.request.id, []).append(row.logits_nV.clone())
            if row.hidden_TF is not None:
                self.hidden.setdefault(row.request.id, []).append(row.hidden_TF.clone())


def watched(model: Any, draft: Any, requests: list[Request], gamma: int = 3) -> tuple[Watch, Engine, dict[str, Any]]:
    watch = Watch()
    engine = Engine(model, None, {"draft": draft}, Fixed("draft", gamma), max_batch=4, observer=watch)
    return watch, engine, {event.id: event for event in serve(engine, requests)}


@pytest.mark.parametrize("kind", ["layers", "layers of some tokens", "feature", "ngram"])
def test_each_index_has_its_distribution_once(model: LlamaForCausalLM, kind: str):
    requests = requests_of(prompts_of(7), SAMPLING)
    watch, _, events = watched(model, DRAFTS[kind](model), requests)
    for request in requests:
        text = [*request.tokens, *events[request.id].tokens]
        seen = [index for row in watch.rows[request.id] for index in range(row.start, row.start + len(row.logits_nV))]
        assert seen == list(range(len(request.tokens), len(text)))
        found_NV = torch.cat(watch.logits[request.id])
        expected_NV = full_logits(model, text)[len(request.tokens) - 1 : -1]  # row i - 1 predicts token i
        torch.testing.assert_close(found_NV, expected_NV, atol=1e-4, rtol=0)
        for row in watch.rows[request.id]:
            count = len(row.logits_nV)
            assert list(row.tokens) == text  # one list, shared
            assert row.verified == len(row.alpha) == len(row.alpha_raw) <= count <= row.verified + 1
            assert row.tokens[row.start : row.start + row.accepted] == list(row.drafted[: row.accepted])
            if row.rejected is not None:
                assert row.rejected == row.start + count - 1 and row.verified == count
                assert text[row.rejected] != row.drafted[row.accepted]
        first = watch.rows[request.id][0]
        assert first.verified == 0 and first.draft is None  # the pass that read the prompt


def test_overlaps_are_those_of_the_two_models(model: LlamaForCausalLM):
    draft = layers_draft(model, [0], ids_D=torch.arange(1, 24, 2))
    requests = requests_of(prompts_of(5), Sampling(20, temperature=0.7, top_k=6, seed=1))
    watch, _, _ = watched(model, draft, requests)
    own: Any = draft.reader.model
    checked = 0
    for request in requests:
        for row in watch.rows[request.id]:
            assert row.draft == (None if not row.drafted else "draft")
            for place in range(row.verified):
                index = row.start + place
                text = list(row.tokens[:index])
                assert list(row.drafted[:place]) == text[row.start :]
                # Odd tokens, and those of the request itself, of which it could know the ones before this round.
                known = sorted({*range(1, 24, 2), *row.tokens[: row.start]})
                p_V = full_logits(model, text)[-1]
                q_V = torch.full_like(p_V, -torch.inf)
                q_V[known] = full_logits(own, text)[-1][known]
                raw = torch.minimum(p_V.softmax(-1), q_V.softmax(-1)).sum().item()
                assert row.alpha_raw[place] == pytest.approx(raw, abs=1e-4)
                top = [logits.topk(6) for logits in (p_V / 0.7, q_V / 0.7)]
                served = torch.stack(
                    [torch.zeros_like(p_V).scatter(0, found.indices, found.values.softmax(-1)) for found in top]
                )
                assert row.alpha[place] == pytest.approx(served.amin(0).sum().item(), abs=1e-4)
                checked += 1
    assert checked > 40


class Largest(TorchDispatchMode):
    """The most numbers that any operation has made, views apart, which share the memory of what they are of."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        own = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in own:
            self.most = max(self.most, result.numel())
        return result


def test_a_reduced_head_is_compared_without_a_pass_over_the_vocabulary():
    """1 of 8 rows of the head: nothing as large as the target's logits is made beside them."""
    vocabulary, width = 4096, 4
    row = Live(Request("a", (5, 6), Sampling(9, temperature=0)), 11, 0)
    ids_D = torch.arange(0, vocabulary, 8)
    raw_BGD = torch.randn(1, width - 1, len(ids_D))
    proposal = Proposal([row], [[0, 8, 16]], [[0.5] * 3], raw_BGD, None, torch.tensor([[0, 1, 2]]), ids_D)
    logits_BQV = torch.randn(1, width, vocabulary)
    unit = _Unit([row], logits_BQV, [Block("draft", proposal, 0)])
    total_BQ = logits_BQV.logsumexp(-1)
    with Largest() as largest:
        found_BG = unit._alpha_raw(total_BQ)
    assert 0 < largest.most <= (width - 1) * len(ids_D)
    p_BGD = logits_BQV.double().softmax(-1)[:, :-1, ids_D]
    expected_BG = torch.minimum(p_BGD, raw_BGD.double().softmax(-1)).sum(-1)
    torch.testing.assert_close(found_BG.double(), expected_BG, atol=1e-6, rtol=0)


def test_greedy_overlaps_are_one_or_zero_and_raw_ones_are_not(model: LlamaForCausalLM):
    watch, _, _ = watched(model, layers_draft(model, [0]), requests_of(prompts_of(5), Sampling(20, temperature=0)))
    rows = [row for rows in watch.rows.values() for row in rows]
    for row in rows:
        assert list(row.alpha) == [1.0] * row.accepted + [0.0] * (row.verified - row.accepted)
    assert all(0 < value < 1 for row in rows for value in row.alpha_raw)


def test_the_hidden_states_of_a_request_follow_each_other(model: LlamaForCausalLM):
    draft = feature(model)
    requests = requests_of(prompts_of(6), SAMPLING)
    watch, engine, events = watched(model, draft, requests)
    assert engine.taps == draft.taps == (1, 2)
    for request in requests:
        text = [*request.tokens, *events[request.id].tokens]
        with torch.no_grad():
            states = model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states
        expected_TF = torch.cat([states[tap][0] for tap in engine.taps], -1)[:-1]  # the last token was never read
        torch.testing.assert_close(torch.cat(watch.hidden[request.id]), expected_TF, atol=1e-4, rtol=0)
        assert [len(piece) for piece in watch.hidden[request.id]][1:] == [len(p) for p in watch.logits[request.id]][1:]


def test_no_pass_is_made_for_the_observer(model: LlamaForCausalLM):
    requests = requests_of(prompts_of(6), SAMPLING)
    passes: list[int] = []
    for observer in (None, Watch()):
        forwards: list[int] = []
        draft = layers_draft(model, [0])
        engine = Engine(model, None, {"draft": draft}, Fixed("draft", 3), max_batch=4, observer=observer)
        before, engine.target_passes = engine.target_passes, 0
        assert before == 0
        # Both ways of reading begin with the embedding.
        handle = model.model.embed_tokens.register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        serve(engine, requests)
        handle.remove()
        assert len(forwards) == engine.target_passes
        passes.append(engine.target_passes)
    assert passes[0] == passes[1]


def test_a_request_that_is_not_to_be_trained_on_is_not_shown(model: LlamaForCausalLM):
    requests = [
        Request(str(index), tuple(prompt), SAMPLING, (index,), train=index % 2 == 0)
        for index, prompt in enumerate(prompts_of(6))
    ]
    watch, _, events = watched(model, copy_of(model, 0.05), requests)
    assert set(watch.rows) == {"0", "2", "4"} and len(events) == 6
    assert watched(model, copy_of(model, 0.05), [r for r in requests if not r.train])[0].rows == {}


def test_the_version_is_the_one_that_drafted(model: LlamaForCausalLM):
    draft, watch = layers_draft(model, [0]), Watch()
    engine = Engine(model, None, {"draft": draft}, Fixed("draft", 2), max_batch=1, observer=watch)
    weights = dict(draft.reader.model.named_parameters())
    requests = requests_of([[5, 6]], Sampling(20, temperature=0))
    serve(engine, requests, after=lambda steps: draft.prepare(weights, steps)())
    versions = [row.version for row in watch.rows["0"] if row.drafted]
    assert versions == sorted(versions) and versions[0] == 0 and len(set(versions)) == len(versions)
