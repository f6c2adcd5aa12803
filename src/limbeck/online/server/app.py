"""The HTTP application: OpenAI's routes, health, metrics, the dashboard."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from limbeck.decoding import Sampling
from limbeck.decoding import requests as decoding
from limbeck.errors import LimbeckError
from limbeck.online.server.dashboard import Dashboard
from limbeck.online.server.limits import Gate, Keys, Limits, too_many
from limbeck.online.server.metrics import Metrics
from limbeck.online.server.openai_api import ApiError, ChatWanted, TextWanted, Wanted, refusal
from limbeck.online.server.stream import Call, Choice, EventStream, Form, close_with_client
from limbeck.online.server.text import Detokenizer, Encoder

GREEDY_BELOW = 1e-4  # a smaller temperature would overflow: it is the same as 0
DEFAULT_TOKENS = 16  # of /v1/completions, as OpenAI has it
CLIENT_LEFT = 499  # nobody reads it

W = TypeVar("W", bound=Wanted)


@dataclass(frozen=True)
class Served:
    """What is served, and how. `context`: tokens of prompt and completion together (None: no limit). `stop_tokens`: any
    of them ends a completion. `stream_tokens`: tokens in a piece of a stream."""

    service: Any
    tokenizer: Any
    name: str
    context: int | None
    stop_tokens: tuple[int, ...]
    limits: Limits = Limits()
    keys: Keys | None = None
    stream_tokens: int = 1


TRAIN = Header(None, alias="X-Limbeck-Train", description="`false` keeps this request out of buffer, gate and disk")
ROUTE = Header(None, alias="X-Limbeck-Route", max_length=256, description="the draft to use")
ACCEPTANCE = Header(None, alias="X-Limbeck-Acceptance", description="`true` adds what drafting did to `usage`")


def create_app(served: Served) -> FastAPI:
    """The application around a service, which is started and stopped elsewhere."""
    metrics = Metrics(served.name, served.service.snapshot)
    dashboard = Dashboard(served.service, served.name)
    desk = Desk(served, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sampler = asyncio.create_task(dashboard.sample())
        yield
        sampler.cancel()

    app = FastAPI(title="limbeck", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, limits=served.limits, keys=served.keys)  # pyright: ignore[reportArgumentType]
    _answer_errors(app)

    @app.post("/v1/chat/completions")
    async def chat_completions(
        wanted: ChatWanted,
        request: Request,
        train: str | None = TRAIN,
        route: str | None = ROUTE,
        acceptance: str | None = ACCEPTANCE,
    ) -> Response:
        wanted = _with_headers(wanted, train, route, acceptance)
        return await desk.answer(wanted, request)

    @app.post("/v1/completions")
    async def completions(
        wanted: TextWanted,
        request: Request,
        train: str | None = TRAIN,
        route: str | None = ROUTE,
        acceptance: str | None = ACCEPTANCE,
    ) -> Response:
        wanted = _with_headers(wanted, train, route, acceptance)
        return await desk.answer(wanted, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [desk.card()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        desk.check_model(model)
        return desk.card()

    @app.get("/health")
    async def health() -> dict[str, str]:
        desk.check_service()
        return {"status": "ok"}

    @app.get("/metrics")
    def scrape() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    dashboard.add_routes(app)
    app.state.dashboard = dashboard
    return app


class Desk:
    """Takes requests in and hands answers out."""

    def __init__(self, served: Served, metrics: Metrics) -> None:
        self.served, self.metrics = served, metrics
        self.encoder = Encoder(served.tokenizer)
        self.created = int(time.time())
        self.in_flight = 0

    def card(self) -> dict[str, Any]:
        card = {"id": self.served.name, "object": "model", "created": self.created, "owned_by": "limbeck"}
        return card | {"max_model_len": self.served.context}

    def check_service(self) -> None:
        """ApiError where the engine has ended."""
        if (failure := self.served.service.failure) is not None:
            raise ApiError(503, f"the engine has ended: {failure}", kind="server_error", code="engine_ended")

    def check_model(self, name: str) -> None:
        if name != self.served.name:
            message = f"expected the model {self.served.name!r}, found {name!r}: see /v1/models"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def answer(self, wanted: ChatWanted | TextWanted, request: Request) -> Response:
        served = self.served
        self.check_service()
        self.check_model(wanted.model)
        prompts = await asyncio.to_thread(self._prompts, wanted)
        id = ("chatcmpl-" if isinstance(wanted, ChatWanted) else "cmpl-") + secrets.token_hex(12)
        choices = self._choices(wanted, prompts, id)
        form = Form(
            "chat" if isinstance(wanted, ChatWanted) else "text",
            id,
            served.name,
            int(time.time()),
            logprobs=wanted.logprobs is not None and wanted.logprobs is not False,
            acceptance=wanted.acceptance,
            usage=wanted.acceptance or (wanted.stream_options is not None and wanted.stream_options.include_usage),
            stream_tokens=served.stream_tokens,
        )
        call = Call(served.service, choices, on_tokens=self.metrics.count_tokens, on_close=self._closed)
        self._take_in(len(choices))
        call.submit()
        read = sum(map(len, prompts))
        if wanted.stream:
            return EventStream(call, form.stream(call, read), {"x-request-id": id})
        watcher = asyncio.create_task(close_with_client(call, request.receive))
        try:
            async for _ in call.changed():
                pass
        finally:
            watcher.cancel()
            call.close()
        if call.open:
            return Response(status_code=CLIENT_LEFT)
        body = await asyncio.to_thread(form.whole, call, read)  # token by token: others write on meanwhile
        return JSONResponse(body, headers={"x-request-id": id})

    def _take_in(self, count: int) -> None:
        most = self.served.limits.in_flight
        if self.in_flight + count > most:
            raise too_many(
                f"expected at most {most} completions at a time, found {self.in_flight} that are written or wait",
                self.metrics.latency(),
            )
        self.in_flight += count

    def _closed(self, call: Call) -> None:
        self.in_flight -= len(call.choices)
        self.metrics.count_call(call)

    def _prompts(self, wanted: ChatWanted | TextWanted) -> list[list[int]]:
        if isinstance(wanted, ChatWanted):
            return [self.encoder.chat([message.plain() for message in wanted.messages])]
        prompts = wanted.prompts()
        self._check_count(wanted.n * len(prompts))
        return [self.encoder.text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    def _check_count(self, count: int) -> None:
        most = self.served.limits.choices
        if count > most:
            raise ApiError(400, f"expected at most {most} completions in one request, found {count}", param="n")

    def _choices(self, wanted: ChatWanted | TextWanted, prompts: list[list[int]], id: str) -> list[Choice]:
        self._check_count(wanted.n * len(prompts))
        seed = secrets.randbits(63) if wanted.seed is None else wanted.seed
        choices: list[Choice] = []
        for place, prompt in enumerate(prompts):
            sampling = self._sampling(wanted, len(prompt), seed)
            for sample in range(wanted.n):
                index = len(choices)
                request = decoding.Request(
                    f"{id}-{index}", tuple(prompt), sampling, (place,), sample, wanted.route, wanted.train
                )
                choices.append(Choice(index, request, Detokenizer(self.served.tokenizer, prompt, wanted.stop)))
        return choices

    def _sampling(self, wanted: ChatWanted | TextWanted, prompt: int, seed: int) -> Sampling:
        try:
            return Sampling(
                self._most_tokens(wanted, prompt),
                temperature=0.0 if wanted.temperature < GREEDY_BELOW else wanted.temperature,
                top_p=wanted.top_p,
                top_k=max(wanted.top_k, 0),
                seed=seed,
                stop_tokens=self.served.stop_tokens,
                stop_strings=tuple(wanted.stop),
                min_tokens=wanted.min_tokens,
                repetition_penalty=wanted.repetition_penalty,
                presence_penalty=wanted.presence_penalty,
                frequency_penalty=wanted.frequency_penalty,
            )
        except LimbeckError as error:
            raise ApiError(400, str(error)) from None

    def _most_tokens(self, wanted: ChatWanted | TextWanted, prompt: int) -> int:
        """max_tokens of a completion after so many tokens of prompt."""
        context, most = self.served.context, self.served.limits.max_tokens
        asked, default = wanted.max_tokens, DEFAULT_TOKENS
        if isinstance(wanted, ChatWanted):
            asked = wanted.max_completion_tokens or wanted.max_tokens
            default = most or (2048 if context is None else context)
        room = None if context is None else context - prompt
        if room is not None and (room < 1 or (asked or 0) > room):
            more = f" and {asked} for the completion" if asked else ""
            raise ApiError(
                400,
                f"This model's maximum context length is {context} tokens, found {prompt} in the prompt{more}: shorten "
                "the prompt or lower max_tokens",
                param="messages" if isinstance(wanted, ChatWanted) else "prompt",
                code="context_length_exceeded",
            )
        if asked is not None and most is not None and asked > most:
            raise ApiError(400, f"expected max_tokens of at most {most}, found {asked}", param="max_tokens")
        return min(value for value in (asked or default, most, room) if value is not None)


def _with_headers(wanted: W, train: str | None, route: str | None, acceptance: str | None) -> W:
    """Headers say more than the body, and never less: either can exclude a request from training."""
    changes: dict[str, Any] = {}
    for name, text in (("train", train), ("acceptance", acceptance)):
        if text is not None:
            if text.lower() not in ("true", "false"):
                raise ApiError(400, f"X-Limbeck-{name.title()}: expected true or false, found {text!r}", param=name)
            changes[name] = text.lower() == "true"
    if "train" in changes:
        changes["train"] = changes["train"] and wanted.train
    if route is not None:
        changes["route"] = route
    return wanted.model_copy(update=changes)


def _answer_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return await known(request, refusal(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return await known(request, ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        return await known(request, ApiError(500, "the server failed: see its log", kind="server_error"))
