"""Completions by transformers' own loop, for models whose states `SlotCache` cannot hold (recurrent, compressed).

`model.generate` runs the model and keeps whatever it keeps; a logits processor draws each token here, with the same
sampler and the same random numbers as in `writer`, and leaves no other choice. Prompts of one length share a batch, so
that nothing is padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Literal

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from limbeck.decoding.records import Completion, Row, finished, nothing_to_draw
from limbeck.decoding.sampler import History, Sampling, draw, served_logits, uniforms
from limbeck.models import unwrap
from limbeck.ops.tiles import token_logprobs


def write_with_transformers(
    model: Any,
    rows: list[Row],
    batch_size: int,
    done: dict[int, Completion],
    *,
    sampling: Sampling,
    tokenizer: Any,
    vocabulary: int,
) -> None:
    """Puts the completions of `rows` into `done`, batch by batch."""
    base: Any = unwrap(model)
    device = base.get_input_embeddings().weight.device
    for _, group in groupby(sorted(rows, key=lambda row: len(row.tokens)), key=lambda row: len(row.tokens)):
        same = list(group)
        for start in range(0, len(same), batch_size):
            batch = same[start : start + batch_size]
            drawing = _Drawing(batch, sampling, tokenizer, vocabulary, device)
            ids_BT = torch.tensor([row.tokens for row in batch], device=device)
            with _own_settings(base):
                base.generate(
                    ids_BT,
                    attention_mask=torch.ones_like(ids_BT),
                    generation_config=GenerationConfig(max_new_tokens=batch[0].room, do_sample=False, pad_token_id=0),
                    logits_processor=[drawing],
                    stopping_criteria=[_AllEnded(drawing)],
                )
            for row, tokens, logprobs, reason in drawing.results():
                done[row.place] = finished(row, tokens, [logprobs], reason)


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """transformers fills what a generation config leaves open from the model's: meanwhile that says nothing."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


class _Drawing(LogitsProcessor):
    """Draws the next token of every row and rules all others out."""

    def __init__(self, rows: list[Row], sampling: Sampling, tokenizer: Any, vocabulary: int, device: Any) -> None:
        self.rows = rows
        self.sampling = sampling
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.prompt_tokens = len(rows[0].tokens)
        self.key_B = torch.tensor([row.key for row in rows], device=device)
        self.gamma_B = torch.tensor([row.gamma for row in rows], device=device)
        self.tokens: list[list[int]] = [[] for _ in rows]
        self.logprobs: list[list[float]] = [[] for _ in rows]
        self.stopped: list[bool] = [False for _ in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        logits_BV = scores[:, : self.vocabulary].float()
        written = input_ids.shape[1] - self.prompt_tokens
        real_BT = torch.ones_like(input_ids, dtype=torch.bool)
        written_BT = (torch.arange(input_ids.shape[1], device=input_ids.device) >= self.prompt_tokens) & real_BT
        served_BV = served_logits(logits_BV, self.sampling, History(input_ids, real_BT, written_BT))
        for row, none_left in zip(self.rows, (served_BV == -torch.inf).all(-1).tolist(), strict=True):
            if none_left:
                raise nothing_to_draw(row, written, self.vocabulary)
        if self.sampling.temperature == 0:
            tokens_B = served_BV.argmax(-1)
        else:
            tokens_B = draw(served_BV, uniforms(self.key_B, self.gamma_B, torch.full_like(self.key_B, written)))
        logprobs_B = token_logprobs(logits_BV, tokens_B)
        for place, (token, logprob) in enumerate(zip(tokens_B.tolist(), logprobs_B.tolist(), strict=True)):
            if not self.stopped[place]:
                self.tokens[place].append(token)
                self.logprobs[place].append(logprob)
                self.stopped[place] = self._ends(self.rows[place], self.tokens[place])
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens_B[:, None], 0.0)

    def results(self) -> Iterator[tuple[Row, list[int], list[float], Literal["stop", "length"]]]:
        for row, tokens, logprobs, stopped in zip(self.rows, self.tokens, self.logprobs, self.stopped, strict=True):
            yield row, tokens, logprobs, "stop" if stopped else "length"

    def _ends(self, row: Row, tokens: list[int]) -> bool:
        text = [*row.tokens[-1:], *tokens]
        return (
            tokens[-1] in self.sampling.stop_tokens or self.sampling.completes(self.tokenizer, [text], [len(tokens)])[0]
        )


class _AllEnded(StoppingCriteria):
    """Ends the batch with its last row."""

    def __init__(self, drawing: _Drawing) -> None:
        self.drawing = drawing

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # pyright: ignore
        ended = all(self.drawing.stopped)
        return torch.full((input_ids.shape[0],), ended, dtype=torch.bool, device=input_ids.device)
