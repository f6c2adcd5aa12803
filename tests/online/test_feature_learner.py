"""The feature draft as something that learns: what it is trained on is what it serves, step by step, index by index."""

from __future__ import annotations

import copy
import json
import pickle
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from online_helpers import GREEDY, VOCABULARY, llama, prompts, record, saved, submit_all, target_logprobs
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.decoding import Engine, FeatureDraft, FeatureNet, Fixed, Request, Sampling, feature_shape, generate
from limbeck.decoding.drafts.feature_files import feature_net, is_feature, load_feature, save_feature
from limbeck.errors import CheckpointError, LimbeckError, ModelError, PreflightError
from limbeck.models import cast, load_model, load_tokenizer, output_head
from limbeck.online import Buffer, FeatureLearner, Gate, Lot, Trace, Training, Versions, feature_learner
from limbeck.online.learner import acceptances, batch, fit, mean_acceptance, optimiser_of
from limbeck.online.objective import acceptance
from limbeck.online.server.serving import Options, assemble
from limbeck.online.updater import Job, Worker
from limbeck.ops.chunked import head_logits
from limbeck.types import Sparse


class Recorded(FeatureDraft):
    """Reads the columns as the buffer keeps them, in bfloat16, and keeps what it proposed: the raw log-probabilities of
    each step, by the request and the index of the first drafted token."""

    proposed: dict[tuple[str, int], Tensor]

    def settle(self, row: Any, known: int, hidden_TF: Tensor | None) -> None:
        assert hidden_TF is not None
        super().settle(row, known, hidden_TF.to(torch.bfloat16).float())

    def propose(self, rows: Any, most: Any, go_on: Any) -> Any:
        proposal = super().propose(rows, most, go_on)
        assert proposal.raw_BGD is not None
        for place, row in enumerate(rows):
            logprobs_GV = proposal.raw_BGD[place].log_softmax(-1)
            self.proposed[row.request.id, len(row.tokens)] = logprobs_GV[: len(proposal.tokens[place])]
        return proposal


def _texts(count: int) -> list[tuple[int, ...]]:
    """Prompts of 1 to 5 tokens."""
    return [text[: 1 + place % 5] for place, text in enumerate(prompts(count))]


def _served(**changes: Any) -> tuple[Any, Recorded, Buffer, list[Any]]:
    model = llama()  # near to uniform: much is accepted, and later steps are seen
    draft = Recorded(feature_net(model, seed=3), model)
    draft.proposed = {}
    buffer = Buffer(**{"positions": "all", "top": VOCABULARY, "taps": True, **changes})
    _, seen = record(model, draft, buffer, _texts(12), gamma=4)
    return model, draft, buffer, seen


def _by_step(learner: FeatureLearner, traces: list[Trace]) -> dict[tuple[str, int, int], Tensor]:
    """Log-probabilities (V,) of all lessons, by the request's id, the index that is predicted, and the step."""
    made = batch(traces)
    with torch.no_grad():
        hidden_MH, head, place_M = learner.lessons(made)
        logprobs_MV = head_logits(hidden_MH, head).log_softmax(-1)
    found: dict[tuple[str, int, int], Tensor] = {}
    for place, logprobs_V in zip(place_M.tolist(), logprobs_MV, strict=True):
        id_, index = traces[int(made.row_N[place])].id, int(made.index_N[place])
        step = next(step for step in range(9) if (id_, index, step) not in found)
        found[id_, index, step] = logprobs_V
    return found


def test_what_is_trained_is_what_is_served() -> None:
    """Distributions of the serving draft, from live rounds, against the learner's at the same index and step."""
    model, draft, buffer, seen = _served()
    learner = FeatureLearner(copy.deepcopy(draft.net), model, steps=4)
    found = _by_step(learner, list(buffer.traces))
    compared = [0] * 4
    for row in seen:
        if not row.drafted:
            continue
        logprobs_GV = draft.proposed[row.request.id, row.start]
        for step in range(min(row.accepted + 1, len(row.drafted))):  # behind accepted ones: the text's own tokens
            mine_V = found[row.request.id, row.start + step, step]
            torch.testing.assert_close(mine_V, logprobs_GV[step], atol=1e-5, rtol=0)
            compared[step] += 1
    assert min(compared) >= 10, compared


