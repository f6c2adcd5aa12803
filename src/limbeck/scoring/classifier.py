"""A sequence classifier with one logit as a reward: relevance, entailment, preference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from limbeck.errors import RecipeError, ScoreError
from limbeck.models.load import load_sequence_classifier
from limbeck.scoring.references import references_in
from limbeck.scoring.registry import prompt_name

CLASSIFIER_OPTIONS: dict[str, type] = {
    "path": str,
    "column": str,
    "alone": bool,
    "sigmoid": bool,
    "truncate": bool,
    "batch_size": int,
}
"""path: a folder with safetensors, or a hub id. The pair (first text, completion) is scored, the first text being the
prompt or the row's `column`; `alone`: the completion without it. `sigmoid`: a probability instead of the logit.
`truncate`: cut texts that are longer than the model reads, which are refused otherwise. `batch_size`: 32."""


def load_classifier(
    options: Mapping[str, Any], device: Any = None
) -> Callable[[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]], list[float]]:
    """classify(prompts, completions, rows) -> numbers, longest texts first in batches of `batch_size`.

    Raises RecipeError for options that contradict, ModelError for a folder that holds no classifier with one logit.
    """
    column, alone = options.get("column"), options.get("alone", False)
    batch_size = options.get("batch_size", 32)
    if alone and column is not None:
        raise RecipeError("reward.alone: expected no reward.column beside it, found one: leave one of them out")
    if batch_size < 1:
        raise RecipeError(f"reward.batch_size: expected at least 1, found {batch_size}")
    model: Any
    tokenizer: Any
    model, tokenizer = load_sequence_classifier(options["path"], device=device)
    limits = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    limit = min(limit for limit in limits if limit is not None)

    @torch.no_grad()
    def classify(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        if alone:
            texts: list[tuple[str, ...]] = [(completion,) for completion in completions]
        else:
            firsts = prompts if column is None else [references_in(row, column)[0] for row in rows]
            texts = list(zip(firsts, completions, strict=True))
        encoding = {"truncation": True, "max_length": limit} if options.get("truncate") else {"verbose": False}
        encoded = [tokenizer(*text, **encoding) for text in texts]
        lengths = [len(one["input_ids"]) for one in encoded]
        if too_long := [number for number, length in enumerate(lengths) if length > limit]:
            raise ScoreError(
                f"classifier at {prompt_name(prompts, too_long[0])}: expected at most {limit} tokens, found "
                f"{lengths[too_long[0]]}: set reward.truncate: true, or write less (sampling.max_tokens)"
            )
        values = [0.0] * len(texts)
        order = sorted(range(len(texts)), key=lambda number: -lengths[number])
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = tokenizer.pad([encoded[place] for place in places], return_tensors="pt").to(model.device)
            logits_B = model(**batch).logits[:, 0].float()
            values_B = logits_B.sigmoid() if options.get("sigmoid") else logits_B
            for place, value in zip(places, values_B.tolist(), strict=True):
                values[place] = value
        return values

    return classify
