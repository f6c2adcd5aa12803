"""A target's answers, recorded once with its distributions (`online.recording`) and kept, to be replayed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.data import read, render
from limbeck.decoding import Sampling
from limbeck.errors import DataError
from limbeck.models import context_length, eos_tokens, fingerprint
from limbeck.online import Trace
from limbeck.online.recording import record_answers
from limbeck.pipeline.cells import Say
from limbeck.studies.setting import Domain

LONGEST_PROMPT = 256
"""Rows with a longer prompt are left out of a domain: they would be read for longer than they are answered."""

_TEXT_PROMPT = 16  # tokens of a plain text that are given
_SHARD = 64  # answers in a file
_ARRAYS = [field.name for field in fields(Trace) if field.type == "Array"]


def prompts_of(
    domain: Domain, tokenizer: Any, model: Any, count: int, max_tokens: int, least: int | None = None
) -> list[list[int]]:
    """The first `count` prompts of a domain that leave room for an answer, by the tokenizer's chat template where it
    has one (plain texts: their first tokens). DataError where there are fewer, or fewer than `least` if it is given."""
    rows = read(domain.path, columns=domain.columns or None)
    plain = "text" in rows[0] or tokenizer.chat_template is None
    examples, _ = render(
        rows, tokenizer, template=None if plain else "chat", prompt_tokens=_TEXT_PROMPT if "text" in rows[0] else None
    )
    context = context_length(model)
    longest = LONGEST_PROMPT if context is None else min(LONGEST_PROMPT, context - max_tokens)
    found = [list(example.tokens[: example.prompt_tokens]) for example in examples]
    found = [prompt for prompt in found if len(prompt) <= longest]
    least = count if least is None else least
    if len(found) < least:
        raise DataError(
            f"{domain.path}: expected at least {least} prompts of at most {longest} tokens for {domain.name}, found "
            f"{len(found)}: ask for fewer requests"
        )
    return found[:count]


def record(
    target: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    *,
    max_tokens: int,
    temperature: float,
    batch: int,
    say: Say,
) -> list[Trace]:
    """The target's answers as traces with all positions, in the order of the prompts; those that are in `folder` are
    read. An answer ends with EOS or after `max_tokens`."""
    place = folder / _digest(fingerprint(dict(target.named_parameters())), target.dtype, max_tokens, temperature)
    place.mkdir(parents=True, exist_ok=True)
    sampling = Sampling(max_tokens, temperature=temperature, stop_tokens=tuple(eos_tokens(target, tokenizer)))
    found: list[Trace] = []
    for start in range(0, len(prompts), _SHARD):
        shard = prompts[start : start + _SHARD]
        path = place / f"{start:06d}-{_digest([list(prompt) for prompt in shard])}.npz"
        if not path.exists():
            say(f"recording answers {start} to {start + len(shard) - 1}")
            _save(path, record_answers(target, tokenizer, shard, sampling, batch=batch, first=start))
        found += _load(path, start)
    return found


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _save(path: Path, traces: Sequence[Trace]) -> None:
    arrays = {f"{trace.id}/{name}": getattr(trace, name) for trace in traces for name in _ARRAYS}
    aside = path.with_name(f".{path.name}")
    np.savez_compressed(aside, **arrays)
    aside.rename(path)


def _load(path: Path, first: int) -> Iterator[Trace]:
    with np.load(path) as file:
        for id_ in sorted({name.partition("/")[0] for name in file.files}, key=int):
            number = first + int(id_)
            arrays = {name: file[f"{id_}/{name}"] for name in _ARRAYS}
            yield Trace(number, str(number), **arrays, role="train", until=float("inf"))