def test_every_position_has_each_step_that_fits_before_it() -> None:
    """An index i has i - 1 columns that could predict it; all of the first step are there, in the batch's order."""
    model, draft, buffer, _ = _served()
    learner = FeatureLearner(copy.deepcopy(draft.net), model, steps=3)
    traces = list(buffer.traces)
    made = batch(traces)
    expected = {
        (trace.id, int(index), step)
        for trace in traces
        for index in trace.positions
        for step in range(3)
        if index - 2 - step >= 0
    }
    assert min(index for _, index, _ in expected) == 2 and set(_by_step(learner, traces)) == expected
    with torch.no_grad():
        first_NH, _ = learner.predict(made)
        hidden_MH, _, place_M = learner.lessons(made)
    count = len(made.index_N)
    assert torch.equal(place_M[:count], torch.arange(count))
    torch.testing.assert_close(first_NH, hidden_MH[:count])


def test_the_loss_is_the_mean_over_all_steps_of_all_positions() -> None:
    """KL(p || q) of each, p being the target's distribution at the index that is predicted."""
    model, draft, buffer, _ = _served()
    learner, traces = FeatureLearner(copy.deepcopy(draft.net), model), list(buffer.traces)
    width = max(len(trace.tokens) for trace in traces)
    losses: list[float] = []
    divergences: list[float] = []
    for (id_, index, _), logprobs_V in _by_step(learner, traces).items():
        tokens = next(trace for trace in traces if trace.id == id_).tokens
        p_V = target_logprobs(model, tokens.tolist())[index]
        divergences.append(float((p_V.exp() * (p_V - logprobs_V)).sum()))
    training = Training(objective="forward_kl", measures=1, batch_tokens=width * len(traces), least_steps=0)
    fit(
        learner,
        optimiser_of(learner, training),
        traces,
        [],
        training,
        torch.Generator(),
        measured=lambda steps, loss, alpha: losses.append(loss),
    )
    assert losses == [pytest.approx(sum(divergences) / len(divergences), rel=2e-3)]


def test_the_gate_measures_what_the_first_drafted_token_is_accepted_with() -> None:
    model, draft, buffer, seen = _served()
    learner = FeatureLearner(copy.deepcopy(draft.net), model)
    made = batch(list(buffer.traces))
    with torch.no_grad():
        alpha_N = acceptance(*learner.predict(made), made.signal, None)
    ids = [list(buffer.traces)[row].id for row in made.row_N.tolist()]
    mine = dict(zip(zip(ids, made.index_N.tolist(), strict=True), alpha_N.tolist(), strict=True))
    served = {(row.request.id, row.start): row.alpha_raw[0] for row in seen if row.alpha_raw}
    assert len(served) > 50
    assert all(mine[key] == pytest.approx(alpha, abs=2e-3) for key, alpha in served.items())


def test_gradients_go_through_the_drafted_steps() -> None:
    """Of the last step alone, against a difference quotient in float64."""
    model, draft, buffer, _ = _served()
    learner = FeatureLearner(copy.deepcopy(draft.net), model, steps=3)
    learner.net.double()
    learner.embedding.double()
    made = batch(list(buffer.traces)[:3])
    assert made.columns_BTF is not None
    made = replace(made, columns_BTF=made.columns_BTF.double())
    weigh_MH = torch.randn_like(learner.lessons(made)[0])
    weigh_MH[: int((made.index_N >= 2).sum() + (made.index_N >= 3).sum())] = 0

    def loss() -> Tensor:
        return (learner.lessons(made)[0] * weigh_MH).sum()

    loss().backward()
    for name in ("fuse.weight", "k.weight", "v.weight", "down.weight"):
        weight: Any = learner.trained()[name]
        direction = torch.randn_like(weight)
        with torch.no_grad():
            weight += 1e-5 * direction
            above = loss()
            weight -= 2e-5 * direction
            below = loss()
            weight += 1e-5 * direction
        slope = float((above - below) / 2e-5)
        assert float((weight.grad * direction).sum()) == pytest.approx(slope, rel=1e-4), name
    assert all(not weight.requires_grad for weight in learner.embedding.parameters())


