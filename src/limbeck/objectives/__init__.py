"""What the student minimises: one file an objective, one line in a plain dict."""

from __future__ import annotations

from typing import Any

from limbeck.objectives.cross_entropy import cross_entropy
from limbeck.objectives.divergence import divergence
from limbeck.objectives.language_modelling import language_modelling
from limbeck.objectives.minillm import MiniLLM
from limbeck.objectives.policy import policy

OBJECTIVES: dict[str, Any] = {
    "cross_entropy": cross_entropy,
    "divergence": divergence,
    "policy": policy,
    "language_modelling": language_modelling,
}

__all__ = ["OBJECTIVES", "MiniLLM", "cross_entropy", "divergence", "language_modelling", "policy"]
