"""Training on traces, and what the updater's process does with a job, without the process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from online_helpers import VOCABULARY, llama, prompts, record, saved, target_logprobs

from limbeck.decoding.drafts.layers import layers_draft
from limbeck.errors import CheckpointError, RecipeError
from limbeck.models import cut_layers, fingerprint, load_model, load_tokenizer
from limbeck.online import Buffer, Lot, ModelLearner, Training, Versions
from limbeck.online import learner as learner_module
from limbeck.online.gate import Gate
from limbeck.online.learner import (
    Average,
    Fitted,
    _order,
    acceptances,
    batches,
    fit,
    mean_acceptance,
    model_learner,
    optimiser_of,
    restore,
    snapshot,
)
from limbeck.online.updater import Job, Throttle, Worker, next_rate
from limbeck.online.versions import Version


def _lot(model: Any, draft: Any, texts: list[tuple[int, ...]], **changes: Any) -> Lot:
    buffer = Buffer(**{"positions": "all", "top": 32, **changes})
    record(model, draft, buffer, texts, keep=lambda place: place % 2 == 0, tokens=32)
    return buffer.take(10**6)


@pytest.fixture(scope="module")
def lot() -> Lot:
    model = llama(scale=0.2)
    return _lot(model, layers_draft(model, [0]), prompts(64))


def _learner(**changes: Any) -> ModelLearner:
    return ModelLearner(cut_layers(llama(scale=0.2), [0]), **changes)


@pytest.mark.parametrize("ids", [None, list(range(0, VOCABULARY, 2))])
def test_acceptances_are_those_of_target_and_draft(ids: list[int] | None) -> None:
    """Against forwards of both models over the whole texts, whatever the batches."""
    model = llama(scale=0.2)
    buffer = Buffer(positions="all", top=VOCABULARY)
    texts, _ = record(model, layers_draft(model, [0]), buffer, prompts(10))
    learner = _learner(ids_D=None if ids is None else torch.tensor(ids))
    traces = list(buffer.traces)
    found = acceptances(learner, traces, 2048)
    for trace in traces:
        p_TV = target_logprobs(model, texts[trace.id]).exp()
        q_TV = target_logprobs(learner.model, texts[trace.id])
        if ids is not None:
            q_TV = q_TV.masked_fill(~torch.isin(torch.arange(VOCABULARY), torch.tensor(ids)), -torch.inf)
        alpha_N = torch.minimum(p_TV, q_TV.softmax(-1)).sum(-1)[trace.positions]
        assert found[trace.number] == (pytest.approx(float(alpha_N.mean()), abs=2e-3), trace.size)
    again = acceptances(learner, traces[::-1], 40)
    assert all(again[number][0] == pytest.approx(alpha, abs=1e-5) for number, (alpha, _) in found.items())


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "jsd", "total_variation", "blend"])
def test_training_raises_held_out_acceptance(lot: Lot, objective: str) -> None:
    learner, training = _learner(), Training(objective=objective, learning_rate=3e-3, epochs=6)
    fitted = fit(learner, optimiser_of(learner, training), lot.train, lot.stop, training, torch.Generator())
    assert fitted.before is not None and fitted.after is not None
    assert fitted.after > fitted.before + 0.01
    measured = mean_acceptance(acceptances(learner, lot.stop, 2048))
    assert measured == pytest.approx(fitted.after, abs=1e-6)  # the weights are those of the best measure


def test_it_stops_on_acceptance_with_the_best_weights(lot: Lot) -> None:
    """A learning rate that ruins the draft while it trains: the weights are those from before."""
    learner, training = _learner(), Training(learning_rate=3.0, epochs=50, patience=2, measures=1)
    before = snapshot(learner)
    fitted = fit(learner, optimiser_of(learner, training), lot.train, lot.stop, training, torch.Generator())
    assert all(torch.equal(weight, before[name]) for name, weight in learner.trained().items())
    assert fitted.after == fitted.before and fitted.steps < 10 * len(lot.train)


def test_what_serves_is_the_mean_of_what_is_trained(lot: Lot) -> None:
    """Training goes on from where it was, as if nothing were averaged; a call leaves the mean in the learner."""

    def twice(learner: ModelLearner, training: Training, average: Average) -> list[dict[str, torch.Tensor]]:
        optimiser, generator = optimiser_of(learner, training), torch.Generator().manual_seed(0)
        left: list[dict[str, torch.Tensor]] = []
        for _ in range(2):
            fit(learner, optimiser, lot.train, [], training, generator, average=average)
            left.append(snapshot(learner))
        return left

    training, average = Training(learning_rate=3e-3), Average()
    first, second = twice(_learner(), training, average)
    _, last = twice(_learner(), replace(training, average=1), Average())  # the last weights alone
    assert average.own is not None
    for name, weight in average.own.items():
        torch.testing.assert_close(weight, last[name], rtol=0, atol=1e-6)
    assert all(not torch.equal(second[name], last[name]) for name in ("lm_head.weight", "model.norm.weight"))
    assert any(not torch.equal(second[name], first[name]) for name in second)


def test_the_mean_is_that_of_its_formula() -> None:
    learner = _learner()
    (name, weight), *_ = learner.trained().items()
    average, mean, expected = Average(), snapshot(learner), snapshot(learner)[name].double()
    for step in range(1, 4):
        with torch.no_grad():
            weight.add_(0.1 * step)
        average.add(mean, learner, 100)
        expected = expected + 9 / (9 + step) * (weight.detach().double() - expected)
    torch.testing.assert_close(mean[name].double(), expected, rtol=0, atol=1e-6)
    late = Average(steps=10**6)
    late.add(mean, learner, 100)
    with pytest.raises(RecipeError, match="average"):
        Training(average=0)
    torch.testing.assert_close(mean[name].double(), expected + 0.01 * (weight.detach() - expected), rtol=0, atol=1e-6)


def test_a_nan_changes_nothing(lot: Lot) -> None:
    """Nor do the steps since the last measure."""
    learner, training = _learner(), Training(batch_tokens=64, measures=1)
    trace = lot.train[3]
    broken = np.full_like(trace.logprobs_NK, np.nan)
    bad = type(trace)(**{**{name: getattr(trace, name) for name in trace.__dataclass_fields__}, "logprobs_NK": broken})
    before = snapshot(learner)
    train = [*lot.train[:3], bad, *lot.train[4:]]
    fitted = fit(learner, optimiser_of(learner, training), train, lot.stop, training, torch.Generator())
    assert not fitted.finite and fitted.steps > 0
    assert all(torch.equal(weight, before[name]) for name, weight in learner.trained().items())


def test_with_products_in_bf16_it_learns_as_much(lot: Lot) -> None:
    """Acceptance is that of float32 but for rounding, and so is what is gained; the weights stay in float32."""
    exact, rounded = _learner(), _learner(autocast=torch.bfloat16)
    training = Training(learning_rate=3e-3, epochs=6)
    same, near = acceptances(exact, lot.gate, 2048), acceptances(rounded, lot.gate, 2048)
    assert same != near
    assert all(near[number][0] == pytest.approx(alpha, abs=5e-3) for number, (alpha, _) in same.items())
    fits = [
        fit(learner, optimiser_of(learner, training), lot.train, [], training, torch.Generator().manual_seed(0))
        for learner in (exact, rounded)
    ]
    assert fits[0].steps == fits[1].steps
    assert {weight.dtype for weight in rounded.trained().values()} == {torch.float32}
    after = [mean_acceptance(acceptances(exact, lot.gate, 2048))]
    assert any(not torch.equal(weight, snapshot(exact)[name]) for name, weight in rounded.trained().items())
    restore(exact, snapshot(rounded))
    after.append(mean_acceptance(acceptances(exact, lot.gate, 2048)))
    before = mean_acceptance(same)
    assert before is not None and after[0] is not None and after[0] > before + 0.01
    assert after[1] == pytest.approx(after[0], abs=0.2 * (after[0] - before))


def test_the_probe_says_what_a_models_products_are_taken_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def probe(device: torch.device, width: int) -> tuple[torch.dtype, str]:
        asked.append(width)
        return torch.bfloat16, "faster"

    monkeypatch.setattr(learner_module, "probe_autocast", probe)
    assert model_learner(saved(llama(), tmp_path)).autocast == torch.bfloat16 and asked == [32]


def test_stories_are_learnt_from_recorded_traffic(shared: Path) -> None:
    """A cold draft, the first layer of five, on recorded traffic: alpha rises on requests that it has not seen."""
    folder = shared / "models" / "stories260k"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    with (shared / "data" / "tinystories_train.jsonl").open() as lines:
        rows = [json.loads(next(lines)) for _ in range(48)]
    texts = [tuple(tokenizer(row["text"][:60])["input_ids"][:12]) for row in rows]
    traces = _lot(model, layers_draft(model, [0]), texts, positions="rejected")
    learner = ModelLearner(cut_layers(model, [0]))
    training = Training(learning_rate=2e-3, epochs=4)
    before = mean_acceptance(acceptances(learner, traces.gate, 2048))
    fit(learner, optimiser_of(learner, training), traces.train, traces.stop, training, torch.Generator())
    after = mean_acceptance(acceptances(learner, traces.gate, 2048))
    print(f"alpha {before:.3f} -> {after:.3f}")
    assert before is not None and after is not None and before < 0.1 and after > before + 0.1


# -- a job ------------------------------------------------------------------------------------------------------------


def _worker(folder: Path, **changes: Any) -> Worker:
    training = Training(**{"learning_rate": 3e-3, "epochs": 6, **changes})
    return Worker(_learner(), Versions(folder), training, Gate(), 0, lambda: None)


def test_versions_of_an_older_limbeck_are_refused_by_name(tmp_path: Path) -> None:
    learner, versions = _learner(), Versions(tmp_path)
    versions.claim(fingerprint(learner.trained()))
    state = {"rate": torch.tensor(1.0), "generator": torch.Generator().get_state()}  # no weights but those that serve
    versions.save(Version(0, snapshot(learner), state, {}))
    with pytest.raises(CheckpointError, match="version 0 without 'averaged'.*name another folder"):
        _worker(tmp_path)


def test_a_better_draft_is_written_and_a_restart_goes_on_from_it(tmp_path: Path, lot: Lot) -> None:
    """Two updates, and two with a new process between them: the same weights, bit by bit."""
    short: dict[str, Any] = {"batch_tokens": 256, "epochs": 2}
    whole = _worker(tmp_path / "one", **short)
    first = whole.run(Job(0, lot))
    assert first.verdict.kind == "better" and first.number == 1 and first.verdict.gain > 0
    before = snapshot(whole.learner)
    second = whole.run(Job(1, lot))
    assert second.before is not None and second.after is not None and second.after > second.before
    assert any(not torch.equal(weight, before[name]) for name, weight in whole.learner.trained().items())
    _worker(tmp_path / "two", **short).run(Job(0, lot))
    restarted = _worker(tmp_path / "two", **short)
    assert restarted.base == 1
    restarted.run(Job(1, lot))
    for (name, one), other in zip(snapshot(whole.learner).items(), snapshot(restarted.learner).values(), strict=True):
        assert torch.equal(one, other), name


def test_an_update_goes_on_from_what_was_trained(tmp_path: Path, lot: Lot) -> None:
    """Not from the mean that serves; and where that is put back, so is what was trained with it."""
    worker = _worker(tmp_path, epochs=2)
    worker.run(Job(0, lot))
    own, steps = worker.average.own, worker.average.steps
    assert own is not None and steps > 0
    kept = {name: weight.clone() for name, weight in own.items()}
    assert any(not torch.equal(weight, kept[name]) for name, weight in worker.learner.trained().items())
    worker.run(Job(1, lot))
    assert worker.average.steps > steps
    worker._take(1)
    assert worker.average.own is not None and worker.average.steps == steps
    assert all(torch.equal(worker.average.own[name], weight) for name, weight in kept.items())


def test_a_worse_draft_is_refused_and_forgotten(tmp_path: Path, lot: Lot) -> None:
    """Training that makes it worse and does not stop by acceptance, as there is nothing to stop by."""
    worker = _worker(tmp_path, learning_rate=1.0)
    result = worker.run(Job(0, Lot(lot.train, [], lot.gate, [])))
    assert result.verdict.kind == "worse" and result.verdict.gain < 0
    assert result.number is None and worker.versions.numbers() == [0]
    assert all(torch.equal(weight, worker.serving[name]) for name, weight in worker.learner.trained().items())


def test_without_held_out_requests_nothing_passes(tmp_path: Path, lot: Lot) -> None:
    worker = _worker(tmp_path)
    result = worker.run(Job(0, Lot(lot.train, lot.stop, [], [])))
    assert result.verdict.kind == "undecided" and result.number is None
    kept = snapshot(worker.learner)
    again = worker.run(Job(0, Lot(lot.train[:1], [], lot.gate, [])))  # goes on from there
    assert again.verdict.kind == "better" and worker.base == 1
    assert any(not torch.equal(weight, kept[name]) for name, weight in worker.learner.trained().items())


def test_a_version_that_cannot_be_written_does_not_serve(tmp_path: Path, lot: Lot) -> None:
    worker = _worker(tmp_path)
    tmp_path.joinpath(".partial-000001").write_text("")  # a file where a folder must be made
    worker.versions.folder = tmp_path / "origin.json"  # and then a file for a folder
    result = worker.run(Job(0, lot))
    assert result.number is None and result.error is not None and "could not be written" in result.error
    assert worker.base == 0


def test_another_version_is_compared_with_the_one_that_serves(tmp_path: Path, lot: Lot) -> None:
    worker = _worker(tmp_path)
    worker.run(Job(0, lot))
    own = snapshot(worker.learner)
    result = worker.run(Job(1, Lot([], [], lot.gate, []), other=0))
    assert result.verdict.gain < 0  # of version 0 over version 1
    assert all(torch.equal(weight, own[name]) for name, weight in worker.learner.trained().items())


class _Time:
    """A clock that only sleeping and working move on; a core is spent by working alone."""

    def __init__(self) -> None:
        self.now = self.slept = self.spent = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds

    def work(self, seconds: float, waited: float = 0.0) -> None:
        self.now += seconds + waited
        self.spent += seconds

    def throttle(self, numbers: list[float]) -> Throttle:
        return Throttle(numbers, lambda: True, lambda: self.now, lambda: self.spent, self.sleep)


def test_training_keeps_its_share_and_idle_time_is_free() -> None:
    """Time in which it waits for the core is not its own."""
    clock, numbers = _Time(), [1.0, 0.1, 0.0, 0.0, 0.0]
    breathe = clock.throttle(numbers)
    breathe.start()
    for place in range(200):
        numbers[0] = float(place < 100)  # then idle
        breathe()
        clock.work(0.05, waited=0.2)
        if place == 99:
            assert 0.09 < clock.spent / clock.now <= 0.1 + 0.05 / clock.now
            slept = clock.slept
    assert clock.slept == slept  # none while idle
    assert numbers[3] == pytest.approx(clock.spent - 0.05)
    numbers[:2] = [1.0, 1.0]
    breathe()
    assert clock.slept == slept  # cold: no bound


def test_work_that_is_held_stands_still_and_saves_nothing_up() -> None:
    clock, numbers = _Time(), [0.0, 0.1, 0.0, 0.0, 1.0]

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        numbers[4] = float(clock.slept < 10)

    breathe = Throttle(numbers, lambda: True, lambda: clock.now, lambda: clock.spent, sleep)
    breathe.start()
    breathe()
    assert 10 <= clock.slept < 10.1  # idle or not
    numbers[0] = 1.0
    clock.work(0.05)
    breathe()
    assert clock.slept > 10.4  # .05 s are a tenth of half a second: the ten do not count


def test_the_rate_follows_what_training_finds(tmp_path: Path, lot: Lot) -> None:
    """A rate that ruins the draft falls, and a restart goes on with it."""
    worker, rate = _worker(tmp_path, learning_rate=1.0), 1.0
    for _ in range(3):
        result = worker.run(Job(worker.base, lot))
        assert worker.optimiser.param_groups[0]["lr"] == pytest.approx(rate)
        rate = next_rate(rate, Fitted(result.before, result.after, 1, 1))
        assert worker.rate == rate
    assert rate < 1
    worker.versions.save(worker._version(worker.versions.next()))
    assert _worker(tmp_path, learning_rate=1.0).rate == pytest.approx(rate)
    assert next_rate(0.1, Fitted(0.3, 0.4, 1, 1)) == pytest.approx(0.3)
    assert next_rate(0.5, Fitted(0.3, 0.4, 1, 1)) == 1.0
    assert next_rate(0.3, Fitted(0.3, 0.3, 1, 1)) == pytest.approx(0.1)
    assert next_rate(0.3, Fitted(0.3, 0.305, 1, 1)) == next_rate(0.3, Fitted(None, None, 1, 1)) == 0.3


def test_an_epoch_has_enough_steps_and_replays_its_share(lot: Lot) -> None:
    for least, replay in ((8, 0.0), (8, 0.5), (24, 0.5)):
        training = Training(epochs=20, least_steps=least, replay=replay, measures=1)
        made = list(_order(lot.train, lot.gate, training, range(20), torch.Generator().manual_seed(0)))
        sizes = [int(one.real_BT.numel()) for one in made if one is not None]
        most = -(-sum(len(trace.tokens) for trace in lot.train) // least)
        assert max(sizes) <= max(most, max(len(trace.tokens) for trace in lot.train))
        steps, fresh = len(sizes) / 20, len(batches(lot.train, most))
        assert fresh >= least
        assert steps == pytest.approx(fresh / (1 - replay), rel=0.15 if replay else 0)


def test_idle_time_allows_more_epochs_one_by_one(tmp_path: Path, lot: Lot) -> None:
    """Those beyond `epochs` begin only where nobody is served; patience ends them as any others."""
    training = Training(epochs=2, idle_epochs=5, measures=1, patience=99, idle_patience=99)

    def epochs(idle: Callable[[], bool], **changes: Any) -> int:
        learner, changed, count = _learner(), replace(training, **changes), list[int]()
        fit(
            learner,
            optimiser_of(learner, changed),
            lot.train,
            lot.stop,
            changed,
            torch.Generator().manual_seed(0),
            idle=idle,
            measured=lambda steps, loss, alpha: count.append(steps),
        )
        return len(count)

    # Asked once an epoch for its patience, and again before each epoch beyond the second.
    answers = [True] * 4 + [False] * 9
    assert epochs(lambda: True) == 5 and epochs(lambda: False) == 2 and epochs(lambda: answers.pop(0)) == 3
    assert epochs(lambda: True, idle_epochs=1) == 2
    still = {"learning_rate": 0.0, "patience": 1, "idle_patience": 3}  # weights that do not move get no better
    assert epochs(lambda: True, **still) == 3 and epochs(lambda: False, **still) == 1
    steps: list[int] = []
    for idle in (False, True):
        worker = _worker(tmp_path / str(idle), epochs=1, idle_epochs=3, idle_patience=99)
        worker.idle = lambda idle=idle: idle
        worker.run(Job(0, lot))
        steps.append(worker.average.steps)
    assert steps[1] > 2 * steps[0]


def test_the_gate_is_asked_about_the_newest_first(tmp_path: Path, lot: Lot) -> None:
    """A new domain at the end: the draft that is better there passes, though it is a little worse on all before."""
    worker, gate = _worker(tmp_path), [replace(lot.gate[0], number=number) for number in range(30)]
    serving = dict.fromkeys(range(30), (0.5, 9))
    found = {number: (0.49 if number < 22 else 0.7, 9) for number in range(30)}
    assert worker._judge(gate, serving, found).kind == "better"
    assert worker._judge(gate[::-1], serving, found).kind == "undecided"
