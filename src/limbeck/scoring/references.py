"""What a completion is compared with: the columns of its row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REFERENCE_COLUMNS = ("references", "completion", "answer")


def references_in(row: Mapping[str, Any], column: str | None = None) -> list[Any]:
    """The references in `column` of a row, by default in the first of REFERENCE_COLUMNS that it has, or the last
    message where that is the assistant's. Empty where there is none; "" and [] are none.

    A list holds several references; numbers become text; an object is handed over as it is.
    """
    for name in REFERENCE_COLUMNS if column is None else (column,):
        if (found := row.get(name)) is None or found in ("", []):
            continue
        if isinstance(found, list | tuple):
            return [str(one) if isinstance(one, int | float) else one for one in found]
        return [str(found) if isinstance(found, int | float) else found]
    messages = row.get("messages") if column is None else None
    if messages and messages[-1].get("role") == "assistant" and messages[-1].get("content"):
        return [messages[-1]["content"]]
    return []