def test_what_a_feature_draft_cannot_learn_from_is_refused_or_not_kept() -> None:
    model, draft, buffer, seen = _served()
    learner = FeatureLearner(copy.deepcopy(draft.net), model)
    trace = next(trace for trace in buffer.traces if len(trace.tokens) > 8 and trace.positions[0] == 2)
    early = replace(trace, positions=trace.positions - 1)
    assert trace.columns_TF is not None
    for bad, found in (
        (replace(trace, columns_TF=None), "found none"),
        (replace(trace, columns_TF=trace.columns_TF[:, :32]), "found 32"),
        (early, "positions from 2 on to train on, found 1"),
    ):
        with pytest.raises(ModelError, match=found):
            learner.predict(batch([bad]))
    # A prompt of one token: the token after it, at index 1, is no draft's.
    ones = [row.request.id for row in seen if row.start == 1]
    kept = {trace.id: trace.positions.tolist() for trace in buffer.traces}
    assert len(ones) == 3 and all(kept[id_][0] == 2 for id_ in ones)


def test_the_learner_has_two_weights_of_the_target_and_changes_none(tmp_path: Path) -> None:
    """Tied ones once; the rows of the head are those that serve, not the padding behind them."""
    model: Any = llama()
    model.tie_weights()
    model.lm_head.weight = model.model.embed_tokens.weight
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    learner = FeatureLearner(feature_net(model), cast(copy.deepcopy(model), torch.bfloat16))
    held: Any = learner.embedding
    assert learner.head.weight_VH.data_ptr() == held.weight.data_ptr() and held.weight.dtype == torch.float32
    FeatureLearner(feature_net(model), model).embedding.weight.data.zero_()  # pyright: ignore
    assert all(torch.equal(weight, before[name]) and weight.requires_grad for name, weight in model.named_parameters())
    built = feature_learner(saved(llama(), tmp_path), vocabulary=VOCABULARY - 3)
    assert built.head.size == VOCABULARY - 3 and output_head(llama()).size == VOCABULARY


def test_a_net_serves_in_the_targets_precision() -> None:
    model = cast(llama(), torch.bfloat16)
    draft, net = FeatureDraft(feature_net(model), model), feature_net(model)
    draft.prepare(dict(net.named_parameters()), 1)()
    record(model, draft, Buffer(positions="all", taps=True), prompts(2))
    assert {weight.dtype for weight in draft.net.parameters()} == {torch.bfloat16} and draft.version == 1


# -- learning ---------------------------------------------------------------------------------------------------------


def _lot(model: Any) -> Lot:
    buffer = Buffer(positions="all", top=32, taps=True)
    draft = FeatureDraft(feature_net(model), model)
    record(model, draft, buffer, prompts(64), keep=lambda place: place % 2 == 0, tokens=32)
    return buffer.take(10**6)


@pytest.fixture(scope="module")
def model() -> Any:
    return llama(scale=0.2)


@pytest.fixture(scope="module")
def lot(model: Any) -> Lot:
    return _lot(model)


@pytest.mark.parametrize("ids", [None, list(range(0, VOCABULARY, 2))])
def test_training_raises_acceptance(model: Any, lot: Lot, ids: list[int] | None) -> None:
    """On requests that it has not seen."""
    learner = FeatureLearner(feature_net(model), model, ids_D=None if ids is None else torch.tensor(ids))
    before = mean_acceptance(acceptances(learner, lot.gate, 2048))
    training = Training(learning_rate=3e-3, epochs=12)
    fit(learner, optimiser_of(learner, training), lot.train, lot.stop, training, torch.Generator().manual_seed(0))
    after = mean_acceptance(acceptances(learner, lot.gate, 2048))
    assert before is not None and after is not None and after > before + 0.05, (before, after)


