"""(completion, reference) -> number: metrics and rewards, in one dict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, cast

from limbeck.errors import RecipeError, ScoreError, did_you_mean
from limbeck.plugins import imported
from limbeck.scoring.answers import numeric_answer
from limbeck.scoring.text import bleu, exact_match, length, rouge_2, rouge_l

Score = Callable[[str, str], float]

SCORES: dict[str, Score] = {
    "rouge_l": rouge_l,
    "rouge_2": rouge_2,
    "bleu": bleu,
    "exact_match": exact_match,
    "numeric_answer": numeric_answer,
    "accuracy": numeric_answer,
    "length": length,
}

__all__ = ["SCORES", "Score", "resolve", "score"]


def resolve(name: str | Score) -> Score:
    """An entry of SCORES, `module:function`, or the function itself. RecipeError where there is none."""
    if callable(name):
        return name
    if ":" in name:
        return cast(Score, imported(name, "a score (completion, reference) -> float"))
    if name not in SCORES:
        hint = did_you_mean(name, SCORES)
        raise RecipeError(f"expected a score among {', '.join(SCORES)}, or module:function; found {name!r}{hint}")
    return SCORES[name]


def score(
    name: str | Score,
    completions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    prompts: Sequence[str] | None = None,
) -> list[float]:
    """One number a completion; against several references, the best of them.

    `prompts` are for the error message alone. Raises ScoreError, naming the prompt, where the score raises or returns
    something else than a finite number.
    """
    function = resolve(name)
    if not len(completions) == len(references) == len(prompts if prompts is not None else completions):
        raise ValueError(f"{len(completions)} completions, {len(references)} references: expected one each")
    values: list[float] = []
    for number, (completion, several) in enumerate(zip(completions, references, strict=True)):
        several = [several] if isinstance(several, str) else several
        where = f"prompt {number}" + (f" ({prompts[number][:80]!r})" if prompts is not None else "")
        if not several:
            raise ScoreError(f"score {_title(name)}: expected one reference or more at {where}, found none")
        values.append(
            max(_one(function, completion, reference, f"score {_title(name)} at {where}") for reference in several)
        )
    return values


def _title(name: str | Score) -> str:
    return name if isinstance(name, str) else getattr(name, "__name__", repr(name))


def _one(function: Score, completion: str, reference: str, where: str) -> float:
    try:
        value: Any = function(completion, reference)
    # A user's score may fail in any way; the prompt must be named.
    except Exception as error:
        raise ScoreError(f"{where}: expected a number, found {type(error).__name__}: {error}") from error
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ScoreError(f"{where}: expected a finite number, found {value!r}; return a float")
    return float(value)
