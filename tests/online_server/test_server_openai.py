"""The official client against a real server: the text is the engine's own, however it is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import openai
import pytest
from online_server_helpers import NAME, Start, client_of, service_of, written

PROMPT = "Once upon a time, there was a little"
MESSAGES: list[Any] = [{"role": "system", "content": "Tell."}, {"role": "user", "content": "A story about a dog."}]


def joined(chunks: Iterable[Any]) -> tuple[dict[int, str], dict[int, str], Any]:
    """(text by choice, finish reason by choice, usage) of a stream of completions."""
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    usage = None
    for chunk in chunks:
        for choice in chunk.choices:
            text = choice.text if hasattr(choice, "text") else choice.delta.content or ""
            texts[choice.index] = texts.get(choice.index, "") + text
            if choice.finish_reason:
                assert choice.index not in reasons
                reasons[choice.index] = choice.finish_reason
        usage = chunk.usage or usage
    return texts, reasons, usage


def test_server_writes_what_generate_writes(client: openai.OpenAI, stories: tuple[Any, Any]) -> None:
    answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=60, temperature=0)
    expected = written(stories, PROMPT, 60)
    assert answer.choices[0].text == expected.text and expected.text.startswith(" ")
    assert answer.choices[0].finish_reason == expected.reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == expected.tokens == 60
    assert answer.usage.prompt_tokens == len(stories[1](PROMPT)["input_ids"])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 60


def test_server_chats_by_the_tokenizers_template(client: openai.OpenAI, stories: tuple[Any, Any]) -> None:
    prompt = "system: Tell.\nuser: A story about a dog.\nassistant:"
    answer = client.chat.completions.create(model=NAME, messages=MESSAGES, max_completion_tokens=40, temperature=0)
    ids = stories[1](prompt, add_special_tokens=False)["input_ids"]
    expected = written(stories, ids, 40)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None and answer.usage.prompt_tokens == len(ids)
    parts: list[Any] = [{"type": "text", "text": "A story "}, {"type": "text", "text": "about a dog."}]
    again = client.chat.completions.create(
        model=NAME, messages=[MESSAGES[0], {"role": "user", "content": parts}], max_tokens=40, temperature=0
    )
    assert again.choices[0].message.content == expected.text


def test_server_goes_on_with_a_conversation(client: openai.OpenAI, stories: tuple[Any, Any]) -> None:
    """The client sends back the message that it was sent, nulls and all."""
    said = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=9, temperature=0).choices[0].message
    talk: list[Any] = [*MESSAGES, said, {"role": "user", "content": "And then?"}]
    answer = client.chat.completions.create(model=NAME, messages=talk, max_tokens=9, temperature=0)
    prompt = f"system: Tell.\nuser: A story about a dog.\nassistant: {said.content}\nuser: And then?\nassistant:"
    ids = stories[1](prompt, add_special_tokens=False)["input_ids"]
    assert answer.usage is not None and answer.usage.prompt_tokens == len(ids)
    assert answer.choices[0].message.content == written(stories, ids, 9).text


def test_server_ends_at_the_end_of_text(client: openai.OpenAI, stories: tuple[Any, Any]) -> None:
    prompt = "They all went home and slept."
    expected = written(stories, prompt, 450)
    assert expected.reason == "stop" and 1 < expected.tokens < 450
    answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=450, temperature=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected.text, "stop")
    assert answer.usage is not None and answer.usage.completion_tokens == expected.tokens  # the EOS is one of them


@pytest.mark.parametrize("seed", [1, 2])
def test_server_samples_as_plain_decoding_without_a_draft(start: Start, stories: tuple[Any, Any], seed: int) -> None:
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.2}
    with start(gamma=0) as address:
        answer = client_of(address).completions.create(
            model=NAME, prompt=PROMPT, max_tokens=30, seed=seed, n=3, extra_body={"top_k": 40}, **options
        )
    expected = [
        written(stories, PROMPT, 30, seed=seed, n=3, top_k=40, place=place, **options).text for place in (0, 1, 2)
    ]
    assert [choice.text for choice in answer.choices] == expected
    assert len(set(expected)) == 3


@pytest.mark.parametrize("stream_tokens", [1, 7])
def test_server_streams_what_it_answers_whole(start: Start, stories: tuple[Any, Any], stream_tokens: int) -> None:
    """With usage, n, several prompts and stop strings; in pieces of one size whatever was accepted at once."""
    wanted: dict[str, Any] = {"model": NAME, "max_tokens": 50, "seed": 5, "n": 2, "stop": [" was", "zzz"]}
    prompts = [PROMPT, "The cat"]
    with start(service=service_of(stories, plain_every=0), stream_tokens=stream_tokens) as address:
        client = client_of(address)
        whole = client.completions.create(prompt=prompts, **wanted)
        texts, reasons, usage = joined(
            client.completions.create(prompt=prompts, stream=True, stream_options={"include_usage": True}, **wanted)
        )
        assert [texts[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]
        assert [reasons[choice.index] for choice in whole.choices] == [choice.finish_reason for choice in whole.choices]
        assert usage == whole.usage and usage.completion_tokens > 0
        chat: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "max_tokens": 21, "temperature": 0}
        said = client.chat.completions.create(**chat).choices[0].message.content
        chunks = list(client.chat.completions.create(stream=True, **chat))
        assert joined(chunks)[0] == {0: said}
        assert all(chunk.usage is None for chunk in chunks)
        assert chunks[0].choices[0].delta.role == "assistant"
        sized = client.chat.completions.create(stream=True, logprobs=True, **chat)
        sizes = [len(chunk.choices[0].logprobs.content or []) for chunk in sized if chunk.choices[0].logprobs]
        assert sizes == [stream_tokens] * (21 // stream_tokens)


@pytest.mark.parametrize("stop", ["time", "e was", "s", " girl named", ". ", "nothing like it"])
def test_server_stops_before_a_stop_string(client: openai.OpenAI, stories: tuple[Any, Any], stop: str) -> None:
    whole = written(stories, "Once upon a", 60).text
    expected = whole.split(stop)[0]
    wanted: dict[str, Any] = {"model": NAME, "prompt": "Once upon a", "max_tokens": 60, "temperature": 0, "stop": stop}
    answer = client.completions.create(**wanted)
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == ("stop" if stop in whole else "length")
    pieces = [chunk.choices[0].text for chunk in client.completions.create(stream=True, **wanted)]
    assert "".join(pieces) == expected and not any(stop in piece for piece in pieces)


def test_server_gives_the_targets_logprobs(client: openai.OpenAI, stories: tuple[Any, Any]) -> None:
    expected = written(stories, PROMPT, 12)
    answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=12, temperature=0, logprobs=0)
    found = answer.choices[0].logprobs
    assert found is not None and found.tokens is not None and found.text_offset is not None
    assert found.token_logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    text = answer.choices[0].text
    ends = [*found.text_offset[1:], len(text)]
    places = zip(found.tokens, found.text_offset, ends, strict=True)
    assert found.tokens == [text[begin:end] for _, begin, end in places] and found.tokens[0].startswith(" ")
    chat = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=9, temperature=0, logprobs=True, top_logprobs=0
    )
    content = chat.choices[0].logprobs.content if chat.choices[0].logprobs else None
    assert content is not None and len(content) == 9
    assert all(bytes(entry.bytes or ()).decode() == entry.token for entry in content)
    assert "".join(entry.token for entry in content) == chat.choices[0].message.content


def test_server_counts_tokens_given_as_numbers(client: openai.OpenAI, stories: tuple[Any, Any]) -> None:
    first, second = (stories[1](text)["input_ids"] for text in (PROMPT, "The cat"))
    by_number = client.completions.create(model=NAME, prompt=[first, second], max_tokens=8, temperature=0)
    by_text = client.completions.create(model=NAME, prompt=[PROMPT, "The cat"], max_tokens=8, temperature=0)
    assert [choice.text for choice in by_number.choices] == [choice.text for choice in by_text.choices]
    alone = client.completions.create(model=NAME, prompt=first, max_tokens=8, temperature=0)
    assert alone.choices[0].text == by_number.choices[0].text
    assert by_number.usage == by_text.usage and by_number.usage is not None
    assert by_number.usage.prompt_tokens == len(first) + len(second) and by_number.usage.completion_tokens == 16


def test_server_tells_a_requests_own_acceptance_when_asked(client: openai.OpenAI) -> None:
    wanted: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": 200, "temperature": 0}
    silent = client.completions.create(**wanted)
    assert silent.usage is not None and "limbeck" not in (silent.usage.model_extra or {})
    asked = client.completions.create(**wanted, extra_body={"acceptance": True}).usage
    by_header = client.completions.create(**wanted, extra_headers={"X-Limbeck-Acceptance": "true"}).usage
    for usage in (
        asked,
        by_header,
    ):  # not the same: one round in fifty is plain, and a draft's few right tokens may fall there
        assert usage is not None
        found: Any = (usage.model_extra or {})["limbeck"]
        # A round gives its accepted tokens and one more; the prompt's round gives one.
        assert 200 <= found["accepted"] + found["rounds"] <= 200 + 3
    assert 0 < found["accepted"] < found["drafted"] and found["accepted"] <= found["verified"] <= found["drafted"]
    assert 0 < found["alpha"] < 1 and found["draft_efficiency"] == found["accepted"] / found["drafted"]


def test_server_tells_the_acceptance_of_a_stream(client: openai.OpenAI) -> None:
    """Whoever asks for it gets the usage that it is a part of."""
    wanted: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": 30, "temperature": 0, "stream": True}
    usage = joined(client.completions.create(**wanted, extra_headers={"X-Limbeck-Acceptance": "true"}))[2]
    assert usage.completion_tokens == 30 and usage.model_extra["limbeck"]["drafted"] > 0
    assert joined(client.completions.create(**wanted))[2] is None


def test_server_names_its_model(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == NAME and client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="expected the model"):
        client.models.retrieve("gpt-7")


def test_server_without_a_template_refuses_chat(start: Start) -> None:
    with start(template=None) as address:
        with pytest.raises(openai.BadRequestError, match="chat template"):
            client_of(address).chat.completions.create(model=NAME, messages=MESSAGES)
