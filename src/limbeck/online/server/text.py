"""Between text and tokens: prompts as the tokenizer writes them, and completions as they grow."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from limbeck.data import render
from limbeck.errors import DataError
from limbeck.online.server.openai_api import ApiError

_CONTEXT = 8  # tokens before the first new one: how it is written may depend on them
_MOST_HELD = 64  # tokens that may wait for the end of a character


class Encoder:
    """Prompts to tokens, from any thread. It keeps a copy of the tokenizer, since the engine decodes with the other."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = deepcopy(tokenizer)
        self.lock = threading.Lock()

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """By the tokenizer's own template, ready for the answer; earlier turns as it writes them by now."""
        return self._render({"messages": messages}, "messages")

    def text(self, prompt: str) -> list[int]:
        return self._render({"prompt": prompt}, "prompt")

    def _render(self, row: dict[str, Any], param: str) -> list[int]:
        try:
            with self.lock:
                (example,), _ = render([row], self.tokenizer, train_on="last")  # one rendering, whatever its turns
        except DataError as error:
            raise ApiError(400, str(error).removeprefix("row 1: "), param=param) from None
        except (UnicodeError, TypeError, ValueError):  # a lone surrogate, out of an escape such as \ud800
            message = f"{param}: expected text that UTF-8 can hold, found a lone surrogate"
            raise ApiError(400, message, param=param) from None
        return example.tokens


class Detokenizer:
    """The text of a completion, piece by piece: a piece never ends inside a character, nor inside what may become a
    stop string. The pieces joined are what the tokenizer decodes, up to the stop string; the bytes of a character that
    was not finished are left out."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.tokens = list(prompt[-_CONTEXT:])
        self.known, self.read = 0, len(self.tokens)  # tokens[known:read] is written, and decoded again as context
        self.stops = tuple(stops)
        self.held = ""  # text that may be the beginning of a stop string
        self.length = 0  # characters so far, held ones included

    def feed(self, tokens: Sequence[int]) -> tuple[str, list[int]]:
        """(the text that these tokens add, as far as it is certain; where each of them begins)."""
        offsets = self._take(tokens)
        certain = len(self.held) - max((_overlap(self.held, stop) for stop in self.stops), default=0)
        text, self.held = self.held[:certain], self.held[certain:]
        return text, offsets

    def finish(self, tokens: Sequence[int], *, stopped: bool) -> tuple[str, list[int]]:
        """As `feed`, with the last tokens. `stopped`: by a stop string, before which the text ends."""
        offsets = self._take(tokens)
        text, self.held = self.held, ""
        if self.read < len(self.tokens):
            text += self._added().rstrip("\ufffd")
        if stopped:
            text = text[: min((place for stop in self.stops if (place := text.find(stop)) >= 0), default=len(text))]
        return text, offsets

    def _take(self, tokens: Sequence[int]) -> list[int]:
        offsets: list[int] = []
        for token in tokens:
            offsets.append(self.length)
            piece = self._decoded(token)
            self.length += len(piece)
            self.held += piece
        return offsets

    def _decoded(self, token: int) -> str:
        self.tokens.append(token)
        added = self._added()
        if (not added or added.endswith("\ufffd")) and len(self.tokens) - self.read < _MOST_HELD:
            return ""
        self.known, self.read = self.read, len(self.tokens)
        if self.known > 4096:  # forget what is written
            del self.tokens[: self.known]
            self.known, self.read = 0, self.read - self.known
        return added

    def _added(self) -> str:
        before = self.decode(self.tokens[self.known : self.read])
        return self.decode(self.tokens[self.known :])[len(before) :]

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def text_of(self, token: int) -> str:
        """What this token adds behind another one, special tokens by their names."""
        return self.tokenizer.convert_tokens_to_string(["a", self._word(token)])[1:]

    def bytes_of(self, token: int) -> bytes | None:
        """Its bytes, also where they are a part of a character. None: the tokenizer does not say."""
        if "\ufffd" not in (text := self.text_of(token)):
            return text.encode()
        word = self._word(token)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", word):  # SentencePiece's
            return bytes([int(word[3:5], 16)])
        known = _bytes_of_characters()
        return bytes(known[character] for character in word) if known.keys() >= set(word) else None

    def _word(self, token: int) -> str:
        return self.tokenizer.convert_ids_to_tokens(token) or ""  # not every number need be a token


@cache
def _bytes_of_characters() -> dict[str, int]:
    """Byte-level BPE writes each byte as a character of its own."""
    return {character: byte for byte, character in bytes_to_unicode().items()}


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
