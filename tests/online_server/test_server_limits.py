"""Who is let in."""

from __future__ import annotations

import hmac
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from online_server_helpers import NAME, Recorded, Start, client_of, wait_for

from limbeck.errors import RecipeError
from limbeck.online.server import Keys, Limits
from limbeck.online.server.limits import Rates

BODY = {"model": NAME, "prompt": "Once", "max_tokens": 4}


def test_server_asks_for_a_key(start: Start) -> None:
    with start(keys=Keys(["key-number-one", "key-number-two"])) as address:
        for key in ("key-number-one", "key-number-two"):
            assert client_of(address, key).completions.create(**BODY, stream=False).choices[0].text
        for key in ("key-number-thr", "key-number-on", "key-number-one2", "Key-number-one", "", "é"):
            header: Any = {"Authorization": f"Bearer {key}".strip().encode()}
            answer = httpx.post(f"{address}/v1/completions", json=BODY, headers=header)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/v1/models", "/metrics", "/dashboard.json", "/openapi.json", "/v1/nothing"):
            assert httpx.get(address + path).status_code == 401
        assert httpx.post(address + "/dashboard/pause", headers={"X-Limbeck-Dashboard": "1"}).status_code == 401
        assert httpx.get(address + "/health").json() == {"status": "ok"}
        assert "stories" not in httpx.get(address + "/").text  # the page alone, without data
        with pytest.raises(openai.AuthenticationError):
            client_of(address, "wrong").models.list()


def test_keys_are_compared_whole_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which one it is, or where they differ, does not show in the time: digests of one length, every one compared."""
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def watched(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    keys = Keys(["first-secret", "second-secret-that-is-longer", "third-secret"])
    assert keys.find("first-secret") is not None and keys.find("third-secret") is not None
    assert keys.find("first-secre") is None and keys.find("") is None
    assert len(compared) == 4 * 3 and {len(side) for pair in compared for side in pair} == {32}


def test_keys_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\n  key-number-one  \nkey-number-two\n")
    keys = Keys.read(file)
    assert keys.find("key-number-two") and keys.find("key-number-one") and not keys.find("# ours")
    for text in ("", "# nothing\n", "short\n", "two words\n", "schlüssel-eins\n"):
        file.write_text(text)
        with pytest.raises(RecipeError, match="expected a key a line"):
            Keys.read(file)
    with pytest.raises(RecipeError, match="--api-key-file .*none"):
        Keys.read(tmp_path / "none")


def test_server_bounds_a_body(start: Start) -> None:
    limits = Limits(body_bytes=2000, choices=4, max_tokens=20)

    def pieces(size: int) -> Any:
        yield b'{"model": "stories260k", "prompt": "'
        for _ in range(size):
            yield b"a" * 100
        yield b'"}'

    with start(limits=limits) as address:
        url = f"{address}/v1/completions"
        large = httpx.post(url, json=BODY | {"prompt": "a" * 2000})
        assert large.status_code == 413 and "2000 bytes" in large.json()["error"]["message"]
        chunked = {"content-type": "application/json"}  # no length is told
        assert httpx.post(url, content=pieces(30), headers=chunked).status_code == 413
        assert httpx.post(url, content=pieces(3), headers=chunked).status_code == 200
        for change in ({"n": 5}, {"n": 2, "prompt": ["a", "b", "c"]}, {"max_tokens": 21}):
            assert httpx.post(url, json=BODY | change).status_code == 400
        assert httpx.post(url, json=BODY | {"n": 2, "prompt": ["a", "b"], "max_tokens": 20}).status_code == 200


def test_server_bounds_the_queue(start: Start, service: Recorded) -> None:
    """What is written and what waits, of all clients: beyond it 429, and room again when one has ended."""
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{address}/v1/completions", json=BODY | {"n": 2}, timeout=30))

    with start(service=service, limits=Limits(in_flight=4)) as address:
        with service.held():
            threads = [threading.Thread(target=ask) for _ in range(2)]
            for thread in threads:
                thread.start()
            wait_for(lambda: len(service.seen) == 4)
            refused = httpx.post(f"{address}/v1/completions", json=BODY)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            with pytest.raises(openai.RateLimitError, match="at most 4 completions at a time"):
                client_of(address).completions.create(**BODY, stream=False)
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert httpx.post(f"{address}/v1/completions", json=BODY | {"n": 4}).status_code == 200
        assert httpx.post(f"{address}/v1/completions", json=BODY | {"n": 5}).status_code == 429
        assert httpx.post(f"{address}/v1/completions", json=BODY | {"n": 4}).status_code == 200


def test_server_bounds_the_rate_of_a_key(start: Start) -> None:
    with start(limits=Limits(per_minute=3), keys=Keys(["key-number-one", "key-number-two"])) as address:
        headers = {"Authorization": "Bearer key-number-one"}
        ask: Any = lambda: httpx.post(f"{address}/v1/completions", json=BODY, headers=headers)  # noqa: E731
        answers = [ask() for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
        assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 200  # that costs nothing
        headers = {"Authorization": "Bearer key-number-two"}
        assert ask().status_code == 200


def test_rates_refill_steadily() -> None:
    rates = Rates(per_minute=6)  # one in 10 s, six at once
    assert [rates.wait("a", 0.0) for _ in range(6)] == [0.0] * 6
    assert rates.wait("a", 0.0) == pytest.approx(10)
    assert rates.wait("a", 4.0) == pytest.approx(6)
    assert rates.wait("b", 4.0) == 0
    assert rates.wait("a", 10.1) == 0 and rates.wait("a", 10.1) > 9
    assert [rates.wait("a", 1e4) for _ in range(7)][5:] == [0.0, pytest.approx(10)]
    for number in range(20_000):
        rates.wait(str(number), 2e4)
    assert len(rates.left) <= 10_000


def test_server_without_keys_serves_this_machine_alone(address: str) -> None:
    """Also against a page of another site whose name points here."""
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000"):
        assert httpx.get(f"{address}/v1/models", headers={"host": host}).status_code == 200
    for host in ("evil.example", "evil.example:8000", "192.168.1.2", "127.0.0.1.evil.example", ""):
        answer = httpx.get(f"{address}/v1/models", headers={"host": host})
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "wrong_host"


def test_server_takes_nothing_from_pages_of_other_sites(address: str) -> None:
    """What a browser sends here without asking first is not JSON by its own word; and it tells whose page it is."""
    url, text = f"{address}/v1/completions", json.dumps(BODY)
    for kind in (None, "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "text/plain, application/json"):
        answer = httpx.post(url, content=text, headers={} if kind is None else {"content-type": kind})
        assert answer.status_code == 415 and answer.json()["error"]["code"] == "unsupported_media_type"
    for origin in ("https://evil.example", "null", "http://127.0.0.1.evil.example", "http://[", "http://192.168.1.2"):
        answer = httpx.post(url, json=BODY, headers={"origin": origin})
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "wrong_origin", origin
    for origin in ("http://127.0.0.1:8000", "http://localhost:3000", "http://[::1]:8000"):
        assert httpx.post(url, json=BODY, headers={"origin": origin}).status_code == 200
    kind = "Application/JSON; charset=utf-8"
    assert httpx.post(url, content=text, headers={"content-type": kind}).status_code == 200


def test_limits_are_above_zero() -> None:
    for name in ("body_bytes", "choices", "in_flight", "per_minute", "max_tokens"):
        with pytest.raises(RecipeError, match=f"{name}: expected a limit above 0, found 0"):
            Limits(**{name: 0})
