"""A recipe before it is typed: plain dicts from YAML files, packaged ones by name, dotted overrides laid on top."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from limbeck.errors import RecipeError, did_you_mean


class _Yaml(yaml.SafeLoader):
    """YAML 1.1 takes 3e-3 for a word: here it is a number, as in YAML 1.2."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)

PACKAGED = Path(__file__).parent / "recipes"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A recipe file, or a packaged recipe by its bare name (`stories`, `stories.yaml`)."""
    file = Path(path)
    if not file.exists() and file.parent == Path("."):
        file = PACKAGED / file.with_suffix(".yaml")
    if not file.is_file():
        packaged = sorted(recipe.stem for recipe in PACKAGED.glob("*.yaml"))
        raise RecipeError(
            f"{path}: no such recipe; give a YAML file or a packaged one ({', '.join(packaged)})"
            f"{did_you_mean(file.stem, packaged)}"
        )
    try:
        settings = yaml.load(file.read_text(), _Yaml)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise RecipeError(f"{path}: expected `key: value` lines; found {type(settings).__name__}")
    return settings


def apply_overrides(settings: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`training.max_steps=100`: the value is YAML, so numbers, lists and null work."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"override {override!r}: expected key=value, as training.max_steps=100")
        *parents, last = key.strip().split(".")
        place = settings
        for parent in parents:
            inner: Any = place.get(parent)
            if isinstance(inner, str) and parent == "student":
                inner = {"path": inner}
            place[parent] = inner if isinstance(inner, dict) else {}
            place = place[parent]
        try:
            place[last] = yaml.load(value, _Yaml)
        except yaml.YAMLError:
            raise RecipeError(f"override {override!r}: {value!r} is not a YAML value") from None
    return settings


def merge(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    """Lays `changes` over `settings`, dict by dict; a divergence or a student is replaced whole."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(settings.get(key), dict) and key not in ("divergence", "student"):
            merge(settings[key], value)
        else:
            settings[key] = value
