"""Bad input: errors in OpenAI's shape, whatever is sent; and no trace of what must not be trained on."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from online_server_helpers import NAME, Recorded, Start, client_of

TEXT = {"model": NAME, "prompt": "Once", "max_tokens": 4}
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and "Traceback" not in body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "4"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"n": 1000}, "n"),
        ({"stop": ""}, "stop.0"),
        ({"stop": [3]}, "stop.0"),
        ({"seed": 2**70}, "seed"),
        ({"min_tokens": 5}, None),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logit_bias": {"3": 1}}, "logit_bias"),
        ({"temprature": 0}, "temprature"),
        ({"stream_options": {"include_usage": True}}, None),
        ({"logprobs": 5}, "logprobs"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"top_k": -2}, "top_k"),
    ],
)
def test_server_refuses_what_has_no_meaning(address: str, change: dict[str, Any], param: str | None) -> None:
    for path, body in (("completions", TEXT), ("chat/completions", CHAT)):
        text = json.dumps(body | change)
        answer = httpx.post(f"{address}/v1/{path}", content=text, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        error = error_of(answer)
        assert error["type"] == "invalid_request_error" and (param is None or error["param"] == param)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b"null", b'{"model": 3}', b"\xff\xfe", b'{"model":"stories260k","prompt":"\\ud800"}']
    + [b"[" * 100_000, b'{"model":"stories260k","prompt":[]}', b'{"model":"stories260k","prompt":[[1],"a"]}']
    + [b'{"model":"\\ud800","prompt":"a"}', b'{"model":"stories260k","prompt":"a","seed":' + b"9" * 5000 + b"}"],
)
def test_server_refuses_what_is_no_request(address: str, body: bytes) -> None:
    answer = httpx.post(f"{address}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 404), answer.text
    error_of(answer)


def test_server_names_what_it_does_not_know(client: openai.OpenAI, address: str) -> None:
    with pytest.raises(openai.NotFoundError, match="expected the model 'stories260k', found 'gpt'") as caught:
        client.completions.create(model="gpt", prompt="a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="route of a draft .cut."):
        client.completions.create(model=NAME, prompt="a", extra_body={"route": "nobody"})
    with pytest.raises(openai.BadRequestError, match="expected tokens below 512"):
        client.completions.create(model=NAME, prompt=[1, 600])
    assert error_of(httpx.get(f"{address}/v1/nothing"))
    assert httpx.get(f"{address}/v1/completions").status_code == 405
    with pytest.raises(openai.BadRequestError, match="role"):
        client.chat.completions.create(model=NAME, messages=[{"role": "owl", "content": "hu"}])  # pyright: ignore
    with pytest.raises(openai.BadRequestError, match="end with the user's"):
        client.chat.completions.create(model=NAME, messages=[{"role": "assistant", "content": "hu"}])


def test_server_takes_fields_that_change_nothing(client: openai.OpenAI) -> None:
    neutral: dict[str, Any] = {"best_of": 1, "logit_bias": {}, "user": "me", "suffix": None, "top_k": 0}
    answer = client.completions.create(model=NAME, prompt="Once", max_tokens=4, temperature=0, extra_body=neutral)
    assert answer.choices[0].text
    # Small enough to overflow: it is greedy.
    cold = client.completions.create(model=NAME, prompt="Once", max_tokens=4, temperature=1e-300)
    assert cold.choices[0].text == answer.choices[0].text


@pytest.mark.parametrize(("prompt", "most"), [("dog " * 600, None), ("Once", 511), ("dog " * 300, 400)])
def test_server_names_the_context_that_is_too_small(client: openai.OpenAI, prompt: str, most: int | None) -> None:
    for ask in (
        lambda: client.completions.create(model=NAME, prompt=prompt, max_tokens=most),
        lambda: client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": prompt}], max_completion_tokens=most
        ),
    ):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens") as caught:
            ask()
        assert caught.value.code == "context_length_exceeded"


def test_server_fills_the_context_where_nothing_is_said(client: openai.OpenAI) -> None:
    """A chat without max_tokens goes on until its end or the context's; a completion has OpenAI's 16 tokens."""
    chat = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "dog " * 100}],
        temperature=0,
        extra_body={"min_tokens": 40},
    )
    assert chat.usage is not None and 40 <= chat.usage.completion_tokens <= 512 - chat.usage.prompt_tokens
    text = client.completions.create(model=NAME, prompt="Once upon", temperature=0)
    assert text.usage is not None and text.usage.completion_tokens == 16


def test_server_takes_both_words_for_all_tokens(start: Start, service: Recorded) -> None:
    with start(service=service) as address:
        for top_k in (-1, 0, 7):
            client_of(address).completions.create(model=NAME, prompt="Once", extra_body={"top_k": top_k})
    assert [request.sampling.top_k for request in service.seen] == [0, 0, 7]


def test_server_passes_on_who_must_not_be_trained_on(start: Start, service: Recorded) -> None:
    """By the field or by the header; a header cannot undo the field."""
    with start(service=service) as address:
        client = client_of(address)
        ask: Any = lambda **more: client.completions.create(model=NAME, prompt="Once", max_tokens=2, **more)  # noqa: E731
        ask()
        ask(extra_body={"train": False})
        ask(extra_headers={"X-Limbeck-Train": "false"})
        ask(extra_body={"train": False}, extra_headers={"X-Limbeck-Train": "true"})
        ask(extra_headers={"X-Limbeck-Route": "cut"})
        ask(extra_body={"route": "cut"})
        with pytest.raises(openai.BadRequestError, match="at most 256 characters"):
            ask(extra_headers={"X-Limbeck-Route": "a" * 257})
        with pytest.raises(openai.BadRequestError, match="X-Limbeck-Train: expected true or false, found 'no'"):
            ask(extra_headers={"X-Limbeck-Train": "no"})
    assert [request.train for request in service.seen] == [True, False, False, False, True, True]
    assert [request.route for request in service.seen] == [None, None, None, None, "cut", "cut"]
