"""Completions as text, piece by piece."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from limbeck.online.server.text import Detokenizer, Encoder

TEXT = "héllo 👩‍🚀 wörld — 日本語 naïve €5"


@pytest.fixture(scope="module")
def bytewise() -> Any:
    """A token for each byte, as byte-level BPE falls back to, and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: place for place, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def fallback(stories: tuple[Any, Any], text: str) -> list[int]:
    """Every byte as SentencePiece's byte token."""
    return stories[1].convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in text.encode()])


def test_detokenizer_never_ends_inside_a_character(bytewise: Any, stories: tuple[Any, Any]) -> None:
    for tokenizer, tokens in ((bytewise, bytewise(TEXT)["input_ids"]), (stories[1], fallback(stories, TEXT))):
        assert len(tokens) == len(TEXT.encode())
        detokenizer = Detokenizer(tokenizer, tokens[:0])
        pieces = [detokenizer.feed([token])[0] for token in tokens]
        assert [piece for piece in pieces if piece] == list(TEXT)
        assert detokenizer.finish([], stopped=False)[0] == ""


def test_detokenizer_leaves_out_the_beginning_of_a_character(bytewise: Any) -> None:
    tokens = bytewise("ab👩")["input_ids"][:-1]
    for cut in range(len(tokens) + 1):
        detokenizer = Detokenizer(bytewise, [])
        text = detokenizer.feed(tokens[:cut])[0] + detokenizer.finish(tokens[cut:], stopped=False)[0]
        assert text == "ab"


def test_detokenizer_passes_on_bytes_that_are_no_text(bytewise: Any) -> None:
    """A model that writes nothing else is not held back for ever, and what follows is right."""
    invalid = bytewise.convert_tokens_to_ids(["ÿ"]) * 300
    detokenizer = Detokenizer(bytewise, [])
    text = detokenizer.feed(invalid)[0]
    assert set(text) == {"\ufffd"} and len(text) > 200
    assert detokenizer.feed(bytewise("ok")["input_ids"])[0].endswith("ok")
    assert len(detokenizer.tokens) - detokenizer.known < 200


@pytest.mark.parametrize("seed", range(5))
def test_detokenizer_pieces_join_to_the_whole(stories: tuple[Any, Any], seed: int) -> None:
    """Real words, byte tokens, special tokens, however they are cut; the space before the first word too."""
    tokenizer, draw = stories[1], random.Random(seed)
    prompt = tokenizer("Once upon")["input_ids"]
    tokens = tokenizer("a time, there was a girl who said: yes.")["input_ids"][1:] * 3
    for place in sorted(draw.sample(range(len(tokens)), 6), reverse=True):
        tokens[place:place] = draw.choice([fallback(stories, "é"), fallback(stories, "日"), [2]])
    whole = tokenizer.decode(prompt + tokens, skip_special_tokens=True)[len("Once upon") :]
    detokenizer, pieces, place = Detokenizer(tokenizer, prompt), [], 0
    while place < len(tokens):
        size = draw.randint(1, 4)
        pieces.append(detokenizer.feed(tokens[place : place + size])[0])
        place += size
    pieces.append(detokenizer.finish([], stopped=False)[0])
    assert "".join(pieces) == whole and whole.startswith(" a time")


def test_detokenizer_forgets_what_is_written(stories: tuple[Any, Any]) -> None:
    tokenizer = stories[1]
    tokens = tokenizer(" the dog ran")["input_ids"][1:] * 2000
    detokenizer = Detokenizer(tokenizer, [])
    text = detokenizer.feed(tokens)[0]
    assert text == tokenizer.decode(tokens) and len(detokenizer.tokens) < 6000 < len(tokens)


@pytest.mark.parametrize(("stops", "expected"), [(("lo w",), "hel"), (("wx", "ll"), "he"), (("ld!",), "hello world")])
def test_detokenizer_holds_back_what_may_become_a_stop_string(
    bytewise: Any, stops: tuple[str, ...], expected: str
) -> None:
    """A text that ends with the token that completes the stop string, as the engine ends it; or without one."""
    tokens = bytewise("hello world")["input_ids"]
    ends = [place for place in range(1, 12) if any(stop in "hello world"[:place] for stop in stops)]
    tokens = tokens[: ends[0]] if ends else tokens
    detokenizer, text = Detokenizer(bytewise, [], stops), ""
    for token in tokens[:-1]:
        text += detokenizer.feed([token])[0]
        assert expected.startswith(text)
    assert text + detokenizer.finish(tokens[-1:], stopped=bool(ends))[0] == expected


def test_the_text_and_the_bytes_of_one_token(bytewise: Any, stories: tuple[Any, Any]) -> None:
    """Bytes join to the text, also where tokens are parts of a character; texts do elsewhere, spaces and all."""
    of_bytes, of_pieces = Detokenizer(bytewise, []), Detokenizer(stories[1], [])
    for detokenizer, tokens in ((of_bytes, bytewise(TEXT)["input_ids"]), (of_pieces, fallback(stories, TEXT))):
        assert b"".join(detokenizer.bytes_of(token) or b"?" for token in tokens) == TEXT.encode()
    assert {of_pieces.text_of(token) for token in fallback(stories, "é")} == {"\ufffd"}
    words = stories[1]("the dog ran", add_special_tokens=False)["input_ids"]
    assert "".join(map(of_pieces.text_of, words)) == " the dog ran"
    assert of_pieces.text_of(2) == "</s>" and of_pieces.text_of(10**6) == ""


def test_encoder_takes_templates_that_change_earlier_turns(stories: tuple[Any, Any]) -> None:
    """Thoughts are left out of the history, as reasoning models have it; an assistant may greet first."""
    tokenizer = copy.deepcopy(stories[1])
    tokenizer.chat_template = (
        "{{ messages[0]['role'] }}|{% for m in messages %}{{ m['role'] }}:"
        "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
        "{% else %}{{ m['content'] }}{% endif %};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    talk = [("assistant", "Hi"), ("user", "a"), ("assistant", "well</think>b"), ("user", "c")]
    tokens = Encoder(tokenizer).chat([{"role": role, "content": content} for role, content in talk])
    text = "assistant|assistant:Hi;user:a;assistant:b;user:c;assistant:"
    assert tokens == tokenizer(text, add_special_tokens=False)["input_ids"]
