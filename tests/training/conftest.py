"""Recipes that train in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_helpers import tiny_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """tiny_recipe(method, **changes), by default with its output in a fresh folder."""

    def make(method: str = "kd", output: Path | None = None, **changes: Any) -> Any:
        return tiny_recipe(output or tmp_path / "run", method, **changes)

    return make
