"""One client's call: its requests in the service, their events as they come, the answer whole or in pieces."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from limbeck.decoding.requests import Counters, Event, FinishReason, Request
from limbeck.errors import LimbeckError
from limbeck.online.server.openai_api import ApiError, chat_logprobs, sse, text_logprobs
from limbeck.online.server.text import Detokenizer
from limbeck.online.service import ServiceEnded

_PATIENCE = 60.0  # s that a client may leave what it was sent unread


class Backend(Protocol):
    """What the server wants of a `Service`."""

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Any: ...

    def cancel(self, id: str) -> Any: ...


@dataclass(frozen=True)
class Piece:
    text: str
    tokens: list[int]
    logprobs: list[float]
    offsets: list[int]
    last: bool


@dataclass(eq=False)
class Choice:
    """One completion: what has come of it, of which `sent` tokens were made text."""

    index: int
    request: Request
    writer: Detokenizer
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    sent: int = 0
    finish_reason: FinishReason | None = None
    counters: Counters | None = None

    def receive(self, event: Event) -> None:
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        if event.finish_reason is not None:
            self.finish_reason, self.counters = event.finish_reason, event.counters

    def piece(self, size: int | None = None) -> Piece | None:
        """The next `size` tokens as text, None while they are not all there. At the end, and without a size: the
        rest."""
        start, left = self.sent, len(self.tokens) - self.sent
        last = self.finish_reason is not None and (size is None or left <= size)
        if size is not None and left < size and not last:
            return None
        self.sent = start + (left if size is None or last else size)
        new, logprobs = self.tokens[start : self.sent], self.logprobs[start : self.sent]
        if not last:
            text, offsets = self.writer.feed(new)
            return Piece(text, new, logprobs, offsets, False)
        silent = self.finish_reason == "stop" and bool(new) and new[-1] in self.request.sampling.stop_tokens
        text, offsets = self.writer.finish(
            new[:-1] if silent else new, stopped=self.finish_reason == "stop" and not silent
        )
        return Piece(text, new, logprobs, [*offsets, self.writer.length] if silent else offsets, True)


class Call:
    """The requests of one call. `submit` and `close` belong together; closed before the end, it cancels what is left.

    on_token(count), on_close(call): for whoever counts.
    """

    def __init__(
        self,
        backend: Backend,
        choices: Sequence[Choice],
        *,
        on_tokens: Callable[[int], None] = lambda count: None,
        on_close: Callable[[Call], None] = lambda call: None,
    ) -> None:
        self.backend = backend
        self.choices = list(choices)
        self.on_tokens, self.on_close = on_tokens, on_close
        self.open = {choice.request.id: choice for choice in choices}
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.started = time.perf_counter()
        self.first_token_s: float | None = None
        self.closed = False

    def submit(self) -> None:
        """ApiError for a request that the engine refuses, and where it has ended."""
        try:
            for choice in self.choices:
                self.backend.submit(choice.request, self._deliver)
        except ServiceEnded as error:
            self.close()
            raise ApiError(503, str(error), kind="server_error", code="engine_ended") from None
        except LimbeckError as error:
            self.close()
            raise ApiError(400, str(error)) from None
        except BaseException:
            self.close()
            raise

    def _deliver(self, event: Event) -> None:
        """Called from the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the server has stopped: nobody waits for it
            pass

    async def changed(self) -> AsyncIterator[Choice]:
        """The choice that an event has changed, until all have ended or the client is gone. ApiError where one cannot
        be finished."""
        while self.open and not self.closed:
            event = await self.events.get()
            if event is None or event.id not in self.open:
                continue
            choice = self.open[event.id]
            choice.receive(event)
            if event.tokens:
                if self.first_token_s is None:
                    self.first_token_s = time.perf_counter() - self.started
                self.on_tokens(len(event.tokens))
            if event.finish_reason is not None:
                del self.open[event.id]
            if event.finish_reason == "error":
                raise ApiError(500, event.error or "the model could not go on", kind="server_error")
            if event.finish_reason == "cancelled":
                raise ApiError(503, "the server ended this request: try again", kind="server_error")
            yield choice

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for id in self.open:
            self.backend.cancel(id)
        self.events.put_nowait(None)
        self.on_close(self)


