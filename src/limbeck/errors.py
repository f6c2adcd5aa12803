"""Every error a user can cause or must act on.

    LimbeckError                 catch this one
    ├── RecipeError              a key, value or combination in a recipe
    ├── DataError                a file, a row, a column
    ├── ModelError               a folder, weights, a configuration
    │   └── PreflightError       two models (or a model and a method) that do not fit each other
    ├── RolloutError             text could not be written: no room, NaN logits
    ├── ScoreError               a metric or reward that raised or returned nonsense
    ├── TrainingError            a NaN loss, a run that cannot go on
    └── CheckpointError          a checkpoint that cannot be written or read

A message says what was expected, what was found, and the fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LimbeckError(Exception):
    """The root: the command line prints its message on one line and exits with code 2."""


class RecipeError(LimbeckError):
    """A key, value or combination in a recipe."""


class DataError(LimbeckError):
    """A file, a row, a column."""


class ModelError(LimbeckError):
    """A model folder, its weights or its configuration."""


class PreflightError(ModelError):
    """Two models, or a model and a method, that do not fit each other."""


class RolloutError(LimbeckError):
    """A completion could not be written."""


class ScoreError(LimbeckError):
    """A metric or reward that raised or returned nonsense."""


class TrainingError(LimbeckError):
    """A run that cannot go on."""


class CheckpointError(LimbeckError):
    """A checkpoint that cannot be written or read."""


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """`; did you mean 'X'?` for the closest known word, or nothing: the end of a message."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