def test_later_steps_are_learnt_from_stories(shared: Path) -> None:
    """A draft that is trained on the first step alone, longer or not, does not know what to make of its own states."""
    folder = shared / "models" / "stories260k"
    target, tokenizer = load_model(folder), load_tokenizer(folder)
    with (shared / "data" / "tinystories_train.jsonl").open() as lines:
        rows = [json.loads(next(lines))["text"] for _ in range(80)]
    texts = [tuple(tokenizer(text[:60])["input_ids"][:12]) for text in rows]
    buffer = Buffer(positions="all", top=32, taps=True)
    record(target, FeatureDraft(feature_net(target), target), buffer, texts, tokens=56, gamma=0)
    traces = list(buffer.traces)

    def accepted(steps: int) -> list[float]:
        """Of unseen answers: the first and the third drafted token."""
        learner = FeatureLearner(feature_net(target), target, steps=steps)
        training = Training(learning_rate=4e-3, batch_tokens=512, epochs=8, patience=99)
        fit(learner, optimiser_of(learner, training), traces[:60], traces[60:64], training, torch.Generator())
        learner.steps, made, given = 3, batch(traces[64:]), batch(traces[64:]).signal
        with torch.no_grad():
            hidden_MH, head, place_M = learner.lessons(made)
            signal = Sparse(given.tokens_NK[place_M], given.logprobs_NK[place_M], given.tail_logprob_N[place_M])
            alpha_M = acceptance(hidden_MH, head, signal, None)
        return [float(alpha_M[: len(made.index_N)].mean()), float(alpha_M[2 * len(made.index_N) :].mean())]

    through, first = accepted(3), accepted(1)
    print(f"first and third drafted token: {through}, trained on the first alone: {first}")
    assert through[0] > 0.2 and through[1] > 0.15 and through[1] > first[1] + 0.05


def test_a_swap_in_the_middle_changes_no_text(tmp_path: Path, model: Any, lot: Lot) -> None:
    """What the updater's worker has written to disk, put into the serving draft between two rounds."""
    build = pickle.loads(pickle.dumps(partial(feature_learner, saved(model, tmp_path / "model"))))
    versions = Versions(tmp_path / "versions")
    worker = Worker(build(), versions, Training(learning_rate=3e-3, epochs=12), Gate(), 0, lambda: None)
    result = worker.run(Job(0, lot))
    assert result.verdict.kind == "better" and result.number == 1
    draft = FeatureDraft(feature_net(model), model)
    assert all(torch.equal(weight, versions.weights(0)[name]) for name, weight in draft.net.named_parameters())
    engine = Engine(model, None, {"feature": draft}, Fixed("feature", 3), max_batch=4)
    texts = prompts(12, seed=9)
    for place, text in enumerate(texts):
        engine.add(Request(str(place), text, replace(GREEDY, max_tokens=40), (place,)))
    written: dict[str, list[int]] = {str(place): [] for place in range(12)}
    rounds = 0
    while engine.busy:
        rounds += 1
        if rounds == 8:
            draft.prepare(versions.weights(1), 1)()
        for event in engine.step():
            written[event.id] += event.tokens
    expected = generate(model, [list(text) for text in texts], replace(GREEDY, max_tokens=40))
    assert list(written.values()) == [one.tokens for one in expected]
    assert draft.version == 1
    restarted = Worker(build(), versions, Training(), Gate(), 0, lambda: None)
    assert restarted.base == 1
    assert all(torch.equal(w, versions.weights(1)[name]) for name, w in restarted.learner.trained().items())


