"""A real server on a free port."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from online_server_helpers import NAME, Recorded, Start, client_of, listening, served_by, service_of

from limbeck.models import load_model, load_tokenizer
from limbeck.online.server import create_app


@pytest.fixture(scope="session")
def stories(shared: Path) -> tuple[Any, Any]:
    folder = shared / "models" / NAME
    return load_model(folder), load_tokenizer(folder)


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
