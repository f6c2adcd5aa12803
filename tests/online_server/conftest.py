"""A real server on a free port."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from fastapi import FastAPI
from online_server_helpers import NAME, Recorded, Start, client_of, served_by, service_of

from limbeck.models import load_model, load_tokenizer
from limbeck.online.server import create_app


@pytest.fixture(scope="session")
def stories(shared: Path) -> tuple[Any, Any]:
    folder = shared / "models" / NAME
    return load_model(folder), load_tokenizer(folder)


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


@pytest.fixture
def start(stories: tuple[Any, Any]) -> Start:
    """start(service=None, max_batch=8, gamma=3, template=CHAT, **fields of Served): the address of its own server."""

    @contextmanager
    def begin(*, service: Any = None, max_batch: int = 8, gamma: int = 3, **changes: Any) -> Iterator[str]:
        with service or service_of(stories, max_batch=max_batch, gamma=gamma) as running:
            with listening(create_app(served_by(stories, running, **changes))) as address:
                yield address

    return begin


@pytest.fixture
def service(stories: tuple[Any, Any]) -> Recorded:
    """For `start`, where a test looks into it."""
    return service_of(stories)


@pytest.fixture(scope="session")
def address(stories: tuple[Any, Any]) -> Iterator[str]:
    """One server for all tests that only ask."""
    with service_of(stories) as running, listening(create_app(served_by(stories, running))) as found:
        yield found


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return client_of(address)
