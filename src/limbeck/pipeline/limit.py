"""An equal budget: optimiser steps, seconds of training, or trained tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass

from limbeck.errors import RecipeError

UNLIMITED = 10**6
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Limit:
    """At most one is set; none: each recipe's own `training.max_steps`."""

    seconds: float | None = None
    steps: int | None = None
    tokens: int | None = None

    @staticmethod
    def parse(*, budget: str | None, steps: int | None, tokens: int | None) -> Limit:
        """From the command line. RecipeError for more than one, or for a budget that is no time."""
        given = [
            name
            for name, value in (("--budget", budget), ("--steps", steps), ("--tokens", tokens))
            if value is not None
        ]
        if len(given) > 1:
            raise RecipeError(f"expected one budget; found {' and '.join(given)}; leave one")
        if any(value is not None and value < 1 for value in (steps, tokens)):
            raise RecipeError(f"{given[0]}: expected at least 1; found {steps if steps is not None else tokens}")
        return Limit(seconds=None if budget is None else _seconds(budget), steps=steps, tokens=tokens)

    def training(self) -> dict[str, int]:
        """What the limit changes in a recipe's `training`: seconds and tokens are watched, not counted in steps."""
        if self.seconds is not None or self.tokens is not None:
            return {"max_steps": UNLIMITED}
        return {} if self.steps is None else {"max_steps": self.steps}

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"{self.seconds:g} s of training"
        if self.steps is not None:
            return f"{self.steps} optimiser steps"
        return "the recipe's own steps" if self.tokens is None else f"{self.tokens} trained tokens"


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if match is None or float(match[1]) <= 0:
        raise RecipeError(f"--budget: expected a time as 90s, 10m or 1h; found {text!r}")
    return float(match[1]) * UNITS[match[2]]
