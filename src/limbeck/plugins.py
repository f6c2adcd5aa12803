"""`module:function`: a user's own code wherever a recipe takes a registry's name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from limbeck.errors import RecipeError


def imported(name: str, expected: str) -> Callable[..., Any]:
    """The function at `module:function`. RecipeError, saying what was `expected` there, where there is none."""
    module_name, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    # A user's module may fail in any way while it is imported.
    except Exception as error:
        raise RecipeError(
            f"expected {expected} at {name!r}, found {type(error).__name__}: {error}; is it on PYTHONPATH?"
        ) from error
    if not callable(function):
        raise RecipeError(f"expected {expected} at {name!r}, found {type(function).__name__}")
    return function
