"""Rewards: what a policy gradient raises, from the same scores as evaluation.

A recipe names one by its name or by a table with options:

    rouge_l                                         an entry of SCORES, or module:function, against the row's reference
    {name: rouge_l, column: summary}                the same against another column of the row
    {name: "module:function", batched: true}        function(prompts, completions, rows) -> numbers, one call a batch
    {name: regex, pattern: "#### -?[0-9]+$"}        1 where the pattern is found in the completion, else 0
    {name: classifier, path: FOLDER, column: NAME}  what a one-logit sequence classifier says (see classifier.py)
    {name: reasoning_gym}                           the verifier of the row's generator (data `reasoning_gym:...`)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from limbeck.data.generated import PREFIX
from limbeck.errors import RecipeError, did_you_mean
from limbeck.scoring import verifiers
from limbeck.scoring.answers import numeric_answer
from limbeck.scoring.classifier import CLASSIFIER_OPTIONS, load_classifier
from limbeck.scoring.references import REFERENCE_COLUMNS, references_in
from limbeck.scoring.registry import SCORES, WITHOUT_REFERENCE, Score, resolve, score, score_whole, title

Row = Mapping[str, Any]
Reward = Callable[[Sequence[str], Sequence[str], Sequence[Row]], list[float]]
"""reward(prompts, completions, rows) -> one finite number a completion. ScoreError names the prompt that failed."""

KINDS: dict[str, dict[str, type]] = {
    "regex": {"pattern": str},
    "classifier": CLASSIFIER_OPTIONS,
    "reasoning_gym": {},
}
"""What takes options of its own, by name; every other name is a score and takes SCORE_OPTIONS."""

SCORE_OPTIONS: dict[str, type] = {"column": str, "batched": bool}

RIGHT_OR_WRONG = ("exact_match", "numeric_answer", "accuracy", "regex", "reasoning_gym")
"""Names that say whether a completion is right: 1, or less where it is wrong."""


TRAINING_REWARD = "training_reward"
"""The name in tables of the mean reward over the last tenth of a run's steps: of the texts that it trained on."""


def build_reward(spec: str | Mapping[str, Any] | Score, *, device: Any = None) -> Reward:
    """The reward that `spec` names (see the module's first lines); a function is called as a score is.

    Where a row has several references the best counts. `device`: where a classifier runs.
    Raises RecipeError for unknown names, options and patterns, ModelError for a folder without such a classifier. The
    reward itself raises ScoreError, naming the prompt, where a score fails, is no finite number, or there are too many
    or too few.
    """
    name, options = _parsed(spec)
    if name == "regex":
        return _by_score(_regex(options), lambda row: [""])
    if name == "classifier":
        return partial(score_whole, load_classifier(options, device), name)
    if name == "reasoning_gym":
        return _by_score(verifiers.verify, lambda row: [row["entry"]])
    if options.get("batched"):
        return partial(score_whole, resolve(name), title(name))
    if name in WITHOUT_REFERENCE:
        return _by_score(name, lambda row: [""])
    resolve(name)
    return _by_score(name, lambda row: references_in(row, options.get("column")))


def needs_reference(spec: str | Mapping[str, Any] | Score) -> bool:
    """Whether the reward compares a completion with the row's reference in its usual columns."""
    name, options = _parsed(spec)
    return not (name in (*KINDS, *WITHOUT_REFERENCE) or options.get("batched") or "column" in options)


def reward_name(spec: str | Mapping[str, Any] | Score) -> str:
    """The name that stands in tables and errors, checked by `build_reward` alone."""
    return title(spec.get("name") if isinstance(spec, Mapping) else spec)


def check_reward(spec: str | Mapping[str, Any] | Score, rows: Sequence[Row]) -> None:
    """RecipeError where a row lacks a column that the reward of `spec` reads, naming it and the columns that are there;
    ScoreError where a reference holds no number for `numeric_answer`. Before training, on its rows."""
    name, options = _parsed(spec)
    column = options.get("column")
    if name == "reasoning_gym":
        lacking = [number for number, row in enumerate(rows) if not verifiers.is_entry(row)]
        expected = f"rows of {PREFIX}NAME:COUNT (column entry)"
    elif column is not None or needs_reference(spec):
        lacking = [number for number, row in enumerate(rows) if not references_in(row, column)]
        expected = f"column {column}" if column else f"one of the columns {', '.join(REFERENCE_COLUMNS)}"
    else:
        return
    if lacking:
        known = list(rows[lacking[0]])
        hint = did_you_mean(column, known) if column else ""
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise RecipeError(
            f"reward {title(name)}: expected {expected}, found row {lacking[0] + 1}{more} with "
            f"{', '.join(known) or 'no columns'}{hint}: name the reference's column (reward.column)"
        )
    if name not in KINDS and resolve(name) is numeric_answer:
        prompts = [str(row.get("prompt", row.get("messages", ""))) for row in rows]
        score(name, [""] * len(rows), [references_in(row, column) for row in rows], prompts)


def _by_score(name: str | Score, references: Callable[[Row], list[Any]]) -> Reward:
    def reward(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
        return score(name, completions, [references(row) for row in rows], prompts)

    return reward


def _regex(options: Mapping[str, Any]) -> Score:
    try:
        pattern = re.compile(options["pattern"])
    except re.error as error:
        raise RecipeError(
            f"reward.pattern: expected a regular expression, found {options['pattern']!r}: {error}"
        ) from None

    def regex(completion: str, reference: str) -> float:
        return float(pattern.search(completion) is not None)

    return regex


def _parsed(spec: str | Mapping[str, Any] | Score) -> tuple[Any, dict[str, Any]]:
    """The name (or function) and its checked options. RecipeError."""
    if not isinstance(spec, Mapping):
        options: dict[str, Any] = {"name": spec}
    elif "name" not in spec:
        raise RecipeError(f"reward: expected a name and its options, found {', '.join(map(str, spec)) or 'nothing'}")
    else:
        options = dict(spec)
    name: Any = options.pop("name")
    if not isinstance(name, str) and not callable(name):
        raise RecipeError(f"reward.name: expected a name, module:function or a function, found {name!r}")
    said: str = title(name)
    known = KINDS.get(name, SCORE_OPTIONS) if isinstance(name, str) else SCORE_OPTIONS
    if known is SCORE_OPTIONS and isinstance(name, str) and ":" not in name and name not in SCORES:
        names = [*SCORES, *KINDS]
        raise RecipeError(
            f"reward: expected {', '.join(names)} or module:function, found {name!r}{did_you_mean(name, names)}"
        )
    for option, value in options.items():
        if option not in known:
            listed = ", ".join(known) or "none"
            raise RecipeError(
                f"reward {said}: expected options among {listed}, found {option!r}{did_you_mean(option, known)}"
            )
        if type(value) is not known[option]:
            raise RecipeError(f"reward.{option}: expected {known[option].__name__}, found {value!r}")
    for required in ("pattern", "path"):
        if required in known and required not in options:
            raise RecipeError(f"reward {said}: expected the option {required}, found {', '.join(options) or 'none'}")
    if options.get("batched") and (name in SCORES or "column" in options):
        raise RecipeError(
            "reward.batched: expected a function of one's own, which reads its columns from the rows; "
            "found a score of limbeck's or reward.column: leave reward.batched out"
        )
    return name, options
