"""What `linear_terms` refuses, and what each message says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from limbeck.errors import PreflightError, RecipeError
from limbeck.ops import linear_terms
from limbeck.types import Dense, Head, Hidden

HIDDEN = torch.randn(4, 3)
HEAD = Head(torch.randn(10, 3))
TEACHER = Hidden(torch.randn(4, 5), Head(torch.randn(10, 5)))
TOKENS = torch.tensor([1, 2, 3, 4])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"divergence": "foward_kl"}, ["jsd", "found 'foward_kl'", "did you mean 'forward_kl'?"]),
        ({"divergence": "zzz"}, ["total_variation", "found 'zzz'", "use one of these"]),
        ({"divergence": "jsd", "stats": ("entrpy",)}, ["found 'entrpy'", "did you mean 'entropy'?"]),
        ({"divergence": "jsd", "signal": None}, ["teacher signal", "a divergence", "found None"]),
        ({"signal": None, "tokens_N": TOKENS, "stats": ("agreement",)}, ["teacher signal", "agreement"]),
        ({}, ["divergence or tokens_N", "found neither"]),
        ({"tokens_N": TOKENS, "beta": 0.5}, ["a divergence to take beta"]),
        ({"divergence": "jsd", "weights": (1.0, 0.5)}, ["tokens_N for its weight of 0.5"]),
        ({"tokens_N": TOKENS, "weights": (1.0, 1.0)}, ["divergence for its weight of 1.0"]),
    ],
    ids=str,
)
def test_recipe_errors(options: dict[str, Any], words: list[str]) -> None:
    signal = options.pop("signal") if "signal" in options else TEACHER
    with pytest.raises(RecipeError) as caught:
        linear_terms(HIDDEN, HEAD, signal, **options)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("head", "signal", "sizes"),
    [
        (HEAD, Hidden(TEACHER.hidden_NH, Head(torch.randn(12, 5))), (10, 12)),
        (replace(HEAD, rows=9), TEACHER, (9, 10)),
        (HEAD, replace(TEACHER, head=replace(TEACHER.head, rows=8)), (10, 8)),
        (HEAD, Dense(torch.randn(4, 11)), (10, 11)),
    ],
)
def test_vocabularies_that_differ(head: Head, signal: Hidden | Dense, sizes: tuple[int, int]) -> None:
    with pytest.raises(PreflightError, match=rf"found {sizes[0]} tokens .* and {sizes[1]} .*Head.rows"):
        linear_terms(HIDDEN, head, signal, divergence="jsd")


@pytest.mark.parametrize("teacher_rows", [10, 12, 15])
def test_padding_rows_of_one_side_are_no_difference(teacher_rows: int) -> None:
    teacher = Hidden(TEACHER.hidden_NH, Head(torch.randn(teacher_rows, 5), rows=10))
    assert linear_terms(HIDDEN, HEAD, teacher, divergence="jsd").loss_N.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"signal": Hidden(torch.randn(3, 5), TEACHER.head)}, "student's 4 tokens, found 3"),
        ({"signal": Dense(torch.randn(5, 10))}, "student's 4 tokens, found 5"),
        ({"tokens_N": TOKENS[:3]}, r"shape \(4,\), found \(3,\)"),
        ({"tokens_N": TOKENS[:, None]}, r"shape \(4,\), found \(4, 1\)"),
        ({"temperature": 0.0}, "above 0, found 0.0"),
        ({"temperature": -1.0}, "above 0, found -1.0"),
        ({"chunk_tokens": 0}, "at least 1, found 0"),
        ({"beta": 1.0}, "0 < beta < 1, found 1.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_value_errors(options: dict[str, Any], words: str) -> None:
    signal = options.pop("signal", TEACHER)
    with pytest.raises(ValueError, match=words):
        linear_terms(HIDDEN, HEAD, signal, divergence="jsd", **options)


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(TypeError, match="skew"):
        linear_terms(HIDDEN, HEAD, TEACHER, divergence="jsd", skew=0.1)
