"""The rollout engine: prompts in, completions out, by the fastest writer that the model allows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from limbeck.decoding.attention import step_attention
from limbeck.decoding.cache import beyond_attention
from limbeck.decoding.general import write_with_transformers
from limbeck.decoding.modes import evaluating
from limbeck.decoding.packed import packed_weights
from limbeck.decoding.records import Completion, Mix, Prompt, Row, check_prompt
from limbeck.decoding.sampler import Sampling, stream_key
from limbeck.decoding.writer import write_in_place
from limbeck.errors import RolloutError
from limbeck.models import context_length, unwrap, vocabulary_rows
from limbeck.ops.pages import give_back, keep_pages

LOG = logging.getLogger(__name__)

Write = Callable[[list[Row], int, dict[int, Completion]], None]
"""write(rows, batch_size, done): puts the rows' completions into `done`, by place, each as it ends."""

_PACKS = 16
"""Tokens of a completion from which on rearranging the weights for it is worth the time."""

_FITTING: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""The batch size that a model was left with when memory ran out: its next rollouts begin there."""

_SAID: set[str] = set()


def generate(
    policy: Any,
    prompts: Sequence[Sequence[int] | Prompt],
    sampling: Sampling,
    *,
    batch_size: int | None = None,
    tokenizer: Any = None,
    streams: Sequence[tuple[int, ...]] | None = None,
) -> list[Completion]:
    """`sampling.n` completions a prompt, prompt-major: those of prompt i stand at [i n, (i + 1) n).

    policy: a causal language model of transformers, also wrapped, or a Mix of two; they are in eval mode meanwhile and
        left as they were.
    batch_size: sequences in a forward, by default 256, or 64 from 100 M parameters on.
    tokenizer: needed for `sampling.stop_strings` only.
    streams: one tuple of integers a prompt, which with `sampling.seed` and the sample's number fixes its random numbers
        whatever the batch; by default the prompt's place.

    Raises RolloutError: a prompt that is empty, fills the context or has tokens outside the vocabulary; logits that are
    NaN or leave no token to draw; a model that is not causal. Out of memory, it goes on with half the batch.
    """
    if not prompts:
        return []
    models = [policy.student, policy.teacher] if isinstance(policy, Mix) else [policy]
    vocabulary, limit = _common_limits(models)
    _check_sampling(sampling, tokenizer, vocabulary, mixed=len(models) > 1)
    if batch_size is not None and batch_size < 1:
        raise RolloutError(f"expected a batch_size of at least 1, found {batch_size}: leave it out for the default")
    if streams is not None and len(streams) != len(prompts):
        raise RolloutError(f"expected a stream for each of {len(prompts)} prompts, found {len(streams)}")
    rows: list[Row] = []
    for index, prompt in enumerate(prompts):
        tokens = _prompt_tokens(prompt, index, limit, vocabulary)
        room = sampling.max_tokens if limit is None else min(sampling.max_tokens, limit - len(tokens))
        for sample in range(sampling.n):
            key = stream_key(sampling.seed, (index,) if streams is None else streams[index], sample)
            rows.append(Row(len(rows), index, tokens, room, *key))
    if sampling.max_tokens == 0:
        return [Completion([], [], "length") for _ in rows]
    if batch_size is None:
        batch_size = 256 if sum(p.numel() for model in models for p in model.parameters()) < 100e6 else 64
    keep_pages()
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(tuple(model.modules())))
            if sampling.max_tokens >= _PACKS:
                stack.enter_context(packed_weights(model))
            stack.enter_context(step_attention(model))
        write = _writer(policy, models, sampling, tokenizer, vocabulary)
        completions = _write_all(write, rows, batch_size, models[0])
    give_back()
    return completions


def _writer(policy: Any, models: list[Any], sampling: Sampling, tokenizer: Any, vocabulary: int) -> Write:
    """In place, where every layer of every model keeps plain keys and values; else by transformers' own loop."""
    found = [reason for model in models if (reason := beyond_attention(unwrap(model).config)) is not None]
    if not found:
        share = policy.share if isinstance(policy, Mix) else None
        return partial(
            write_in_place, models, share=share, sampling=sampling, tokenizer=tokenizer, vocabulary=vocabulary
        )
    if len(models) > 1:
        raise RolloutError(f"Mix: expected models of attention layers, found {found[0]}: use two without such states")
    if found[0] not in _SAID:
        _SAID.add(found[0])
        LOG.warning("rollouts by transformers' own loop, which is slower: found %s", found[0])
    return partial(write_with_transformers, models[0], sampling=sampling, tokenizer=tokenizer, vocabulary=vocabulary)


def _write_all(write: Write, rows: list[Row], batch_size: int, model: Any) -> list[Completion]:
    """All completions in order. What was written before memory ran out stays written."""
    done: dict[int, Completion] = {}
    batch_size = min(batch_size, len(rows), _FITTING.get(model, len(rows)))
    while len(done) < len(rows):
        try:
            write([row for row in rows if row.place not in done], batch_size, done)
        except (RuntimeError, MemoryError) as error:
            if batch_size == 1 or not _out_of_memory(error):
                raise
            batch_size //= 2
            _FITTING[model] = batch_size
            LOG.warning("out of memory with %d sequences in a forward: going on with %d", 2 * batch_size, batch_size)
    return [done[place] for place in range(len(rows))]


def _out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says so: its CPU allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _common_limits(models: list[Any]) -> tuple[int, int | None]:
    """(tokens of the vocabulary, context length or None) of models that write together. RolloutError for a model that
    this engine cannot run, and for two vocabularies."""
    sizes: list[int] = []
    limits: list[int] = []
    for model in models:
        base: Any = unwrap(model)
        if base.config.is_encoder_decoder:
            raise RolloutError(f"expected a causal language model, found an encoder-decoder ({base.config.model_type})")
        sizes.append(vocabulary_rows(base) or base.get_input_embeddings().weight.shape[0])
        limit = context_length(base)
        limits += [] if limit is None else [limit]
    if len(set(sizes)) > 1:
        raise RolloutError(
            f"Mix: expected one vocabulary, found {sizes[0]} tokens in the student and {sizes[1]} in the teacher: "
            "declare the tokens that they share by limbeck.models.set_vocabulary"
        )
    return sizes[0], min(limits, default=None)


def _check_sampling(sampling: Sampling, tokenizer: Any, vocabulary: int, *, mixed: bool) -> None:
    if mixed and (sampling.filters or sampling.penalises or sampling.min_tokens or sampling.temperature == 0):
        raise RolloutError(
            "Mix: expected a temperature above 0 and no filter (top_p, top_k, penalties, min_tokens), found one: "
            "a mixture of filtered distributions has no usual meaning"
        )
    sampling.check(tokenizer, vocabulary)


def _prompt_tokens(prompt: Sequence[int] | Prompt, index: int, limit: int | None, vocabulary: int) -> tuple[int, ...]:
    """The tokens of a prompt that a causal model can continue."""
    if isinstance(prompt, Prompt):
        if prompt.decoder_start or prompt.extras:
            raise RolloutError(
                f"prompt {index}: expected tokens alone for a causal model, found decoder_start or extras: remove them"
            )
        prompt = prompt.tokens
    tokens = tuple(int(token) for token in prompt)
    check_prompt(tokens, limit, vocabulary, f"prompt {index}: ")
    return tokens
