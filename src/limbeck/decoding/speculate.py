"""Prompts in, completions out, by the speculative engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from limbeck.decoding.controller import Fixed
from limbeck.decoding.drafts import Draft
from limbeck.decoding.records import Completion
from limbeck.decoding.requests import Observer, Request
from limbeck.decoding.sampler import Sampling
from limbeck.decoding.speculative import Engine
from limbeck.errors import RolloutError


def speculate(
    target: Any,
    draft: Draft | None,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    gamma: int = 5,
    max_batch: int = 16,
    tokenizer: Any = None,
    observer: Observer | None = None,
    streams: Sequence[tuple[int, ...]] | None = None,
) -> list[Completion]:
    """`sampling.n` completions a prompt, prompt-major as `generate` gives them: the same tokens, where greedy or
    without a draft. Raises RolloutError as `Engine.add` does, and for NaN."""
    drafts = {} if draft is None else {"draft": draft}
    engine = Engine(
        target, tokenizer, drafts, Fixed("draft" if draft else None, gamma), max_batch=max_batch, observer=observer
    )
    one = replace(sampling, n=1)
    count = 0
    for index, prompt in enumerate(prompts):
        for sample in range(sampling.n):
            stream = (index,) if streams is None else streams[index]
            engine.add(Request(str(count), tuple(prompt), one, stream, sample))
            count += 1
    tokens: list[list[int]] = [[] for _ in range(count)]
    logprobs: list[list[float]] = [[] for _ in range(count)]
    reasons: list[Any] = [None] * count
    while engine.busy:
        for event in engine.step():
            place = int(event.id)
            if event.error is not None:
                raise RolloutError(f"prompt {place // sampling.n}: {event.error}")
            tokens[place] += event.tokens
            logprobs[place] += event.logprobs
            reasons[place] = event.finish_reason
    return [Completion(*written) for written in zip(tokens, logprobs, reasons, strict=True)]
