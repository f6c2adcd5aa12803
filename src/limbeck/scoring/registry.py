"""The one dict of scores, by name, and what applies one: the number is checked and the prompt is named."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, cast

from limbeck.errors import RecipeError, ScoreError, did_you_mean
from limbeck.plugins import imported
from limbeck.scoring.answers import numeric_answer
from limbeck.scoring.text import bleu, distinct_4, exact_match, length, repetition, rouge_2, rouge_l

Score = Callable[[str, str], float]

SCORES: dict[str, Score] = {
    "rouge_l": rouge_l,
    "rouge_2": rouge_2,
    "bleu": bleu,
    "exact_match": exact_match,
    "numeric_answer": numeric_answer,
    "accuracy": numeric_answer,
    "length": length,
    "repetition": repetition,
}

CORPUS_SCORES: dict[str, Callable[[Sequence[str]], float]] = {"distinct_4": distinct_4}
"""Numbers of all completions together: metrics of an evaluation, never rewards."""

WITHOUT_REFERENCE = ("length", "repetition")
"""Entries of SCORES that look at the completion alone."""


_LOWER_IS_BETTER = ("kl", "loss", "perplexity", "divergence", "repetition", "ece", "err")


def lower_is_better(key: str) -> bool:
    """Whether less of a measured number is better, by its name."""
    return any(word in _LOWER_IS_BETTER for word in key.split("_"))


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
    references: Sequence[str | Sequence[Any]],
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
        where = prompt_name(prompts, number)
        if not several:
            raise ScoreError(f"score {title(name)}: expected one reference or more at {where}, found none")
        values.append(
            max(_one(function, completion, reference, f"score {title(name)} at {where}") for reference in several)
        )
    return values


def score_whole(
    function: Callable[..., Any], name: str, prompts: Sequence[str], *columns: Sequence[Any]
) -> list[float]:
    """One number a prompt, from one call `function(prompts, *columns)` for all of them, checked as `score` does."""
    where = f"score {name} on {len(prompts)} prompts, the first of them {prompts[0][:80]!r}" if prompts else ""
    try:
        values = list(function(prompts, *columns))
    # A user's score may fail in any way; the prompts must be named.
    except Exception as error:
        raise ScoreError(f"{where}: expected numbers, found {type(error).__name__}: {error}") from error
    if len(values) != len(prompts):
        raise ScoreError(f"{where}: expected {len(prompts)} numbers, one a prompt, found {len(values)}")
    return [checked(value, f"score {name} at {prompt_name(prompts, number)}") for number, value in enumerate(values)]


def checked(value: Any, where: str) -> float:
    """`value` as a float. ScoreError, beginning with `where`, for anything but a finite number."""
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ScoreError(f"{where}: expected a finite number, found {value!r}; return a float")
    return float(value)


def prompt_name(prompts: Sequence[str] | None, number: int) -> str:
    """How an error names a prompt: by its place and its beginning."""
    return f"prompt {number}" + (f" ({prompts[number][:80]!r})" if prompts is not None else "")


def title(name: object) -> str:
    return name if isinstance(name, str) else getattr(name, "__name__", repr(name))


def _one(function: Score, completion: str, reference: Any, where: str) -> float:
    try:
        value: Any = function(completion, reference)
    # A user's score may fail in any way; the prompt must be named.
    except Exception as error:
        raise ScoreError(f"{where}: expected a number, found {type(error).__name__}: {error}") from error
    return checked(value, where)
