"""Exposure bias against the enumeration of every text of a toy vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.special import log_softmax, rel_entr
from scipy.stats import bootstrap
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from limbeck.errors import DataError
from limbeck.evaluation import exposure
from limbeck.evaluation.exposure import curve
from limbeck.types import Example

STOP, STEPS, SAMPLES = 0, 4, 1500
PROMPTS = [[1], [2, 3]]
EXAMPLES = [Example(prompt, [False] * len(prompt), len(prompt), index=index) for index, prompt in enumerate(PROMPTS)]


def toy(seed: int, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 4,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "initializer_range": 0.8,
        "bos_token_id": 1,
        "eos_token_id": STOP,
        "pad_token_id": STOP,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | config)).eval()


@torch.no_grad()
def enumerated(student: Any, teacher: Any, writer: Any, prompt: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of each step: the mean KL(p || q) over the prefixes without a stop that `writer` writes, and the standard error
    of its estimate from SAMPLES completions (of which the share that goes on counts)."""
    means, errors = [], []
    for length in range(STEPS):
        prefixes = [list(tail) for tail in product(range(4), repeat=length) if STOP not in tail]
        ids = torch.tensor([prompt + tail for tail in prefixes])
        log_p, log_q, log_w = (
            log_softmax(model(ids).logits.double().numpy(), axis=-1) for model in (teacher, student, writer)
        )
        kl = rel_entr(np.exp(log_p[:, -1]), np.exp(log_q[:, -1])).sum(-1)
        chance = np.exp(
            [
                sum(log_w[row, len(prompt) + i - 1, token] for i, token in enumerate(tail))
                for row, tail in enumerate(prefixes)
            ]
        )
        share = chance / chance.sum()
        means.append(share @ kl)
        errors.append(np.sqrt(share @ (kl - means[-1]) ** 2 / (SAMPLES * chance.sum())))
    return np.array(means), np.array(errors)


def test_equals_the_enumeration() -> None:
    student, teacher = toy(3).double(), toy(5).double()
    found = exposure(
        student, teacher, EXAMPLES, max_tokens=STEPS, stop_tokens=(STOP,), pad_id=STOP, samples=SAMPLES, seed=3
    )
    exact, bounds = {}, {}
    for name, writer, accumulated in (("student", student, found.on_student), ("teacher", teacher, found.on_teacher)):
        parts = [enumerated(student, teacher, writer, prompt) for prompt in PROMPTS]
        exact[name] = np.mean([means for means, _ in parts], 0).cumsum()
        # Steps of one completion depend on each other: their errors add up at most.
        bounds[name] = bound = 4 * np.mean([errors for _, errors in parts], 0).cumsum() + 1e-9
        assert (np.abs(np.array(accumulated) - exact[name]) <= bound).all()
        other = teacher if writer is student else student
        control = np.mean([enumerated(student, teacher, other, prompt)[0] for prompt in PROMPTS], 0).cumsum()
        assert (np.abs(np.array(accumulated) - control) > bound)[1:].any()
    assert found.on_student[0] == pytest.approx(exact["student"][0], rel=1e-9)  # the prompt alone: nothing is drawn
    assert found.percent[0] == pytest.approx(0, abs=1e-9)
    # The ratio of two numbers, each within its bound.
    least, most = (
        (exact["student"] + sign * bounds["student"]) / (exact["teacher"] - sign * bounds["teacher"]) * 100 - 100
        for sign in (-1, 1)
    )
    assert (least[1:] <= found.percent[1:]).all() and (found.percent[1:] <= most[1:]).all()
    assert least[-1] * most[-1] > 0  # narrow enough to tell the sign
    assert found.low is not None and found.high is not None and found.prompts == [2] * STEPS


def test_a_student_that_is_its_teacher_has_none() -> None:
    settings: Any = {"max_tokens": 6, "stop_tokens": (STOP,), "pad_id": STOP, "samples": 20}
    model = toy(1)
    found = exposure(model, copy.deepcopy(model), EXAMPLES, **settings)
    assert found.percent == [0.0] * len(found.percent)
    assert max(found.on_student) < 1e-5 > max(found.on_teacher)
    # And little where it is nearly its teacher: both write nearly the same, by the same random numbers.
    near = copy.deepcopy(model)
    near.lm_head.weight.data += 0.2 * torch.randn_like(near.lm_head.weight)
    found = exposure(near, model, EXAMPLES, **settings)
    assert 0 < max(map(abs, found.percent)) < 15
    far = exposure(toy(2), model, EXAMPLES, **settings)
    assert max(map(abs, far.percent)) > 2 * max(map(abs, found.percent))


