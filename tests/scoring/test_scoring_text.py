"""Likeness of texts: hand cases, and the packages used directly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from limbeck.scoring import score
from limbeck.scoring.text import bleu, distinct_4, exact_match, length, repetition, rouge_2, rouge_l


def test_rouge_hand_cases() -> None:
    # The longest common subsequence is "the cat .. mat": 3 of 4 and 3 of 5 words. One pair of 3 and of 4 is common.
    assert rouge_l("the cat likes mat", "the cat is a mat") == pytest.approx(2 * 3 / (4 + 5))
    assert rouge_2("the cat likes mat", "the cat is a mat") == pytest.approx(2 * 1 / (3 + 4))
    assert rouge_l("cats sleeping", "cat sleeps") == 1.0  # the stemmer is on
    assert rouge_l("", "the cat") == 0.0


def test_rouge_equals_the_package_on_real_summaries(shared: Path) -> None:
    lines = (shared / "data" / "dolly_dev.jsonl").read_text().splitlines()[:40]
    rows = [json.loads(line) for line in lines]
    pairs = [(a["output"], b["output"]) for a, b in zip(rows, rows[1:], strict=False)]
    scorer = RougeScorer(["rougeL", "rouge2"], use_stemmer=True)
    for completion, reference in pairs:
        expected = scorer.score(target=reference, prediction=completion)
        assert rouge_l(completion, reference) == expected["rougeL"].fmeasure
        assert rouge_2(completion, reference) == expected["rouge2"].fmeasure


def test_bleu_closed_form() -> None:
    # n-gram precisions 4/5, 3/4, 2/3, 1/2, no brevity penalty: their product is 1/5.
    assert bleu("a b c d e", "a b c d f") == pytest.approx(0.2**0.25)
    assert bleu("a b c d e", "a b c d e") == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1),
        ("  an\n Apple!", "apple", 1),
        ("yes", "no", 0),
        ("3.5", "35", 0),
        ("-5", "5", 0),
        ("1,000.", "1000", 1),
        ("+", "-", 0),
        ("the", "a", 0),
        ("", "", 1),
    ],
)
def test_exact_match(completion: str, reference: str, expected: float) -> None:
    assert exact_match(completion, reference) == expected
    assert exact_match(reference, completion) == expected


def test_the_best_of_several_references_counts() -> None:
    assert score("rouge_l", ["the cat sat", "dog"], [["a dog", "the cat sat", "x"], "dog"]) == [1.0, 1.0]
    assert score("length", ["abc"], [["x", "y"]]) == [3.0] == [length("abc", "")]


def test_distinct_4_counts_n_grams_of_all_texts_together() -> None:
    assert distinct_4(["a b c d e", "a b c d f"]) == 3 / 4  # abcd twice, bcde, bcdf
    assert distinct_4(["a b c d"]) == distinct_4(["a b c d", "x y z"]) == 1.0
    assert distinct_4(["a b c", ""]) == 0.0
    words = np.random.default_rng(0).choice(list("abc"), (5, 30))
    grams = [tuple(row[i : i + 4]) for row in words for i in range(27)]
    assert distinct_4([" ".join(row) for row in words]) == len(set(grams)) / len(grams)


def test_repetition_is_the_share_of_n_grams_seen_before() -> None:
    assert repetition("a b c d", "") == 0.0
    assert repetition("a a a a a a", "") == pytest.approx(2 / 3)  # three 4-grams, all alike
    assert repetition("a b c d a b c d", "ignored") == pytest.approx(1 / 5)
    assert repetition("a b c", "") == repetition("", "") == 0.0
