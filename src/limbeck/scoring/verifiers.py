"""The verifiers of reasoning-gym (Stojanovski et al., 2025, arXiv 2505.24760), each beside its problem generator."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from limbeck.data.generated import gym


def is_entry(row: Mapping[str, Any]) -> bool:
    """Whether a row came from a generator."""
    entry = row.get("entry")
    return isinstance(entry, Mapping) and "source_dataset" in entry.get("metadata", {})


def verify(completion: str, entry: Any) -> float:
    """What the entry's generator makes of the answer, 0 to 1. Some give a small share for an answer of the right
    form."""
    return _verifier(entry["metadata"]["source_dataset"])(answer=given_answer(completion), entry=entry)


def given_answer(completion: str) -> str:
    """The text in the last <answer>...</answer>, else all of it."""
    answer = gym().utils.extract_answer(completion)
    return completion.strip() if answer is None else answer


@cache
def _verifier(name: str) -> Any:
    return gym().get_score_answer_fn(name)
