"""Final answers: hand cases, and the labels that the authors of GSM8K gave to real model solutions."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest

from limbeck.scoring import SCORES
from limbeck.scoring.answers import final_number, numeric_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 3 + 4 = 7\n#### 18", "18"),
        ("#### 18\nQuestion: what is 5?", "18"),
        ("#### 18\n#### 19", "18"),
        ("#### $ 1,234.50 a day", "1234.5"),
        ("5 apples\n#### none", None),
        ("It is 12, or 13.", "13"),
        ("costs $1,000,000.", "1000000"),
        ("1,2345", "2345"),
        ("x = -7", "-7"),
        ("x=-7", "-7"),
        ("it lost −$2.50", "-2.5"),
        ("it lost $-2.50", "-2.5"),
        ("10-3", "3"),
        ("(4)-3", "3"),
        ("x-3", "3"),
        ("5 - 3", "3"),
        (".5", "0.5"),
        ("no digits", None),
        ("", None),
    ],
)
def test_final_number(text: str, expected: str | None) -> None:
    assert final_number(text) == (None if expected is None else Decimal(expected))


def test_answers_are_compared_by_value() -> None:
    assert numeric_answer("18.00", "#### 18") == 1.0
    assert numeric_answer("0.1", "0.10") == 1.0
    assert numeric_answer("-18", "18") == 0.0
    assert numeric_answer("I do not know", "18") == 0.0
    long = "1234567890123456789012345678901"
    assert numeric_answer(f"-{long}", f"-{long[:-1]}2") == 0.0  # exact, also beyond 28 digits
    assert SCORES["accuracy"] is SCORES["numeric_answer"]


def test_a_reference_without_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="number in the reference, found 'none'"):
        numeric_answer("18", "none")


def test_agrees_with_the_labels_of_gsm8k(shared: Path) -> None:
    lines = (shared / "data" / "gsm8k_test_model_solutions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    judged = [(row["ground_truth"], model) for row in rows for model in row.values() if isinstance(model, dict)]
    assert len(judged) == 4 * 1319
    wrong = [m for truth, m in judged if numeric_answer(m["solution"], truth) != m["is_correct"]]
    assert wrong == []
