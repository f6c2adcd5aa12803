"""A service that tests look into, and what they compare the server with."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import httpx
import openai
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from limbeck.decoding import Sampling, generate
from limbeck.decoding.controller import Fixed
from limbeck.decoding.drafts.layers import layers_draft
from limbeck.decoding.requests import Event, Request
from limbeck.decoding.speculative import Engine
from limbeck.models import eos_tokens
from limbeck.online import Service
from limbeck.online.server import Served

NAME = "stories260k"
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


Start = Callable[..., AbstractContextManager[str]]


_CLIENT = openai.OpenAI(base_url="http://127.0.0.1", api_key="none", max_retries=0, timeout=60)  # half a second to make


def client_of(address: str, key: str = "none") -> openai.OpenAI:
    return _CLIENT.with_options(base_url=f"{address}/v1", api_key=key)


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The address of a server in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def scraped(address: str) -> dict[str, float]:
    """The sums over all labels of each sample, and over those with one label."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{address}/metrics").text):
        for sample in family.samples:
            for key in {sample.name, *(f"{sample.name}:{'='.join(label)}" for label in sample.labels.items())}:
                found[key] = found.get(key, 0.0) + sample.value
    return found


@dataclass(frozen=True)
class Written:
    text: str
    tokens: int
    logprobs: list[float]
    reason: str


def written(stories: tuple[Any, Any], prompt: str | list[int], most: int, *, place: int = 0, **options: Any) -> Written:
    """Plain decoding: the text that the whole of the tokens adds to the prompt's."""
    model, tokenizer = stories
    tokens = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    settings: dict[str, Any] = {"temperature": 0.0, **options}
    sampling = Sampling(most, stop_tokens=eos_tokens(model, tokenizer), **settings)
    completion = generate(model, [tokens], sampling, tokenizer=tokenizer)[place]
    before, after = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (tokens, tokens + completion.tokens))
    return Written(after[len(before) :], len(completion.tokens), completion.logprobs, completion.finish_reason)


class Recorded(Service):
    """A service that remembers what it was asked for, and can be held between two rounds."""

    def __init__(self, engine: Engine, **options: Any) -> None:
        super().__init__(engine, **options)
        self.seen: list[Request] = []
        self.cancelled: list[str] = []

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> None:
        self.seen.append(request)
        super().submit(request, on_event)

    def cancel(self, id: str) -> None:
        self.cancelled.append(id)
        super().cancel(id)

    @contextmanager
    def held(self) -> Iterator[None]:
        go_on, released = threading.Event(), queue.SimpleQueue[bool]()
        self.between_rounds(lambda: released.put(go_on.wait(20)))
        try:
            yield
        finally:
            go_on.set()
        assert released.get(timeout=20), "held for too long"


def service_of(stories: tuple[Any, Any], *, max_batch: int = 8, gamma: int = 3, **options: Any) -> Recorded:
    model, tokenizer = stories
    drafts = {"cut": layers_draft(model, [0, 1])} if gamma else {}
    engine = Engine(model, tokenizer, drafts, Fixed("cut" if gamma else None, gamma), max_batch=max_batch)
    return Recorded(engine, **options)


def served_by(stories: tuple[Any, Any], service: Any, *, template: str | None = CHAT, **changes: Any) -> Served:
    model, tokenizer = stories[0], deepcopy(stories[1])
    tokenizer.chat_template = template
    served = Served(service, tokenizer, NAME, model.config.max_position_embeddings, eos_tokens(model, tokenizer))
    return replace(served, **changes)
