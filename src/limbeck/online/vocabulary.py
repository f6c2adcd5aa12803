"""Which tokens a draft with a reduced head may draft."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.data import read
from limbeck.errors import RecipeError

_TEXTS = ("prompt", "input", "completion", "text")


def likely_tokens(tokenizer: Any, rows: int, sources: Sequence[tuple[Any, Mapping[str, str] | None]] = ()) -> Tensor:
    """The `rows` tokens that the texts of these sources (see `data.read`, with their columns) use most, filled up with
    the first of the vocabulary, which are the earliest merges of its tokenizer. RecipeError for fewer than one row."""
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    if rows < 1:
        raise RecipeError(f"--head-rows: expected from 1 to {vocabulary} tokens, found {rows}: leave it out for all")
    counts: Counter[int] = Counter()
    for source, columns in sources:
        texts = [_text(row) for row in read(source, columns=columns)]
        for tokens in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            counts.update(tokens)
    chosen = dict.fromkeys(token for token, _ in counts.most_common(rows)) | dict.fromkeys(range(vocabulary))
    return torch.tensor(sorted(list(chosen)[:rows]))


def _text(row: Mapping[str, Any]) -> str:
    turns = [str(message["content"]) for message in row.get("messages", ())]
    return " ".join([*turns, *(str(row[key]) for key in _TEXTS if key in row)])
