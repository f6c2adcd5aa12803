"""Many clients, clients that leave, and what is counted."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from online_server_helpers import NAME, Recorded, Start, client_of, scraped, served_by, wait_for, written

from limbeck.online.server import Limits, create_app, stream
from limbeck.online.server.text import Detokenizer

LONG = {"model": NAME, "prompt": "Once upon a time", "max_tokens": 500, "temperature": 0, "min_tokens": 490}


def hang_up(address: str, body: dict[str, Any]) -> socket.socket:
    """Sends a request; whoever closes the socket has left."""
    place = urlsplit(address)
    text = json.dumps(body).encode()
    connection = socket.create_connection((place.hostname, place.port))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {place.netloc}\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(text)}\r\n\r\n".encode() + text)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waiting", [False, True])
def test_server_ends_what_nobody_waits_for(start: Start, service: Recorded, stream: bool, waiting: bool) -> None:
    """A client that leaves, while it is written or while it waits: its place is free at once, in the engine too."""
    with start(service=service, limits=Limits(in_flight=2)) as address:
        body = LONG | {"n": 2, "stream": stream}
        if waiting:
            with service.held():
                connection = hang_up(address, body)
                wait_for(lambda: len(service.seen) == 2)
                connection.close()
                wait_for(lambda: len(service.cancelled) == 2)
        else:
            connection = hang_up(address, body)
            wait_for(lambda: len(service.engine.rows) == 2)
            connection.close()
            wait_for(lambda: len(service.cancelled) == 2)
        assert sorted(service.cancelled) == sorted(request.id for request in service.seen)
        wait_for(lambda: not service.engine.busy)
        client = client_of(address)
        answer = client.completions.create(model=NAME, prompt="Once", max_tokens=5, n=2, temperature=0)
        assert answer.usage is not None and answer.usage.completion_tokens == 10
        assert len(service.cancelled) == 2
        found = scraped(address)
        assert found["limbeck:cancelled_total"] == 2 and found["vllm:request_success_total"] == 2
        assert found["vllm:generation_tokens_total"] < 600


def test_server_ends_a_stream_that_the_client_closes(start: Start, service: Recorded) -> None:
    with start(service=service) as address:
        wanted: Any = {name: value for name, value in LONG.items() if name != "min_tokens"}
        stream = client_of(address).completions.create(stream=True, **wanted, extra_body={"min_tokens": 490})
        assert next(iter(stream)).choices[0].text
        stream.close()
        wait_for(lambda: service.cancelled and not service.engine.busy)


def test_server_gives_up_a_client_that_does_not_read(
    stories: tuple[Any, Any], service: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays, and takes nothing: what is written for it ends, and its place is free."""
    monkeypatch.setattr(stream, "_PATIENCE", 0.2)
    text = json.dumps(LONG | {"stream": True}).encode()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}

    async def ask() -> list[str]:
        asked, sent = [{"type": "http.request", "body": text}], list[str]()

        async def receive() -> Any:
            return asked.pop() if asked else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message["type"])
            if len(sent) > 5:
                await asyncio.Event().wait()

        await asyncio.wait_for(create_app(served_by(stories, service))(scope, receive, send), 20)
        return sent

    with service:
        assert asyncio.run(ask()) == ["http.response.start"] + ["http.response.body"] * 5
        wait_for(lambda: not service.engine.busy)
    assert service.cancelled == [request.id for request in service.seen]


def test_server_writes_long_answers_beside_others(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making text of a whole answer takes its time, in which nobody else waits."""
    writing, go_on = threading.Event(), threading.Event()
    real = Detokenizer.finish

    def slow(self: Detokenizer, *arguments: Any, **more: Any) -> Any:
        writing.set()
        assert go_on.wait(20)
        return real(self, *arguments, **more)

    monkeypatch.setattr(Detokenizer, "finish", slow)
    body = {"model": NAME, "prompt": "Once", "max_tokens": 4}
    with start() as address, ThreadPoolExecutor(1) as pool:
        try:
            answer = pool.submit(httpx.post, f"{address}/v1/completions", json=body, timeout=30)
            assert writing.wait(20)
            assert httpx.get(f"{address}/health", timeout=10).status_code == 200
        finally:
            go_on.set()
        assert answer.result().status_code == 200


def test_server_says_that_it_has_ended(start: Start, service: Recorded) -> None:
    """To a request that comes between the end and the news of it: it is not the client's mistake."""
    with start(service=service) as address:
        service.stop()
        with pytest.raises(openai.InternalServerError, match="it was stopped") as caught:
            client_of(address).completions.create(model=NAME, prompt="Once")
    assert caught.value.status_code == 503 and caught.value.code == "engine_ended"


@pytest.mark.parametrize("stream", [False, True])
def test_server_gives_each_of_sixteen_clients_its_own_answer(
    start: Start, stories: tuple[Any, Any], stream: bool
) -> None:
    names = [
        "Lily",
        "Tom",
        "Ben",
        "Sue",
        "Max",
        "Mia",
        "Sam",
        "Amy",
        "Tim",
        "Anna",
        "Jack",
        "Lucy",
        "Bob",
        "Sara",
        "Joe",
        "Ella",
    ]
    prompts = [f"One day, {name} saw a" for name in names]

    def ask(place: int) -> tuple[str, int]:
        wanted: Any = {"model": NAME, "prompt": prompts[place], "max_tokens": 20 + place, "temperature": 0}
        client = client_of(address)
        if not stream:
            answer = client.completions.create(**wanted)
            return answer.choices[0].text, answer.usage.completion_tokens
        chunks = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **wanted))
        usage: Any = chunks[-1].usage
        return "".join(choice.text for chunk in chunks for choice in chunk.choices), usage.completion_tokens

    with start(max_batch=4) as address, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    expected = [written(stories, prompt, 20 + place) for place, prompt in enumerate(prompts)]
    assert answers == [(one.text, one.tokens) for one in expected]
    assert len({text for text, _ in answers}) == 16


