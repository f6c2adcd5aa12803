"""OpenAI's requests and answers, as far as they are served; what is not served is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Number = Annotated[float, Field(allow_inf_nan=False)]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


Stops = Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=16)]

# Fields of OpenAI's that change nothing of the answer here, and others at the only value that is served.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "logit_bias": ({},),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
}


class Told(BaseModel):
    """An object of a request. A field that is null counts as left out: clients send back what they were sent."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {name: found for name, found in value.items() if found is not None}


class StreamOptions(Told):
    include_usage: bool = False


class Wanted(Told):
    """What both kinds of request have in common."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: Number = Field(1.0, ge=0, le=2)
    top_p: Number = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=128)
    stop: Annotated[Stops, BeforeValidator(_listed, json_schema_input_type=str | Stops)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Number = Field(0.0, ge=-2, le=2)
    frequency_penalty: Number = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    top_k: int = Field(0, ge=-1, le=2**31, description="limbeck: draw from the k likeliest tokens (0 or -1: all)")
    min_tokens: int = Field(0, ge=0, description="limbeck: no end of text before so many tokens")
    repetition_penalty: Number = Field(1.0, ge=0.1, le=10, description="limbeck: counts the prompt too")
    train: bool = Field(True, description="limbeck: false keeps this request out of buffer, gate and disk")
    route: str | None = Field(
        None, max_length=256, description="limbeck: the draft to use; where routing is learned, or a kind of traffic"
    )
    acceptance: bool = Field(False, description="limbeck: adds what drafting did to `usage`, a stream's too")

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {
            name: found
            for name, found in value.items()
            if name in cls.model_fields or not (name in IGNORED or _neutral(name, found))
        }

    @model_validator(mode="after")
    def _consistent(self) -> Wanted:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


def _neutral(name: str, value: object) -> bool:
    return any(type(value) is type(one) and value == one for one in NEUTRAL.get(name, ()))


class TextPart(Told):
    type: Literal["text"]
    text: str


class Message(Told):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatWanted(Wanted):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=0, description="0: the drawn tokens alone")

    @model_validator(mode="after")
    def _answerable(self) -> ChatWanted:
        if self.messages[-1].role == "assistant":
            raise ValueError("expected messages that end with the user's, found the assistant's at the end")
        return self


Tokens = Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=1)]


class TextWanted(Wanted):
    prompt: str | Tokens | Annotated[list[str], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=0, description="0: the drawn tokens alone")

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return list(self.prompt)  # pyright: ignore[reportReturnType]


# -- errors ----------------------------------------------------------------------------------------------------------


class ApiError(Exception):
    """An answer with another status than 200, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        clean = message.encode("utf-8", "replace").decode()  # a lone surrogate of a broken escape has no UTF-8
        self.body = {"error": {"message": clean, "type": kind, "param": param, "code": code}}


def refusal(errors: Iterable[Any]) -> ApiError:
    """The first of pydantic's errors as OpenAI says it."""
    first = next(iter(errors))
    place = [str(part) for part in first["loc"] if part != "body"]
    name = ".".join(place) or None
    if first["type"] == "json_invalid":
        detail = first.get("ctx", {}).get("error", first["msg"])
        return ApiError(400, f"expected JSON, found something else: {detail}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{name}: expected a field that is served, found this one: leave it out", param=name)
    return ApiError(400, f"{name or 'body'}: {first['msg']}", param=name)


# -- answers ---------------------------------------------------------------------------------------------------------


def sse(data: object) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def chat_logprobs(tokens: list[str], parts: list[bytes | None], logprobs: list[float]) -> dict[str, Any]:
    """`parts`: the bytes of each token; None: not known."""
    content = [
        {"token": token, "logprob": logprob, "bytes": None if part is None else list(part), "top_logprobs": []}
        for token, part, logprob in zip(tokens, parts, logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: list[str], logprobs: list[float], offsets: list[int]) -> dict[str, Any]:
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}
