"""Who writes: shares, counters, and a teacher that writes once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from limbeck.data import read, render
from limbeck.data.embedded import TEACHER
from limbeck.decoding import Sampling
from limbeck.models import load_model, load_tokenizer
from limbeck.recipe import Recipe
from limbeck.sources import Mixed, Student, Teacher, dataset
from limbeck.teachers import TextCache, weights_hash
from limbeck.training import build
from limbeck.training.build import build_source
from limbeck.types import Example, Rollout


@pytest.fixture(scope="module")
def teacher() -> Any:
    return load_model(TEACHER)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TEACHER)


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[Example]:
    return render(read("embedded:train:400"), tokenizer)[0]


def writer(name: Any) -> Any:
    def write(examples: list[Example], step: int) -> list[Rollout]:
        return [Rollout(e.tokens, e.mask, e.prompt_tokens, name, index=e.index) for e in examples]

    return write


def mixed(lmbda: float, unit: Any = "sequence", seed: int = 0) -> Mixed:
    return Mixed(writer("student"), writer("dataset"), lmbda, unit, seed)


def share(rollouts: list[Rollout]) -> float:
    return sum(rollout.writer == "student" for rollout in rollouts) / len(rollouts)


def test_the_student_writes_its_share_of_the_sequences(rows: list[Example]) -> None:
    """4000 coins at .3: the share is within five standard errors (.0072 each); .5 is not."""
    mean = sum(share(mixed(0.3)(rows, step)) for step in range(10)) / 10
    assert abs(mean - 0.3) < 5 * (0.3 * 0.7 / 4000) ** 0.5
    assert abs(mean - 0.5) > 5 * (0.3 * 0.7 / 4000) ** 0.5


@pytest.mark.parametrize(("lmbda", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_the_ends_are_exact(rows: list[Example], lmbda: float, expected: float) -> None:
    assert share(mixed(lmbda)(rows, 3)) == expected


def test_one_coin_a_step(rows: list[Example]) -> None:
    shares = [share(mixed(0.5, "step")(rows[:5], step)) for step in range(200)]
    assert set(shares) == {0.0, 1.0}
    assert abs(sum(shares) / 200 - 0.5) < 5 * 0.5 / 200**0.5


def test_coins_do_not_depend_on_the_batch_and_change_with_step_and_seed(rows: list[Example]) -> None:
    whole = [r.writer for r in mixed(0.5)(rows, 7)]
    assert [r.writer for part in (rows[300:], rows[:300]) for r in mixed(0.5)(part, 7)] == whole[300:] + whole[:300]
    assert [r.index for r in mixed(0.5)(rows, 7)] == list(range(400))
    assert [r.writer for r in mixed(0.5)(rows, 8)] != whole
    assert [r.writer for r in mixed(0.5, seed=1)(rows, 7)] != whole


def test_the_student_writes_after_the_prompt_and_learns_all_it_wrote(
    teacher: Any, tokenizer: Any, rows: list[Example]
) -> None:
    # A high temperature: another random number is another token.
    sampling = Sampling(max_tokens=12, temperature=3.0, seed=1, stop_tokens=(tokenizer.eos_token_id,))
    source = Student(teacher, sampling, tokenizer)
    first = source(rows[:6], 2)
    assert [r.tokens for r in source(rows[3:6], 2)] == [r.tokens for r in first[3:]]
    for example, rollout in zip(rows, first, strict=False):
        assert rollout.tokens[: example.prompt_tokens] == example.prompt
        assert rollout.mask == [False] * example.prompt_tokens + [True] * (len(rollout.tokens) - example.prompt_tokens)
    assert [r.tokens for r in source(rows[:6], 3)] != [r.tokens for r in first]


def test_the_teacher_writes_once(teacher: Any, tokenizer: Any, rows: list[Example], tmp_path: Path) -> None:
    sampling = Sampling(max_tokens=6, temperature=0.0, stop_tokens=(tokenizer.eos_token_id,))
    cache = TextCache(tmp_path, weights_hash(teacher), sampling)
    written = Teacher(teacher, sampling, tokenizer, cache, upcoming=lambda step: rows[4:9])(rows[:4], 0)
    lines = cache.path.read_text().splitlines()
    assert len(lines) == 9, "what comes next is written in the same go"
    assert all(rollout.writer == "teacher" for rollout in written)
    again = TextCache(tmp_path, weights_hash(teacher), sampling)
    no_model = Teacher(None, sampling, tokenizer, again)
    assert [r.tokens for r in no_model(rows[:9], 5)][:4] == [r.tokens for r in written]
    assert cache.path.read_text().splitlines() == lines
    Teacher(teacher, sampling, tokenizer, cache)(rows[6:11], 1)
    assert len(cache.path.read_text().splitlines()) == 11, "what is known is not written again"


def test_the_cache_belongs_to_weights_and_sampling(teacher: Any, tmp_path: Path) -> None:
    sampling, other = Sampling(max_tokens=6), Sampling(max_tokens=7)
    name = weights_hash(teacher)
    changed: Any = load_model(TEACHER)
    changed.get_output_embeddings().weight.data[0, 0] += 1e-3
    paths = {
        TextCache(tmp_path, key, settings).path
        for key in (name, weights_hash(changed))
        for settings in (sampling, other)
    }
    assert len(paths) == 4
    assert weights_hash(load_model(TEACHER)) == name


def test_a_half_written_cache_line_is_passed_over(
    teacher: Any, tokenizer: Any, rows: list[Example], tmp_path: Path
) -> None:
    sampling = Sampling(max_tokens=4, temperature=0.0)
    cache = TextCache(tmp_path, "w", sampling)
    Teacher(teacher, sampling, tokenizer, cache)(rows[:2], 0)
    cache.path.write_bytes(cache.path.read_bytes()[:-20])
    again = TextCache(tmp_path, "w", sampling)
    Teacher(teacher, sampling, tokenizer, again)(rows[:3], 0)
    whole = 0
    for line in cache.path.read_text().splitlines():
        try:
            whole += bool(json.loads(line))
        except ValueError:
            continue
    assert whole == 3


def test_the_data_set_stands_as_it_is(rows: list[Example]) -> None:
    assert [(r.tokens, r.mask) for r in dataset(rows[:3], 9)] == [(e.tokens, e.mask) for e in rows[:3]]


def test_both_offline_writers_share_what_the_student_leaves(tmp_path: Path) -> None:
    """lmbda .5 with `offline: both`: a half, a quarter, a quarter, each within five standard errors of 1000 coins; the
    second coin is another one than the first."""
    made = Recipe.parse(
        {
            "method": "gkd",
            "teacher": "embedded",
            "student": "embedded",
            "data": {"train": "embedded:train:1000", "eval": "embedded:eval:4"},
            "lmbda": 0.5,
            "offline": "both",
            "sampling": {"max_tokens": 1},
            "output": str(tmp_path),
        }
    )
    parts = build(made)
    rollouts = build_source(made, parts)(parts.train, 3)
    for name, expected in (("student", 0.5), ("teacher", 0.25), ("dataset", 0.25)):
        found = sum(rollout.writer == name for rollout in rollouts) / 1000
        assert abs(found - expected) < 5 * (expected * (1 - expected) / 1000) ** 0.5