async def close_with_client(call: Call, receive: Receive) -> None:
    """Closes the call when its client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    call.close()


@dataclass(frozen=True)
class Form:
    """How an answer is written."""

    kind: Literal["chat", "text"]
    id: str
    model: str
    created: int
    logprobs: bool = False
    acceptance: bool = False
    usage: bool = True  # at the end of a stream
    stream_tokens: int = 1

    def whole(self, call: Call, prompt_tokens: int) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for choice in call.choices:
            piece = choice.piece()
            assert piece is not None
            body: dict[str, Any] = {"index": choice.index}
            if self.kind == "chat":
                body["message"] = {"role": "assistant", "content": piece.text, "refusal": None}
            else:
                body["text"] = piece.text
            choices.append(body | {"logprobs": self._logprobs(choice, piece), "finish_reason": choice.finish_reason})
        head = self._head("chat.completion" if self.kind == "chat" else "text_completion")
        return head | {"choices": choices, "usage": self.count(call, prompt_tokens)}

    async def stream(self, call: Call, prompt_tokens: int) -> AsyncIterator[bytes]:
        """Server-sent events. Every one but the last of a choice stands for `stream_tokens` tokens, whatever the blocks
        in which drafts were accepted; those that add no text are left out."""
        head = self._head("chat.completion.chunk" if self.kind == "chat" else "text_completion")
        nothing: dict[str, Any] = {"usage": None} if self.usage else {}
        if self.kind == "chat":
            for choice in call.choices:
                opening = {"role": "assistant", "content": "", "refusal": None}
                body = {"index": choice.index, "delta": opening, "logprobs": None, "finish_reason": None}
                yield sse(head | {"choices": [body]} | nothing)
        try:
            async for choice in call.changed():
                while (piece := choice.piece(self.stream_tokens)) is not None:
                    if piece.text or piece.last or self.logprobs:
                        yield sse(head | {"choices": [self._chunk(choice, piece)]} | nothing)
                    if piece.last:
                        break
        except ApiError as error:
            yield sse(error.body)
        else:
            if self.usage and not call.open:
                yield sse(head | {"choices": [], "usage": self.count(call, prompt_tokens)})
        yield sse("[DONE]")

    def count(self, call: Call, prompt_tokens: int) -> dict[str, Any]:
        """`usage`: all tokens that were written, the one that ended the text too."""
        written = sum(len(choice.tokens) for choice in call.choices)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": written,
            "total_tokens": prompt_tokens + written,
        }
        if self.acceptance:
            usage["limbeck"] = accepted(choice.counters for choice in call.choices)
        return usage

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        body: dict[str, Any] = {"index": choice.index}
        if self.kind == "chat":
            body["delta"] = {"content": piece.text} if piece.text else {}
        else:
            body["text"] = piece.text
        reason = choice.finish_reason if piece.last else None
        return body | {"logprobs": self._logprobs(choice, piece), "finish_reason": reason}

    def _logprobs(self, choice: Choice, piece: Piece) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        tokens = [choice.writer.text_of(token) for token in piece.tokens]
        if self.kind == "chat":
            return chat_logprobs(tokens, [choice.writer.bytes_of(token) for token in piece.tokens], piece.logprobs)
        return text_logprobs(tokens, piece.logprobs, piece.offsets)


def accepted(counted: Any) -> dict[str, Any]:
    """What drafting did for one call."""
    found: list[Counters] = [counters for counters in counted if counters is not None]
    drafted, kept, verified, rounds = (
        sum(getattr(counters, name) for counters in found) for name in ("drafted", "accepted", "verified", "rounds")
    )
    alpha = sum(counters.alpha_sum for counters in found)
    return {
        "drafted": drafted,
        "accepted": kept,
        "verified": verified,
        "rounds": rounds,
        "alpha": alpha / verified if verified else None,
        "draft_efficiency": kept / drafted if drafted else None,
    }


class EventStream(Response):
    """Server-sent events of a call; it ends with its client, also one that leaves before the first byte, or that stays
    without reading."""

    media_type = "text/event-stream"

    def __init__(self, call: Call, lines: AsyncIterator[bytes], headers: Mapping[str, str]) -> None:
        self.call, self.lines = call, lines
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-cache", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def put(message: Message) -> None:
            async with asyncio.timeout(_PATIENCE):
                await send(message)

        watcher = asyncio.create_task(close_with_client(self.call, receive))
        try:
            await put({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for line in self.lines:
                await put({"type": "http.response.body", "body": line, "more_body": True})
            await put({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # TimeoutError is one
            pass  # the client is gone, or as good as gone
        finally:
            watcher.cancel()
            self.call.close()
