"""Distance to held-out text and teacher: a dense computation in float64 as oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.special import log_softmax, rel_entr

from limbeck.data import dataset_rollout
from limbeck.errors import DataError
from limbeck.evaluation import HELD_OUT, held_out, held_out_intervals, held_out_together
from limbeck.evaluation.held_out import BUCKETS, batches, by_position
from limbeck.models import set_vocabulary
from limbeck.types import Example

NAMES = ("loss", "forward_kl", "reverse_kl", "agreement")
PAD = 0


def some_examples(vocabulary: int, count: int = 6) -> list[Example]:
    """Rows of several lengths and masks: two turns, a whole text, one with nothing learnt."""
    random = np.random.default_rng(0)
    found: list[Example] = []
    for index in range(count):
        tokens = random.integers(1, vocabulary, 5 + 4 * (index % 4)).tolist()
        mask = [place >= 3 for place in range(len(tokens))]
        if index == 1:
            mask = [1 <= place < 3 or place >= 6 for place in range(len(tokens))]
        if index == 2:
            mask = [True] * len(tokens)  # the first token has nothing before it and does not count
        if index == 3:
            mask = [False] * len(tokens)
        found.append(Example(tokens, mask, 3, index=index))
    return found


@torch.no_grad()
def dense(student: Any, teacher: Any, held: list[Example], rows: int) -> list[list[tuple[float, ...]]]:
    """Per example, per learnt token: loss, forward KL, reverse KL, agreement; one row at a time, no padding."""
    found: list[list[tuple[float, ...]]] = []
    for example in held:
        input_ids_1T = torch.tensor([example.tokens])
        student_logprobs_TV, teacher_logprobs_TV = (
            log_softmax(model.eval()(input_ids_1T).logits[0, :, :rows].double().numpy(), axis=-1)
            for model in (student, teacher)
        )
        places = [place for place in range(1, len(example.tokens)) if example.mask[place]]
        found.append([])
        for place in places:
            q_V, p_V = student_logprobs_TV[place - 1], teacher_logprobs_TV[place - 1]
            divergences = rel_entr(np.exp(p_V), np.exp(q_V)).sum(), rel_entr(np.exp(q_V), np.exp(p_V)).sum()
            found[-1].append((-q_V[example.tokens[place]], *divergences, float(q_V.argmax() == p_V.argmax())))
    return found


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_equals_a_dense_computation(tiny: Callable[..., Any], tokenizer: Any, batch_tokens: int) -> None:
    student, teacher = tiny(1).double(), tiny(2, width=24, extra_rows=5).double()
    set_vocabulary(teacher, len(tokenizer))
    held = some_examples(len(tokenizer))
    expected = dense(student, teacher, held, len(tokenizer))
    tokens = [values for row in expected for values in row]
    found = held_out(student, teacher, held, PAD, batch_tokens=batch_tokens)
    assert found["tokens"] == len(tokens)
    for place, name in enumerate(NAMES):
        assert found[name] == pytest.approx(np.mean([values[place] for values in tokens]), rel=1e-9)
        per_example = [np.mean([values[place] for values in row]) for row in expected if row]
        assert found["per_example"][name] == pytest.approx(per_example, rel=1e-9)
    assert found["per_example"]["tokens"] == [len(row) for row in expected if row]
    for entry in found["divergence_by_position"]:
        at = [row[entry["position"]][1] for row in expected if len(row) > entry["position"]]
        assert entry["tokens"] == len(at)
        assert entry["forward_kl"] == pytest.approx(np.mean(at), rel=1e-9)
    assert len(found["divergence_by_position"]) == max(len(row) for row in expected)
    assert 0 < found["forward_kl"] != found["reverse_kl"]


def test_several_students_together_are_each_as_alone(tiny: Callable[..., Any], tokenizer: Any) -> None:
    students, held = [tiny(1), tiny(2, width=24)], some_examples(len(tokenizer))
    for teacher in (tiny(3), None):
        found = held_out_together(students, teacher, held, PAD, batch_tokens=40)
        assert found == [held_out(student, teacher, held, PAD, batch_tokens=40) for student in students]
        assert found[0]["loss"] != found[1]["loss"]


def test_intervals_are_of_means_over_tokens(tiny: Callable[..., Any], tokenizer: Any) -> None:
    found = held_out(tiny(1), tiny(2), some_examples(len(tokenizer)), PAD)
    intervals = held_out_intervals(found)
    assert tuple(intervals) == HELD_OUT == NAMES
    for name, interval in intervals.items():
        assert interval.low is not None and interval.high is not None
        assert interval.low <= interval.mean <= interval.high
        assert interval.mean == pytest.approx(found[name], rel=1e-9)
        assert interval.mean != pytest.approx(np.mean(found["per_example"][name]), rel=1e-4)  # a mean over rows
    assert held_out_intervals(held_out(tiny(1), None, some_examples(len(tokenizer)), PAD)).keys() == {"loss"}


def test_without_a_teacher_the_loss_alone(tiny: Callable[..., Any], tokenizer: Any) -> None:
    student, held = tiny(1), some_examples(len(tokenizer))
    found = held_out(student, None, held, PAD)
    assert found.keys() == {"loss", "tokens", "per_example"}
    assert found["per_example"].keys() == {"loss", "tokens"}
    assert found["loss"] == pytest.approx(held_out(student, tiny(2), held, PAD)["loss"], rel=1e-6)


def test_models_in_training_are_read_without_dropout_and_left_as_they_were(
    tiny: Callable[..., Any], tokenizer: Any
) -> None:
    student, teacher = tiny(1, attention_dropout=0.5), tiny(2, attention_dropout=0.5)
    held = some_examples(len(tokenizer))
    expected = held_out(student, teacher, held, PAD)
    student.train()
    teacher.train()
    student.model.layers[0].eval()  # a module of its own mode keeps it
    assert held_out(student, teacher, held, PAD) == expected
    assert student.training and teacher.training and not student.model.layers[0].training
    assert all(parameter.grad is None for parameter in student.parameters())


def test_adapters_off_is_the_teacher_of_a_lora_student(tiny: Callable[..., Any], tokenizer: Any) -> None:
    base, held = tiny(1), some_examples(len(tokenizer))
    student: Any = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = held_out(student, base, held, PAD)
    assert expected["forward_kl"] > 0.01
    for teacher in ("adapters", student):
        found = held_out(student, teacher, held, PAD)
        assert found["forward_kl"] == pytest.approx(expected["forward_kl"], rel=1e-5)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert held_out(base, base, held, PAD)["forward_kl"] == pytest.approx(0, abs=1e-7)


def test_autocast_is_the_callers(tiny: Callable[..., Any], tokenizer: Any) -> None:
    student, teacher, held = tiny(1), tiny(2), some_examples(len(tokenizer))
    full = held_out(student, teacher, held, PAD)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        half = held_out(student, teacher, held, PAD)["loss"]
    assert half != full
    assert half == pytest.approx(full, rel=0.05)


def test_positions_are_gathered_into_stretches_of_equal_length() -> None:
    positions_N = np.arange(100)
    found = by_position(positions_N, positions_N * 1.0)
    assert [entry["position"] for entry in found] == list(range(0, 100, 4))
    assert found[0] == {"position": 0, "forward_kl": 1.5, "tokens": 4}
    assert len(by_position(np.arange(BUCKETS), np.ones(BUCKETS))) == BUCKETS
    assert len(by_position(np.arange(BUCKETS + 1), np.ones(BUCKETS + 1))) == BUCKETS // 2 + 1
    assert len(by_position(np.arange(10_000), np.ones(10_000))) <= BUCKETS


def test_a_batch_stays_within_its_tokens(tokenizer: Any) -> None:
    rollouts = [dataset_rollout(example) for example in some_examples(len(tokenizer), 40)]
    found = list(batches(rollouts, 50))
    assert sorted(place for places in found for place in places) == list(range(40))
    padded = [len(places) * max(len(rollouts[place].tokens) for place in places) for places in found]
    assert max(padded) <= 50 and np.mean(padded) > 30
    assert [len(places) for places in batches(rollouts, 1)] == [1] * 40


def test_nothing_learnt_is_an_error(tiny: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="found none in 1 rows"):
        held_out(tiny(1), None, [Example([1, 2, 3], [True, False, False], 3)], PAD)
    with pytest.raises(DataError, match="found none in 0 rows"):
        held_out(tiny(1), None, [], PAD)
