"""Studies: recorded answers are the target's, a replay drafts with the right chances, cells run once, pages hold it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm

from limbeck.data.embedded import TEACHER
from limbeck.decoding import Sampling, generate
from limbeck.decoding.controller import Fixed
from limbeck.decoding.requests import Request
from limbeck.decoding.speculative import Engine
from limbeck.errors import DataError, LimbeckError, RecipeError
from limbeck.models import eos_tokens
from limbeck.online import Pace, Training
from limbeck.online.learner import snapshot
from limbeck.online.vocabulary import likely_tokens
from limbeck.pipeline import distill
from limbeck.pipeline.cells import Cell
from limbeck.recipe import Recipe
from limbeck.studies import STUDIES, Cells, Domain, Result, Setting, study
from limbeck.studies.material import Material
from limbeck.studies.page import table, write
from limbeck.studies.replay import Replay, rounds, train_offline
from limbeck.studies.shift import recovery
from limbeck.studies.speedup import Run, _answer, _figures

ROWS = Domain("sums", "embedded:train:200")
MORE = Domain("tests", "embedded:test:200")


def setting_of(folder: Path, **changes: Any) -> Setting:
    settings: dict[str, Any] = {"layers": [0], "requests": 12, "max_tokens": 24, "seeds": 1, "update_size": 64}
    return Setting(str(TEACHER), [ROWS, MORE], out=folder / "pages", work=folder / "work", **{**settings, **changes})


def quiet(_line: str) -> None: ...


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Material]:
    yield Material(setting_of(tmp_path_factory.mktemp("study"), temperature=0.0), quiet)


def test_recorded_answers_are_the_targets_own(material: Material) -> None:
    answers = material.answers(ROWS, 12)
    prompts = material.prompts(ROWS, 12)
    stops = tuple(eos_tokens(material.target, material.tokenizer))
    written = generate(material.target, prompts, Sampling(24, temperature=0, stop_tokens=stops))
    for trace, prompt, completion in zip(answers, prompts, written, strict=True):
        assert trace.tokens.tolist() == prompt + completion.tokens
        assert trace.positions.tolist() == list(range(len(prompt), len(trace.tokens)))
        with torch.no_grad():
            logits_TV = material.target(torch.tensor([trace.tokens.tolist()])).logits[0, :, : material.vocabulary]
        logprobs_NV = logits_TV[len(prompt) - 1 : -1].float().log_softmax(-1)
        kept_NK = logprobs_NV.gather(1, torch.from_numpy(trace.ids_NK.astype(np.int64)))
        torch.testing.assert_close(
            kept_NK.exp(), torch.from_numpy(trace.logprobs_NK.astype(np.float32)).exp(), atol=2e-3, rtol=0
        )


def test_answers_on_disk_are_not_written_again(tmp_path: Path) -> None:
    said: list[str] = []
    setting = setting_of(tmp_path)
    first = Material(setting, said.append).answers(ROWS, 3)
    recordings = len(said)
    again = Material(setting, said.append).answers(ROWS, 3)
    assert recordings == len(said) == 1
    assert all((a.ids_NK == b.ids_NK).all() for a, b in zip(first, again, strict=True))
    Material(setting_of(tmp_path, max_tokens=7), said.append).answers(ROWS, 3)
    assert len(said) == 2


def test_rounds_stand_with_their_chances_and_cover_the_answer() -> None:
    alpha, gamma, count = 0.6, 4, 20_001
    made = rounds(np.full(count, alpha), gamma, 3, 1)
    assert [first for first, _, _ in made] == [0, *np.cumsum([1 + accepted for _, _, accepted in made[:-1]])]
    assert made[0] == (0, 0, 0)
    judged, stood = sum(j for _, j, _ in made), sum(a for _, _, a in made)
    bound = norm.isf(1e-6) * np.sqrt(alpha * (1 - alpha) / judged)
    assert abs(stood / judged - alpha) < bound
    expected = (1 - alpha ** (gamma + 1)) / (1 - alpha)  # written a round, Leviathan et al. 2023
    assert abs((count - 1) / (len(made) - 1) / expected - 1) < 0.03
    # A draft that is always right writes gamma + 1 a round, one that never is writes one.
    assert len(rounds(np.ones(51), gamma, 0, 1)) == 1 + 10
    assert len(rounds(np.zeros(51), gamma, 0, 1)) == 1 + 50


def replay_of(material: Material, folder: Path, **changes: Any) -> Replay:
    training = Training(learning_rate=3e-3)
    return Replay(material.building(ROWS), material.vocabulary, folder, training, Pace(update_size=64), 4, 0, **changes)


def test_a_draft_that_learns_gets_better_and_one_that_does_not_stays(material: Material, tmp_path: Path) -> None:
    stream = material.answers(ROWS, 120)
    learns, stays = replay_of(material, tmp_path / "a"), replay_of(material, tmp_path / "b", learns=False)
    before = snapshot(stays.serving)
    online, static = learns.run(stream), stays.run(stream)
    assert learns.swaps >= 1
    assert 0 < online[-1].version <= learns.version
    assert np.mean([point.alpha for point in online[-30:]]) > np.mean([point.alpha for point in static[-30:]]) + 0.1
    assert all(torch.equal(weight, before[name]) for name, weight in snapshot(stays.serving).items())
    # Same weights, same chances, same coins: until the first swap the two see the same.
    assert all(a == b for a, b in zip(online, static, strict=True) if a.version == 0)


def test_an_idle_arm_trains_longer(material: Material, tmp_path: Path) -> None:
    """What it is served and when it updates is the same; an update takes more steps."""
    stream = material.answers(ROWS, 120)[:64]
    beside, idle = (replay_of(material, tmp_path / str(idle), idle=idle) for idle in (False, True))
    for replay in (beside, idle):
        replay.run(stream)
    assert idle.updates == beside.updates and idle.worker.average.steps > beside.worker.average.steps
    setting = setting_of(tmp_path, requests=8, arms=("static", "idle"))
    text = study("osd-acceptance", setting, quiet).read_text()
    assert "| | static | idle | idle - static |" in text and "takes 24 epochs at most" in " ".join(text.split())


def test_the_buffer_keeps_what_was_rejected_and_whole_requests_apart(material: Material, tmp_path: Path) -> None:
    replay = replay_of(material, tmp_path, learns=True)
    replay.pace = Pace(update_size=1 << 30)
    stream = material.answers(ROWS, 120)[:40]
    replay.run(stream)
    held = [*replay.buffer.held["gate"], *replay.buffer.held["stop"]]
    assert 0 < len(held) < 40
    for trace in [*held, *replay.buffer.traces]:
        whole = stream[int(trace.id) - 1]
        places = [whole.positions.tolist().index(position) for position in trace.positions]
        assert trace.tokens.tolist() == whole.tokens.tolist()[: len(trace.tokens)]
        likeliest = whole.ids_NK[places].astype(int)[:, 0]
        assert (trace.ids_NK[:, 0] == likeliest).mean() > 0.95  # ties apart
        assert trace.role == "train" or len(trace.positions) > 1


def test_offline_training_raises_acceptance_on_other_answers(material: Material) -> None:
    from limbeck.studies.replay import acceptance_on

    answers = material.answers(ROWS, 120)
    learner = material.build()
    before = acceptance_on(learner, answers[:20])
    train_offline(learner, answers[20:], Training(learning_rate=3e-3), 0)
    assert acceptance_on(learner, answers[:20]) > before + 0.1


def test_a_draft_distilled_before_is_accepted_more_from_the_first_request_on(
    material: Material, tmp_path: Path
) -> None:
    settings = {
        "method": "draft",
        "teacher": "embedded",
        "student": {"from_teacher": {"layers": [0]}},
        "data": {"train": "embedded:train:400", "eval": "embedded:eval:20"},
        "sampling": {"max_tokens": 48},
        "divergence": {"name": "forward_kl"},
        "training": {"max_steps": 30, "per_device_train_batch_size": 16, "learning_rate": 5e-3, "save_strategy": "no"},
        "evaluation": {"prompts": 0, "rows": 20},
        "output": str(tmp_path / "draft"),
    }
    run = distill(Recipe.parse(settings), report=False)
    warm = Material(setting_of(tmp_path, draft=str(run.student_path), layers=None, temperature=0.0), quiet)
    assert warm.layers is None and warm.vocabulary == material.vocabulary
    stream = material.answers(ROWS, 120)[:40]
    alpha = [
        np.mean([point.alpha for point in replay_of(one, tmp_path / "none", learns=False).run(stream)])
        for one in (material, warm)
    ]
    assert alpha[1] > alpha[0] + 0.2


def test_cells_run_once_and_again_when_what_they_depend_on_changes(tmp_path: Path) -> None:
    runs: list[int] = []

    def compute() -> dict[str, Any]:
        runs.append(1)
        return {"value": len(runs)}

    assert Cells(tmp_path, quiet).get("a", {"seed": 0}, compute) == {"value": 1}
    cells = Cells(tmp_path, quiet)
    assert cells.get("a", {"seed": 0}, compute) == {"value": 1}
    assert cells.get("a", {"seed": 1}, compute) == {"value": 2}
    assert [cell.facts["seed"] for cell in cells.all] == [0, 1]

    def fails() -> dict[str, Any]:
        raise DataError("no")

    with pytest.raises(DataError):
        cells.get("b", {}, fails)
    assert not list(tmp_path.glob("b-*"))


def test_recovery_counts_requests_until_the_running_mean_is_there() -> None:
    ones = [1] * 60
    assert recovery([1.0] * 60, ones, 0.95) == 20
    assert recovery([0.0] * 10 + [1.0] * 50, ones, 0.92) == 10 + 19
    assert recovery([0.0] * 60, ones, 0.5) == float("inf")
    lucky = [0.0] * 10 + [1.0] * 15 + [0.0] * 35
    assert recovery(lucky, ones, 0.5) == float("inf")  # it must stay
    # Over positions, not requests: those of many count for more.
    assert recovery([0.0, 1.0] * 30, [1, 9] * 30, 0.85) == 20
    assert recovery([0.0, 1.0] * 30, ones, 0.85) == float("inf")


def test_rounds_are_the_targets_passes_but_the_reading(material: Material) -> None:
    engine = Engine(material.target, material.tokenizer, {}, Fixed(None, 0), max_batch=1)
    sums = Run()
    prompt = tuple(material.prompts(ROWS, 1)[0])
    assert len(_answer(engine, Request("a", prompt, Sampling(9, temperature=0)), sums)) == 9
    assert sums.rounds == engine.target_passes - 1 == 8
    assert sums.timed == sums.tokens == 7  # the first step reads the prompt and is a round too


def test_figures_are_the_formulas() -> None:
    class Spent:
        class seconds:
            draft, verify = 30 * 0.01, 10 * 0.1

    ours = Run(tokens=25, seconds=1.5, timed=5, drafted=30, verified=20, alpha_sum=10.0, rounds=10)
    theirs = Run(tokens=20, seconds=2.0)
    found = _figures(ours, theirs, Spent)  # pyright: ignore[reportArgumentType]
    assert found["alpha"] == 0.5
    assert found["speed-up"] == pytest.approx((25 / 1.5) / 10)
    assert found["formula"] == pytest.approx((1 - 0.5**4) / 0.5 / (3 * 0.1 + 1.0))
    ours.alpha_sum = 20.0  # all of them stand
    assert _figures(ours, theirs, Spent)["formula"] == pytest.approx(4 / 1.3)  # pyright: ignore[reportArgumentType]


def test_a_reduced_head_holds_the_tokens_that_the_texts_use(material: Material) -> None:
    chosen = likely_tokens(material.tokenizer, 10, [(ROWS.path, None)])
    assert len(chosen) == 10 == len(chosen.unique())
    text = "".join(material.tokenizer.decode(answer.tokens) for answer in material.answers(ROWS, 5))
    tokens = material.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert np.isin(tokens, chosen.numpy()).mean() > 2 * 10 / material.vocabulary
    assert likely_tokens(material.tokenizer, 5).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(RecipeError, match="--head-rows"):
        likely_tokens(material.tokenizer, 0)


def test_a_reduced_head_bounds_a_streams_acceptance_and_is_kept_by_the_updater(tmp_path: Path) -> None:
    setting = setting_of(tmp_path, head_rows=8, requests=40)
    text = study("osd-acceptance", setting, quiet).read_text()
    assert "8 rows of its head" in text and "that the domain's own texts" in text
    with (setting.out / "osd-acceptance.csv").open() as file:
        found = {(row["method"], row["metric"]): float(row["value"]) for row in csv.DictReader(file)}
    for arm in ("static", "offline", "online"):
        known = found[arm, "sums: p(D) apart, which no alpha is above"]
        assert 0 < found[arm, "sums: alpha apart, at the end"] < known < 1
    material = Material(setting, quiet)
    replay = replay_of(material, tmp_path / "one")
    replay.run(material.answers(ROWS, 50))
    ids_D = material.head(ROWS)
    assert replay.updates and ids_D is not None
    for learner in (replay.serving, replay.worker.learner):
        assert learner.ids_D is not None and torch.equal(learner.ids_D, ids_D)
    cells = len(list((setting.work / "osd-acceptance").glob("*.json")))
    study("osd-acceptance", setting_of(tmp_path, head_rows=9, requests=40), quiet)
    assert len(list((setting.work / "osd-acceptance").glob("*.json"))) == 2 * cells


def test_arms_that_are_left_out_are_not_on_the_page(tmp_path: Path) -> None:
    setting = setting_of(tmp_path, requests=8, arms=("static", "online"))
    text = study("osd-acceptance", setting, quiet).read_text()
    assert "| | static | online | online - static |" in text
    assert "offline" not in text.partition("```")[0]  # the command follows, of whoever runs this
    with pytest.raises(RecipeError, match="--arms: expected some of static, offline, online, idle, found onlin"):
        setting_of(tmp_path, arms=("onlin",))


@pytest.mark.parametrize("name", list(STUDIES))
def test_a_study_writes_its_page_and_is_not_run_again(name: str, tmp_path: Path) -> None:
    said: list[str] = []
    setting = setting_of(tmp_path, requests=4, max_tokens=8, temperature=0.0 if name == "osd-speedup" else 1.0)
    page = study(name, setting, said.append)
    text = page.read_text()
    assert text.startswith(f"# {name}: ") and "Measured on " in text
    with (setting.out / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["study"] == name and float(rows[0]["value"]) >= 0 and rows[0]["seconds"]
    assert (setting.out / f"{name}.png").exists() == ("png" in text)
    begun = [line for line in said if line.endswith("begins")]
    study(name, setting, said.append)
    assert [line for line in said if line.endswith("begins")] == begun
    cells = [json.loads(path.read_text()) for path in (setting.work / name).glob("*.json")]
    assert len(cells) == len(begun)


def test_the_table_has_means_and_intervals_over_seeds(tmp_path: Path) -> None:
    result = Result("t", "about")
    environment = {"cpu": "c", "cores": 2, "date": "2026-01-01T00:00:00", "command": "limbeck study t", "commit": None}
    for seed, value in enumerate((0.2, 0.4, 0.6)):
        result.add("online", seed, {"alpha": value}, Cell("c", {}, {}, 1.0, environment))
    half = 4.302653 * 0.2 / np.sqrt(3)  # Student's t with two degrees of freedom
    assert table(result)[-1] == f"| alpha | 0.400 [{0.4 - half:.3f}, {0.4 + half:.3f}] |"
    assert "limbeck study t" in write("t", result, tmp_path).read_text()


@pytest.mark.parametrize("text", ["gsm8k", "=file", "gsm8k=", "a=file:answer=x", "a=file:prompt"])
def test_a_domain_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--domain"):
        Domain.parse(text)


def test_a_domain_names_its_columns() -> None:
    assert Domain.parse("spider=f.jsonl:prompt=question,input=schema") == Domain(
        "spider", "f.jsonl", {"prompt": "question", "input": "schema"}
    )


def test_mistakes_are_named(tmp_path: Path) -> None:
    setting = setting_of(tmp_path)
    with pytest.raises(RecipeError, match="osd-shift"):
        study("osd-shft", setting, quiet)
    with pytest.raises(RecipeError, match="two domains"):
        study("osd-shift", Setting(str(TEACHER), [ROWS], work=tmp_path), quiet)
    with pytest.raises(DataError, match="expected at least 201 prompts"):
        Material(setting, quiet).prompts(ROWS, 201)
    with pytest.raises(LimbeckError, match="each name once"):
        Setting(str(TEACHER), [ROWS, ROWS])
