"""Inner epochs, samples, rewards and the term on plain text, through whole runs of a tiny pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import CORPUS, MINILLM_DATA, assert_both_log_probabilities

from limbeck.data.corpus import Corpus
from limbeck.errors import DataError, RecipeError, ScoreError
from limbeck.models import load_tokenizer
from limbeck.pipeline import distill
from limbeck.training import build
from limbeck.training.build import build_source
from limbeck.training.order import EpochOrder
from limbeck.training.trainer import Trainer
from limbeck.types import Example


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_inner_epochs_draw_each_batch_again_and_fill_the_last() -> None:
    order = EpochOrder(5, seed=1, strategy="sequential", batch=2, copies=2, passes=3)
    rows = list(order)
    assert rows[:12] == [0, 0, 1, 1] * 3 and rows[12:24] == [2, 2, 3, 3] * 3 and rows[24:] == [4, 4, 0, 0] * 3
    assert len(order) == len(rows) == 36
    assert order.rows(30, 40) == (rows + rows)[30:40]
    assert list(EpochOrder(5, seed=1, strategy="sequential", batch=2, copies=2)) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert len(EpochOrder(2, seed=1, batch=5, passes=2)) == len(list(EpochOrder(2, seed=1, batch=5, passes=2))) == 10


class Watched(Trainer):
    """Notes who was asked, and how often the teacher ran."""

    seen: list[Any]
    teacher_forwards: int

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        found = super().get_batch_samples(*args, **kwargs)
        self.seen.append([(rollout.tokens, rollout.columns, rollout.reward) for rollout in self.rollouts])
        return found


def test_inner_epochs_reuse_rollouts_rewards_and_the_teachers_hidden_states(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from limbeck.training import run

    watched: list[Watched] = []

    def made(**kwargs: Any) -> Watched:
        trainer = Watched(**kwargs)
        trainer.seen = []
        watched.append(trainer)
        trainer.teacher.register_forward_hook(lambda *_: calls.append(trainer.state.global_step))
        return trainer

    calls: list[int] = []
    monkeypatch.setattr(run, "Trainer", made)
    training = {"max_steps": 6, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    made_recipe = recipe("minillm", data=MINILLM_DATA, inner_epochs=3, corpus_weight=0.0, training=training)
    distill(made_recipe, quiet=True, report=False)
    seen = watched[0].seen
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4] == seen[5]
    hidden = [step for step in calls if step % 3]
    assert hidden == [], "the teacher ran in a later inner epoch"
    assert all(rollout[2] is not None for rollout in seen[0])


def test_a_mixture_is_written_at_the_recipes_share_and_brings_both_log_probabilities(recipe: Any) -> None:
    parts = build(recipe("minillm", data=MINILLM_DATA, teacher_mix=0.4))
    source = build_source(recipe("minillm", data=MINILLM_DATA, teacher_mix=0.4), parts)
    rollout = source(parts.train[:1], 0)[0]
    assert_both_log_probabilities(parts, rollout)
    assert source.share == 0.4  # pyright: ignore[reportAttributeAccessIssue]


def test_the_term_on_plain_text_has_its_own_count(recipe: Any, tmp_path: Path) -> None:
    """The first step's loss with the term less that without is its weight times the mean cross-entropy over the drawn
    blocks' own tokens, by transformers' own loss."""
    losses: list[float] = []
    for weight in (0.0, 0.7):
        training = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        made = recipe(
            "minillm", output=tmp_path / str(weight), data=MINILLM_DATA, corpus_weight=weight, training=training
        )
        losses.append(metrics(distill(made, quiet=True, report=False).folder)[0]["loss"])
    parts = build(made)
    beside = parts.beside
    assert beside is not None
    order = EpochOrder(len(parts.train), made.seed).rows(0, 4)
    blocks = beside.corpus.draw([parts.train[row] for row in order], made.seed, 0)
    means = [parts.student(input_ids=(ids := torch.tensor([block.tokens])), labels=ids).loss.item() for block in blocks]
    assert losses[1] - losses[0] == pytest.approx(0.7 * sum(means) / 4, rel=1e-4)


def test_the_corpus_is_packed_whole_and_drawn_by_counters() -> None:
    tokenizer = load_tokenizer(build_tokenizer())
    corpus = Corpus(CORPUS, tokenizer, 16)
    text = [
        t
        for row in CORPUS
        for t in [*tokenizer(row["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    packed = [token for block in corpus.blocks for token in block[len(bos) :]]
    assert packed == text[: len(packed)] and len(text) - len(packed) == corpus.left_out < 16
    assert all(len(block) == 16 for block in corpus.blocks)
    examples = [Example([1, 2], [False, True], 1, index=index) for index in (4, 4, 7)]
    drawn = corpus.draw(examples, 0, 3)
    assert [r.tokens for r in corpus.draw(examples[2:], 0, 3)] == [drawn[2].tokens]
    assert [r.tokens for r in corpus.draw(examples, 0, 4)] != [r.tokens for r in drawn]
    assert all(rollout.learnt == 15 for rollout in drawn)
    with pytest.raises(DataError, match="expected text for one block of 4000 tokens or more"):
        Corpus(CORPUS, tokenizer, 4000)
    with pytest.raises(DataError, match="row 1: expected plain text"):
        Corpus([{"prompt": "a", "completion": "b"}], tokenizer, 8)


def build_tokenizer() -> str:
    from limbeck.data.embedded import TEACHER

    return str(TEACHER)


def test_a_reward_raises_what_it_rewards(recipe: Any, tmp_path: Path) -> None:
    """Reward: the share of one character. Sixty steps of alpha .05 raise it; alpha 1 does not move it as far."""
    training = {"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 2e-2}
    gains: dict[float, float] = {}
    for alpha in (0.05, 1.0):
        made = recipe("gkd", output=tmp_path / str(alpha), distill_weight=alpha, samples=4, training=training)
        rows = metrics(distill(made, reward=share_of_a_letter, quiet=True, report=False).folder)
        gains[alpha] = sum(r["reward"] for r in rows[-10:]) / 10 - sum(r["reward"] for r in rows[:10]) / 10
    assert gains[0.05] > 0.05 and gains[0.05] > gains[1.0] + 0.05


def share_of_a_letter(completion: str, reference: str) -> float:
    return completion.count("a") / max(len(completion), 1)


def test_both_terms_and_their_gradients_are_logged(recipe: Any) -> None:
    made = recipe("gkd", reward="length", distill_weight=0.5, samples=2, training={"max_steps": 51})
    rows = metrics(distill(made, quiet=True, report=False).folder)
    assert all({"reward", "policy_gradient", "divergence", "advantage"} <= row.keys() for row in rows)
    assert [row["step"] for row in rows if "divergence_gradient" in row] == [1, 51]
    assert all(row["policy_gradient_norm"] > 0 for row in rows if "divergence_gradient" in row)


@pytest.mark.parametrize(
    ("method", "changes", "expected"),
    [
        ("minillm", {}, "data.corpus: expected plain text"),
        ("minillm", {"teacher_mix": 1.0}, "teacher_mix"),
        ("minillm", {"inner_epochs": 0}, "inner_epochs"),
        ("minillm", {"sampling": {"top_p": 0.9}}, "top_p 0.9"),
        ("minillm", {"sampling": {"temperature": 0.7}}, "temperature 0.7"),
        ("gkd", {"reward": "length", "baseline": "leave_one_out"}, "samples of 2 or more for leave_one_out, found 1"),
        ("gkd", {"reward": "length", "distill_weight": 1.5}, "distill_weight"),
        ("gkd", {"distill_weight": 0.5}, "expected a reward beside it"),
        ("gkd", {"reward": "length", "lmbda": 0.0}, "expected lmbda above 0"),
        ("gkd", {"reward": "length", "samples": 3, "teacher": "nowhere"}, "expected a divisor of"),
        ("gkd", {"reward": {"name": "rouge_l", "column": "summary"}}, "summary"),
        ("kd", {"reward": "length"}, "reward: no such key"),
    ],
)
def test_refused_before_training(recipe: Any, method: str, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        made = recipe(method, **changes)
        parts = build(made)
        build_source(made, parts)


def test_a_reward_that_fails_names_the_prompt(recipe: Any) -> None:
    def broken(completion: str, reference: str) -> float:
        return float("nan")

    with pytest.raises(ScoreError, match="prompt 0 .*expected a finite number, found nan"):
        distill(recipe("gkd", training={"max_steps": 1}), reward=broken, quiet=True, report=False)


def test_the_start_as_reference_has_no_divergence_at_first(recipe: Any) -> None:
    """Regularised RL: `teacher: start` is the student before training, and still it afterwards."""
    made = recipe(
        "gkd", teacher="start", student="embedded", reward="length", divergence={"name": "reverse_kl"}, samples=2
    )
    rows = metrics(distill(made, quiet=True, report=False).folder)
    assert rows[0]["divergence"] == pytest.approx(0, abs=1e-6) and rows[-1]["divergence"] > 1e-4
