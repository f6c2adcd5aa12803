"""A target's answers with its distributions, as live traffic would show them.

They are written by the engine that serves, decoding plainly, and kept by the buffer that learns, with all positions:
nothing here computes a distribution by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from limbeck.decoding import Engine, FeatureDraft, Fixed, Observation, Request, Sampling
from limbeck.decoding.drafts.feature_files import FEATURE
from limbeck.errors import RolloutError
from limbeck.online.buffer import Buffer, Trace

TOP = 64  # tokens kept of a distribution


def record_answers(
    target: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch: int,
    first: int = 0,
    reader: FeatureDraft | None = None,
) -> list[Trace]:
    """Traces of the answers, `batch` written at once, whose id is the prompt's place; those of which nothing can be
    learnt are left out. Prompt i draws from the random numbers of stream `first` + i.

    reader: a draft of the target's hidden states: what it reads is kept too. It drafts nothing.
    Raises RolloutError for a prompt that the engine cannot answer.
    """
    buffer = Buffer(positions="all", top=TOP, most_bytes=1 << 60, seconds=float("inf"), taps=reader is not None)
    if reader is not None:
        reader.benched = True  # what it is shown is for the buffer

    def observe(observation: Observation) -> None:
        for row in observation.rows:
            buffer.observe(row)

    drafts = {} if reader is None else {FEATURE: reader}
    engine = Engine(target, tokenizer, drafts, Fixed(None, 0), max_batch=batch, observer=observe)
    for place, prompt in enumerate(prompts):
        engine.add(Request(str(place), tuple(prompt), sampling, stream=(first + place,)))
    while engine.busy:
        for event in engine.step():
            if event.error is not None:
                raise RolloutError(f"prompt {event.id}: {event.error}")
            if event.finish_reason is not None:
                buffer.close(event.id)
    return list(buffer.traces)
