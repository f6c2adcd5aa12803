"""Drafts, requests and readings that the tests of the speculative engine share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from decoding_helpers import llama
from torch import Tensor
from transformers import LlamaForCausalLM

from limbeck.decoding import (
    Draft,
    Engine,
    Event,
    FeatureDraft,
    FeatureNet,
    ModelDraft,
    NgramDraft,
    Request,
    Sampling,
    feature_shape,
    layers_draft,
)


def target(**changes: Any) -> LlamaForCausalLM:
    """Wide enough for every way of packing weights: the kernels take some shapes alone."""
    return llama(hidden_size=64, intermediate_size=96, **changes)


def feature(model: Any, **options: Any) -> FeatureDraft:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return FeatureDraft(FeatureNet(feature_shape(model, inner=24)), model, **options)


def half(model: Any) -> Tensor:
    """Every other token."""
    return torch.arange(1, model.config.vocab_size, 2)


# Every kind, and every way of keeping weights and vocabulary.
DRAFTS: dict[str, Callable[[Any], Draft]] = {
    "layers": lambda model: layers_draft(model, [0]),
    "layers int8": lambda model: layers_draft(model, [0], weights="int8"),
    "layers of some tokens": lambda model: layers_draft(model, [0], ids_D=half(model)),
    "feature": feature,
    "feature of some tokens": lambda model: feature(model, weights="int8", ids_D=half(model)),
    "ngram": lambda model: NgramDraft(size=1),
}


def copy_of(model: Any, noise: float = 0.0) -> ModelDraft:
    """A draft that is the model, or near to it."""
    draft = layers_draft(model, range(model.config.num_hidden_layers))
    with torch.no_grad():
        for parameter in draft.reader.model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return draft


def serve(engine: Engine, requests: Sequence[Request], *, after: Callable[[int], None] | None = None) -> list[Event]:
    """Each request's events joined into its last one, in the requests' order. `after(steps)` is called after a step."""
    for request in requests:
        engine.add(request)
    done = {request.id: Event(request.id, [], []) for request in requests}
    steps = 0
    while engine.busy:
        for event in engine.step():
            old = done[event.id]
            assert old.finish_reason is None, "an event after the last one"
            tokens, logprobs = old.tokens + event.tokens, old.logprobs + event.logprobs
            done[event.id] = Event(event.id, tokens, logprobs, event.finish_reason, event.counters, event.error)
        steps += 1
        assert steps < 10_000
        if after is not None:
            after(steps)
    assert not engine.rows and all(event.finish_reason for event in done.values())
    return list(done.values())


def requests_of(prompts: Sequence[Sequence[int]], sampling: Sampling, **options: Any) -> list[Request]:
    return [Request(str(index), tuple(prompt), sampling, (index,), **options) for index, prompt in enumerate(prompts)]


@torch.no_grad()
def full_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """(T, V): row i is what the model predicts after tokens [0, i], by one forward without a cache."""
    return model(input_ids=torch.tensor([list(tokens)])).logits[0].float()