def test_the_base_under_a_lora_student_is_its_teacher(tiny: Callable[..., Any]) -> None:
    base = tiny(1)
    student: Any = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    settings: Any = {"max_tokens": 6, "stop_tokens": (), "pad_id": 0, "samples": 3}
    expected, found = (exposure(student, teacher, EXAMPLES, **settings) for teacher in (base, "adapters"))
    assert expected.on_teacher[-1] > 0.01
    assert found.on_teacher == pytest.approx(expected.on_teacher, rel=1e-4)
    assert found.on_student == pytest.approx(expected.on_student, rel=1e-4)


def test_a_teacher_with_a_longer_context_is_cut_at_the_students() -> None:
    # Of learnt positions: a token beyond them is an error.
    shape: dict[str, Any] = {"vocab_size": 4, "n_embd": 8, "n_layer": 1, "n_head": 2, "eos_token_id": STOP}
    torch.manual_seed(0)
    student, teacher = (GPT2LMHeadModel(GPT2Config(n_positions=size, **shape)).eval() for size in (5, 64))
    found = exposure(student, teacher, EXAMPLES, max_tokens=9, stop_tokens=(), pad_id=STOP, samples=2)
    assert found.prompts == [2, 2, 2, 1]  # prompts of one and two tokens


def test_the_curve_of_given_errors() -> None:
    nan = np.nan
    student_PL = np.array([[1.0, 2.0, 4.0], [1.0, 4.0, nan], [1.0, nan, nan]])
    teacher_PL = np.array([[1.0, 1.0, 2.0], [1.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    found = curve(student_PL, teacher_PL)
    # A prompt counts at a step where both of its writers go on.
    assert found.prompts == [3, 2, 1]
    assert found.on_student == [1.0, 4.0, 8.0] and found.on_teacher == [1.0, 2.0, 4.0]
    assert found.percent == pytest.approx([0.0, 100.0, 100.0])
    many = curve(np.vstack([student_PL] * 2 + [student_PL[1:]]), np.vstack([teacher_PL] * 2 + [teacher_PL[1:]]))
    assert many.prompts == [8, 5, 2]
    few = curve(np.vstack([student_PL] * 3), np.vstack([teacher_PL] * 3)[:, :2].repeat(2, 1)[:, :3])
    assert few.prompts == [9, 6, 3]
    sparse = np.full((5, 2), 1.0)
    sparse[1:, 1] = nan
    assert curve(sparse, sparse).prompts == [5]  # one of five goes on: the curve ends
    swapped = curve(teacher_PL, student_PL)  # now it is the teacher's texts that end
    assert swapped.prompts == [3, 2, 1] and swapped.on_teacher == [1.0, 4.0, 8.0]
    rounding = curve(np.full((2, 3), 3e-8), np.full((2, 3), 1e-8))
    assert rounding.percent == rounding.low == rounding.high == [0.0] * 3
    alone = curve(student_PL[:1], teacher_PL[:1])
    assert alone.low is None and alone.high is None and alone.percent == pytest.approx([0.0, 50.0, 75.0])


def test_the_interval_covers_the_truth() -> None:
    """Prompts drawn anew: R and l eps are 3 and 2 on average at the last of 3 steps, so the excess is 50 %. And the
    interval is no wider than scipy's bootstrap of the same ratio."""
    random = np.random.default_rng(0)
    hits, widths, by_scipy = 0, [], []

    def excess(student_PL: np.ndarray, teacher_PL: np.ndarray, axis: int) -> np.ndarray:
        return student_PL.mean(axis) / teacher_PL.mean(axis) * 100 - 100

    for _ in range(100):
        student_PL, teacher_PL = random.exponential(1, (40, 3)), random.exponential(2 / 3, (40, 3))
        found = curve(student_PL, teacher_PL)
        assert found.low is not None and found.high is not None
        hits += found.low[-1] <= 50 <= found.high[-1]
        widths.append(found.high[-1] - found.low[-1])
        sums = student_PL.sum(1), teacher_PL.sum(1)
        low, high = bootstrap(
            sums, excess, paired=True, method="percentile", n_resamples=1000, rng=random
        ).confidence_interval
        by_scipy.append(high - low)
    # 95 of 100 with a standard deviation of 2.2; the bootstrap of a ratio is a little narrow.
    assert hits >= 86
    # An end of 1000 resamples is off by sqrt(.025 x .975 / 1000) / .058 = .085 standard deviations of the mean, so a
    # width (3.9 of them) by 3 %, and the mean of 100 by .3 %, here as in scipy: four times sqrt(2) of that.
    assert np.mean(widths) == pytest.approx(np.mean(by_scipy), rel=0.018)


def test_no_examples_are_an_error() -> None:
    with pytest.raises(DataError, match="found none"):
        exposure(toy(1), toy(2), [], max_tokens=2, stop_tokens=(), pad_id=0)
