"""The task of `limbeck quickstart`: problems, their tokenizer, and a teacher that solves them."""

from __future__ import annotations

from pathlib import Path

from limbeck.data.embedded.problems import rows
from limbeck.data.embedded.vocabulary import tokenizer

TEACHER = Path(__file__).parent / "teacher"

__all__ = ["TEACHER", "rows", "tokenizer"]
