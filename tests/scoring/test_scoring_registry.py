"""Names of scores, scores of one's own, and errors that name the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.errors import RecipeError, ScoreError
from limbeck.scoring import SCORES, score
from limbeck.scoring.registry import resolve


def test_names_and_functions() -> None:
    assert resolve("rouge_l") is SCORES["rouge_l"]
    assert resolve("limbeck.scoring.answers:numeric_answer") is SCORES["accuracy"]
    assert resolve(SCORES["bleu"]) is SCORES["bleu"]


def test_a_wrong_name_is_corrected() -> None:
    with pytest.raises(RecipeError, match="found 'rougeL'; did you mean 'rouge_l'"):
        resolve("rougeL")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_1:f", "ModuleNotFoundError"),
        ("limbeck.scoring.answers:nothing", "AttributeError"),
        ("limbeck.scoring.answers:MARKER", r"found str"),
        ("limbeck_broken_score:f", "ZeroDivisionError"),
    ],
)
def test_a_wrong_module_or_function(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "limbeck_broken_score.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RecipeError, match=message):
        resolve(name)


@pytest.mark.parametrize("value", [None, "1", float("nan"), float("inf"), 1j, [1.0]])
def test_nonsense_names_the_prompt(value: Any) -> None:
    def odd(completion: str, reference: str) -> Any:
        return value if completion == "b" else 1.0

    with pytest.raises(ScoreError, match=r"score odd at prompt 1 \('second'\): expected a finite number, found"):
        score(odd, ["a", "b"], ["", ""], ["first", "second"])


def test_a_score_that_raises_names_the_prompt() -> None:
    with pytest.raises(ScoreError, match=r"numeric_answer at prompt 1 \('two'\): expected a number, found ValueError"):
        score("numeric_answer", ["1", "2"], ["1", "x"], ["one", "two"])
    with pytest.raises(ScoreError, match="at prompt 0: .*ValueError"):
        score("numeric_answer", ["1"], ["x"])
    with pytest.raises(ScoreError, match="expected one reference or more at prompt 0, found none"):
        score("rouge_l", ["1"], [[]])


def test_numbers_of_other_kinds_become_floats() -> None:
    values: Iterator[Any] = iter([True, np.float32(0.5), 2, np.int64(3)])
    found = score(lambda completion, reference: next(values), ["a"] * 4, ["b"] * 4)
    assert found == [1.0, 0.5, 2.0, 3.0]
    assert all(type(value) is float for value in found)


def test_lists_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 completions, 1 references"):
        score("rouge_l", ["a", "b"], ["a"])
