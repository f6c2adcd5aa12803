"""Tiny models, traffic and recorded traces that the tests of the online part share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from limbeck.decoding import Sampling
from limbeck.decoding.controller import Fixed
from limbeck.decoding.drafts import Draft
from limbeck.decoding.drafts.layers import layers_draft
from limbeck.decoding.requests import Event, Observation, Observed, Request
from limbeck.decoding.speculative import Engine
from limbeck.online import (
    Buffer,
    Learning,
    ModelLearner,
    Pace,
    Service,
    Trace,
    Training,
    Version,
    model_learner,
)
from limbeck.online.buffer import Role

VOCABULARY = 50


def llama(vocabulary: int = VOCABULARY, layers: int = 2, scale: float = 0.1, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=96,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def prompts(count: int, vocabulary: int = VOCABULARY, length: int = 5, seed: int = 1) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, vocabulary, (count, length), generator=generator).tolist()
    return [tuple(row[: length - place % 3]) for place, row in enumerate(rows)]


def drain(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    return events


def show(buffer: Buffer, observation: Observation) -> None:
    for row in observation.rows:
        buffer.observe(row)


def record(
    model: Any,
    draft: Draft,
    buffer: Buffer,
    texts: Sequence[tuple[int, ...]],
    *,
    tokens: int = 24,
    gamma: int = 3,
    train: Callable[[int], bool] = lambda place: True,
    keep: Callable[[int], bool] = lambda place: False,
    temperature: float = 1.0,
) -> tuple[dict[str, list[int]], list[Observed]]:
    """Serves the prompts under the buffer. Returns each request's whole text, and what the engine showed (without the
    logits, which are gone)."""
    seen: list[Observed] = []

    def observe(observation: Any) -> None:
        show(buffer, observation)
        seen.extend(observation.rows)

    engine = Engine(model, None, {"cut": draft}, Fixed("cut", gamma), max_batch=4, observer=observe)
    for place, text in enumerate(texts):
        sampling = Sampling(tokens - place % 4, temperature=temperature, seed=place)
        engine.add(Request(str(place), text, sampling, (place,), train=train(place), keep_all=keep(place)))
    written = {str(place): list(text) for place, text in enumerate(texts)}
    while engine.busy:
        for event in engine.step():
            written[event.id] += event.tokens
            if event.finish_reason is not None:
                buffer.close(event.id)
    return written, seen


def all_traces(buffer: Buffer) -> list[Trace]:
    return [*buffer.traces, *buffer.held["stop"], *buffer.held["gate"], *buffer.past]


@torch.no_grad()
def target_logprobs(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """(T, V) float64: row i is the distribution that token i is drawn from (row 0 is of no meaning)."""
    logits = model(torch.tensor([list(tokens)]), use_cache=False).logits[0].double()
    return torch.cat([logits[:1], logits[:-1]]).log_softmax(-1)


class Listener:
    """Collects the events of requests."""

    def __init__(self) -> None:
        self.events: dict[str, list[Event]] = {}
        self.threads: set[int] = set()
        self.ended = threading.Condition()
        self.open = 0

    def expect(self, id: str) -> Callable[[Event], None]:
        self.events[id] = []
        self.open += 1
        return self.receive

    def receive(self, event: Event) -> None:
        self.threads.add(threading.get_ident())
        with self.ended:
            self.events[event.id].append(event)
            if event.finish_reason is not None:
                self.open -= 1
                self.ended.notify_all()

    def wait(self, seconds: float = 30.0) -> None:
        with self.ended:
            assert self.ended.wait_for(lambda: self.open == 0, seconds), f"{self.open} requests without an end"

    def tokens(self, id: str) -> list[int]:
        return [token for event in self.events[id] for token in event.tokens]


GREEDY = Sampling(20, temperature=0.0)


def submit_all(service: Service, sampling: Sampling, texts: Sequence[Any], start: int = 0, **changes: Any) -> Listener:
    """Asks for a completion of each text, as r0, r1, ... from `start` on."""
    listener = Listener()
    for place, text in enumerate(texts, start):
        request = Request(f"r{place}", text, replace(sampling, seed=place), (place,), **changes)
        service.submit(request, listener.expect(request.id))
    return listener


def learning_of(model: Any, draft: Any, folder: Path, **changes: Any) -> Learning:
    build = partial(model_learner, saved(model, folder / "model"), layers=[0])
    training = Training(learning_rate=3e-3, epochs=4)
    pace = Pace(update_size=10**9, update_seconds=1e9)
    settings = {"buffer": Buffer(positions="all"), "training": training, "pace": pace, **changes}
    return Learning(draft, build, folder / "versions", **settings)


class FakeUpdater:
    """An updater that answers at once, as told; what it is asked is kept."""

    def __init__(self, results: list[Any]) -> None:
        self.results, self.jobs, self.worked, self.restarts = results, [], 0.0, 0
        self.shares: list[float] = []
        self.held = False

    def run(self, job: Any) -> Any:
        self.jobs.append(job)
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    def set_share(self, share: float) -> None:
        self.shares.append(share)

    def set_busy(self, busy: bool) -> None: ...

    def set_held(self, held: bool) -> None:
        self.held = held

    def ready(self) -> None: ...

    def end(self) -> None: ...


def with_versions(folder: Path, results: list[Any]) -> tuple[Learning, Any]:
    """Learning with two versions on disk and an updater that answers so; no thread, no engine."""
    draft = layers_draft(llama(), [0])
    draft.bind(VOCABULARY)
    learning = learning_of(llama(), draft, folder, pace=Pace(update_size=50, update_seconds=1e9))
    weights = {name: weight.detach() for name, weight in ModelLearner(llama(layers=1)).trained().items()}
    for number in (0, 1):
        learning.versions.save(Version(number, {name: weight + number for name, weight in weights.items()}))
    fake = FakeUpdater(results)
    learning.updater = fake  # pyright: ignore
    learning.buffer.traces.append(small_trace(1, "train"))
    learning.buffer.held["gate"].extend(small_trace(2 + place) for place in range(learning.gate.least))
    return learning, fake


def small_trace(number: int, role: Role = "gate") -> Trace:
    one = np.zeros((1, 2), np.float16)
    position = np.array([2], np.int32)
    ids_NK = np.zeros((1, 2), np.int32)
    return Trace(number, "t", np.array([1, 2, 3], np.int32), position, ids_NK, one, one[:, 0], role, time.time() + 99)