def test_server_metrics_add_up(start: Start, service: Recorded) -> None:
    """What the answers say of themselves is what is counted."""
    with start(service=service) as address:
        client = client_of(address)
        before = scraped(address)
        assert before["vllm:spec_decode_num_draft_tokens_total"] == 0 == before["vllm:generation_tokens_total"]
        counts = {"drafted": 0, "accepted": 0, "verified": 0, "alpha": 0.0}
        prompt_tokens = tokens = 0
        for seed in range(6):
            answer = client.completions.create(
                model=NAME,
                prompt=["Once upon a time", "The dog"],
                max_tokens=30,
                seed=seed,
                n=1 + seed % 2,
                stop=["."] if seed > 3 else None,
                extra_body={"acceptance": True},
            )
            assert answer.usage is not None
            found: Any = answer.usage.model_extra
            for name in ("drafted", "accepted", "verified"):
                counts[name] += found["limbeck"][name]
            counts["alpha"] += found["limbeck"]["alpha"] * found["limbeck"]["verified"]
            prompt_tokens += answer.usage.prompt_tokens
            tokens += answer.usage.completion_tokens
        after = scraped(address)
        snapshot = service.snapshot()
    assert after["vllm:prompt_tokens_total"] == prompt_tokens
    assert after["vllm:generation_tokens_total"] == tokens == snapshot["tokens"]
    assert after["vllm:spec_decode_num_draft_tokens_total"] == counts["drafted"] > 0
    assert after["vllm:spec_decode_num_accepted_tokens_total"] == counts["accepted"] > 0
    assert after["limbeck:verified_positions_total"] == counts["verified"]
    assert after["limbeck:alpha_sum_total"] == pytest.approx(counts["alpha"])
    places = [after[f"vllm:spec_decode_num_accepted_tokens_per_pos_total:position={place}"] for place in range(3)]
    assert sum(places) == counts["accepted"] and sorted(places, reverse=True) == places
    assert after["vllm:spec_decode_num_drafts_total"] >= places[0]
    assert after["vllm:request_success_total"] == 18 and after["vllm:e2e_request_latency_seconds_count"] == 6
    assert after["vllm:time_to_first_token_seconds_count"] == 6
    assert 0 < after["vllm:time_to_first_token_seconds_sum"] < after["vllm:e2e_request_latency_seconds_sum"]
    assert after["vllm:num_requests_running"] == 0 == after["vllm:num_requests_waiting"]
    spent = snapshot["ledger"]
    assert sum(spent.values()) - spent["training"] == pytest.approx(snapshot["wall_s"], abs=0.05)


def test_server_says_that_its_engine_has_ended(start: Start, service: Recorded) -> None:
    """The request that was being written is answered, and those after it; not one is left hanging."""

    def broken() -> list[Any]:
        raise RuntimeError("no memory left")

    with start(service=service) as address:
        with service.held():
            results: list[httpx.Response] = []
            ask: Any = lambda: results.append(httpx.post(f"{address}/v1/completions", json=LONG, timeout=20))  # noqa: E731
            thread = threading.Thread(target=ask)
            thread.start()
            wait_for(lambda: service.seen)
            service.engine.step = broken
        thread.join(20)
        assert results[0].status_code == 500 and results[0].json()["error"]["type"] == "server_error"
        wait_for(lambda: service.failure)
        assert httpx.get(f"{address}/health").status_code == 503
        with pytest.raises(openai.InternalServerError, match="the engine has ended: RuntimeError: no memory left"):
            client_of(address).completions.create(model=NAME, prompt="Once")