def test_the_served_feature_draft_learns(shared: Path, tmp_path: Path) -> None:
    """`limbeck serve --draft-kind feature`, the updater in its process: a swap under way, the text plain greedy's."""
    folder = str(shared / "models" / "stories260k")
    served, described = assemble(Options(folder, draft_kind="feature", folder=tmp_path, gamma=3), None)
    assert described.startswith("a layer on the target's hidden states, fresh, cold; learning, versions in ")
    service, engine = served.service, served.service.engine
    draft, learning = engine.drafts["feature"], served.service.learning["feature"]
    texts = [tuple(served.tokenizer(f"{word} upon a")["input_ids"]) for word in ("Once", "Lily", "Tom", "One day")]
    greedy = Sampling(60, temperature=0.0)
    expected = [one.tokens for one in generate(engine.reader.model, [list(text) for text in texts], greedy)]
    with service:
        submit_all(service, Sampling(24), texts * 5, keep_all=True).wait(60)
        submit_all(service, Sampling(40), texts * 10, start=100).wait(60)
        service.force_update()
        end = time.monotonic() + 60
        while draft.version == 0:
            assert time.monotonic() < end, learning.tally
            listener = submit_all(service, greedy, texts, start=1000)
            listener.wait(60)
            assert [listener.tokens(f"r{1000 + place}") for place in range(4)] == expected
        listener = submit_all(service, greedy, texts, start=2000)
        listener.wait(60)
        assert [listener.tokens(f"r{2000 + place}") for place in range(4)] == expected
    assert learning.versions.newest() == draft.version >= 1
    _, again = assemble(Options(folder, draft_kind="feature", folder=tmp_path, gamma=3), None)
    assert f"version {draft.version} of" in again


# -- on disk ----------------------------------------------------------------------------------------------------------


def test_a_saved_draft_is_the_same_draft(tmp_path: Path, model: Any) -> None:
    net, place = feature_net(model, seed=5), tmp_path / "draft"
    assert not is_feature(place)
    save_feature(net, place)
    found = feature_net(model, place)
    assert is_feature(place) and found.shape == net.shape
    for (name, weight), (other, mine) in zip(net.named_parameters(), found.named_parameters(), strict=True):
        assert name == other and torch.equal(weight, mine) and mine.requires_grad
    assert not torch.equal(feature_net(model).fuse.weight, net.fuse.weight)
    before = torch.get_rng_state()
    assert torch.equal(feature_net(model, seed=5).fuse.weight, net.fuse.weight)
    assert torch.equal(torch.get_rng_state(), before)
    wide = FeatureNet(replace(feature_shape(model), taps=(1, 2, 3)))
    save_feature(wide, tmp_path / "wide")
    with pytest.raises(PreflightError, match="with 2 layers, found one for width 32 that reads layer 3"):
        feature_net(model, tmp_path / "wide")
    with pytest.raises(CheckpointError, match="expected a folder for a feature draft"):
        save_feature(net, place / "feature.json")


def test_a_broken_draft_is_refused_in_one_line(tmp_path: Path, model: Any) -> None:
    place = tmp_path / "draft"
    net = feature_net(model)
    good: dict[str, Any] = {}

    def broken(match: str) -> None:
        with pytest.raises(LimbeckError, match=match) as refused:
            load_feature(place)
        assert isinstance(refused.value, CheckpointError) and "\n" not in str(refused.value)
        save_feature(net, place)

    broken("No such file")
    good = json.loads((place / "feature.json").read_text())
    for bad in ("{", "[]", json.dumps({**good, "width": "x"}), json.dumps({**good, "more": 1}), '{"taps": [1]}'):
        (place / "feature.json").write_text(bad)
        broken("expected a feature draft")
    (place / "feature.json").write_text(json.dumps({**good, "inner": 7}))
    broken("size mismatch")
    (place / "model.safetensors").write_bytes((place / "model.safetensors").read_bytes()[:-5])
    broken("SafetensorError")
    weights = load_file(place / "model.safetensors")
    del weights["fuse.weight"]
    save_file(weights, place / "model.safetensors")
    broken("Missing key")
