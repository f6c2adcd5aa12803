"""What the student minimises: one file an objective, one line in a plain dict."""

from __future__ import annotations

from typing import Any

from limbeck.objectives.cross_entropy import cross_entropy
from limbeck.objectives.divergence import divergence

OBJECTIVES: dict[str, Any] = {
    "cross_entropy": cross_entropy,
    "divergence": divergence,
}

__all__ = ["OBJECTIVES", "cross_entropy", "divergence"]
