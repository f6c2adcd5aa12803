"""Calibration: closed forms, predictors of known calibration, and transformers' own logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from limbeck.data import render
from limbeck.data.embedded.problems import rows as problems
from limbeck.errors import DataError
from limbeck.evaluation import label_calibration, token_calibration
from limbeck.evaluation.calibration import calibration


def test_closed_form() -> None:
    # (.4, .5]: .42 and .50 (the upper end belongs to it), one right; (.5, .6]: .51; (.9, 1]: .95 and 1, both right.
    confidence, correct = np.array([0.42, 0.50, 0.51, 0.95, 1.0]), np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    found = calibration(confidence, correct)
    assert found.ece == pytest.approx((2 * abs(0.5 - 0.46) + abs(0 - 0.51) + 2 * abs(1 - 0.975)) / 5)
    assert (found.count, found.accuracy, found.confidence) == (5, 0.6, pytest.approx(0.676))
    assert [(b["low"], b["count"]) for b in found.bins] == [
        (pytest.approx(0.4), 2),
        (pytest.approx(0.5), 1),
        (pytest.approx(0.9), 2),
    ]
    assert found.bins[0]["confidence"] == pytest.approx(0.46) and found.bins[0]["accuracy"] == 0.5
    assert calibration(np.zeros(1), np.ones(1)).ece == 1.0
    with pytest.raises(DataError, match="found none"):
        calibration(np.empty(0), np.empty(0))


def test_a_calibrated_predictor_has_little_and_an_overconfident_one_its_excess() -> None:
    random = np.random.default_rng(0)
    chance = random.uniform(0.1, 0.8, 40_000)
    correct = (random.random(40_000) < chance).astype(float)
    # 7 bins or so of 5 000: each is off by about sqrt(1/4 / 5000) = .007.
    assert calibration(chance, correct).ece < 0.01
    assert calibration(chance + 0.2, correct).ece == pytest.approx(0.2, abs=0.01)


@torch.no_grad()
def test_tokens_as_by_transformers_own_logits(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny(3)
    held = render([*problems("eval", 5), {"prompt": "Ada has 3"}], tokenizer)[0]  # the last has nothing learnt
    confidence, correct = [], []
    for example in held:
        probs_TV = softmax(model(torch.tensor([example.tokens])).logits[0].double().numpy(), axis=-1)
        for place in range(1, len(example.tokens)):
            if example.mask[place]:
                confidence.append(probs_TV[place - 1].max())
                correct.append(float(probs_TV[place - 1].argmax() == example.tokens[place]))
    expected = calibration(np.array(confidence), np.array(correct))
    assert 0 < expected.accuracy < 1
    model.train()
    for batch_tokens in (1, 10_000):
        found = token_calibration(model, held, tokenizer.pad_token_id, batch_tokens=batch_tokens)
        assert found.count == expected.count and found.accuracy == expected.accuracy
        assert found.ece == pytest.approx(expected.ece, rel=1e-5)
        assert found.confidence == pytest.approx(expected.confidence, rel=1e-5)
    assert model.training
    with pytest.raises(DataError, match="found none"):
        token_calibration(model, held[-1:], tokenizer.pad_token_id)


LABELS = [
    {"prompt": "Ada has 3 apples.", "labels": ["4", "12", "4 apples"], "label": 1},
    {"prompt": "Tom has", "labels": [" 7", " apples"], "completion": "apples"},
    {"prompt": "Ben has 2 pears and", "labels": ["1", "2", "3", "4"], "answer": 3},
]


@torch.no_grad()
def test_labels_as_by_transformers_own_logits(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny(5)
    confidence, correct = [], []
    for row, right in zip(LABELS, (1, 1, 2), strict=True):
        logprobs = []
        for label in row["labels"]:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = tokenizer(label, add_special_tokens=False)["input_ids"]
            logprobs_TV = log_softmax(model(torch.tensor([prompt + ids])).logits[0].double().numpy(), axis=-1)
            logprobs.append(sum(logprobs_TV[len(prompt) + i - 1, token] for i, token in enumerate(ids)))
        probs = softmax(logprobs)
        confidence.append(probs.max())
        correct.append(float(probs.argmax() == right))
    expected = calibration(np.array(confidence), np.array(correct))
    for batch_tokens in (1, 10_000):
        found = label_calibration(model, tokenizer, LABELS, batch_tokens=batch_tokens)
        assert (found.count, found.accuracy) == (3, expected.accuracy)
        assert found.ece == pytest.approx(expected.ece, rel=1e-5)
        assert found.confidence == pytest.approx(expected.confidence, rel=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "labels": ["x", "y"], "completion": "z"},
            "row 2: expected one of the labels 'x', 'y' .* found 'z'",
        ),
        ({"prompt": "a", "labels": ["x", "y"]}, "row 2: .* found none"),
        ({"prompt": "a", "labels": ["x", " x"], "completion": "x"}, "row 2: expected one of the labels"),
        ({"prompt": "a", "labels": ["x", "y"], "label": 2}, "row 2: .* found '2'"),
        ({"prompt": "a", "labels": ["x"], "completion": "x"}, "row 2: expected a prompt and two labels or more"),
        (
            {"prompt": "a", "completion": "x"},
            "row 2: expected a prompt and two labels or more .*found prompt, completion",
        ),
    ],
)
def test_labels_that_are_missing(tiny: Callable[..., Any], tokenizer: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        label_calibration(tiny(5), tokenizer, [LABELS[0], row])


def test_labels_beyond_the_context_are_refused(tiny: Callable[..., Any], tokenizer: Any) -> None:
    row = {"prompt": "3 " * 10, "labels": ["4 " * 30, "5"], "label": 1}
    with pytest.raises(DataError, match="found 1 that are longer"):
        label_calibration(tiny(5), tokenizer, [row], context=24)
