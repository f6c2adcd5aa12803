"""Which tokens a draft with a reduced head may draft."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.data import read
from limbeck.errors import RecipeError
from limbeck.online.buffer import Trace

LEAST_RISE = 0.002
"""Of p(D), the target's mean mass on what may be drafted, which no acceptance is above."""

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


def reranked(ids_D: Tensor, traces: Sequence[Trace]) -> Tensor | None:
    """As many tokens as `ids_D`, those to which the target gave the most mass in these traces, where that raises p(D)
    by `LEAST_RISE` at least; else None. Where two have as much, the one that may be drafted by now stays."""
    if not traces:
        return None
    ids_M = np.concatenate([trace.ids_NK.ravel() for trace in traces])
    mass_M = np.exp(np.concatenate([trace.logprobs_NK.ravel() for trace in traces]).astype(np.float64))
    mass_V = np.bincount(ids_M, mass_M, minlength=int(ids_D.max()) + 1)
    now_V = np.isin(np.arange(len(mass_V)), ids_D.numpy())
    chosen_D = np.lexsort((now_V, mass_V))[-len(ids_D) :]
    rise = (mass_V[chosen_D].sum() - mass_V[now_V].sum()) / sum(trace.size for trace in traces)
    return torch.from_numpy(np.sort(chosen_D)) if rise >= LEAST_RISE else None


def _text(row: Mapping[str, Any]) -> str:
    turns = [str(message["content"]) for message in row.get("messages", ())]
    return " ".join([*turns, *(str(row[key]) for key in _TEXTS if key in row)])
