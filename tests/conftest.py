"""Fixtures that several parts share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real material beside the repository; tests that need it are not run where it is missing."""
    if not (SHARED / "models").is_dir():
        pytest.skip("needs the folder `shared` beside the repository (real models and data)")
    return SHARED


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
