"""The verifiers of reasoning-gym (Stojanovski et al., 2025, arXiv 2505.24760), each beside its problem generator."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from limbeck.data.generated import PREFIX, gym

__all__ = ["PREFIX", "is_entry", "verify"]


def is_entry(row: Mapping[str, Any]) -> bool:
    """Whether a row came from a generator."""
    entry = row.get("entry")
    return isinstance(entry, Mapping) and "source_dataset" in entry.get("metadata", {})


def verify(completion: str, entry: Any) -> float:
    """What the entry's generator makes of the answer, 0 to 1: the text in the last <answer>...</answer>, else all of
    it. Some generators give a small share for an answer of the right form."""
    answer = gym().utils.extract_answer(completion)
    judge = _verifier(entry["metadata"]["source_dataset"])
    return judge(answer=completion.strip() if answer is None else answer, entry=entry)


@cache
def _verifier(name: str) -> Any:
    return gym().get_score_answer_fn(name)
