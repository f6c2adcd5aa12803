"""Who may ask, how much and how often: checked before a request's body is parsed."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from limbeck.errors import RecipeError
from limbeck.online.server.openai_api import ApiError

OPEN = ("/", "/health")  # the page holds no data: it asks for them with the key
_CLIENTS = 10_000  # whose rates are remembered


@dataclass(frozen=True)
class Limits:
    """What the server takes. `body_bytes` of one request; `choices` of one request (n times its prompts); `in_flight`:
    completions that are written or wait, of all clients; `per_minute`: requests of one key, or of one address where
    there are no keys (None: no limit); `max_tokens` of one completion (None: the context's)."""

    body_bytes: int = 1 << 20
    choices: int = 32
    in_flight: int = 256
    per_minute: float | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value <= 0:
                raise RecipeError(f"{name}: expected a limit above 0, found {value}: raise it")


class Keys:
    """API keys. Their digests alone are kept, and compared in a time that does not depend on where they differ."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.digests = [_digest(key) for key in keys]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """A key a line; empty lines and those that begin with # do not count. RecipeError without a file or key."""
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"--api-key-file {path}: expected a text file with a key a line, found {error}") from None
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys or any(len(key) < 8 or not key.isascii() or " " in key for key in keys):
            raise RecipeError(
                f"--api-key-file {path}: expected a key a line, each of 8 ASCII characters or more without spaces, "
                "found none or another: write one, for instance by `openssl rand -hex 24`"
            )
        return cls(keys)

    def find(self, key: str) -> str | None:
        """A name for a key that is one of them."""
        digest = _digest(key)
        matches = [hmac.compare_digest(digest, known) for known in self.digests]  # all of them, always
        return digest.hex() if any(matches) else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


class Rates:
    """A bucket a client: `per_minute` requests at once, refilled steadily."""

    def __init__(self, per_minute: float) -> None:
        self.size, self.per_second = max(per_minute, 1.0), per_minute / 60
        self.left: dict[str, tuple[float, float]] = {}  # client: (requests left, when)

    def wait(self, client: str, now: float) -> float:
        """Seconds until this client may ask again; 0: it may now, and has."""
        left, then = self.left.pop(client, (self.size, now))
        left = min(self.size, left + (now - then) * self.per_second)
        allowed = left >= 1
        self.left[client] = (left - allowed, now)  # the newest is last
        if len(self.left) > _CLIENTS:
            del self.left[next(iter(self.left))]
        return 0.0 if allowed else (1 - left) / self.per_second


def _host(origin: str) -> str:
    """Of `scheme://host:port`; of a page without an origin, which says `null`, nothing."""
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def too_many(message: str, seconds: float) -> ApiError:
    wait = {"retry-after": str(max(1, math.ceil(seconds)))}
    return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers=wait)


class Gate:
    """ASGI: refuses what has no key, comes too often, is too large, names another host, or may be the work of another
    site's page: a browser sends its POST here without asking, unless it says that it is JSON."""

    def __init__(self, app: ASGIApp, limits: Limits, keys: Keys | None) -> None:
        self.app, self.limits, self.keys = app, limits, keys
        self.rates = Rates(limits.per_minute) if limits.per_minute is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._admit(scope)
            receive = await self._whole_body(scope, receive)
        except ApiError as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        client = (scope.get("client") or ("",))[0]
        if self.keys is None:
            # Without keys only this machine is served. A page of another site whose name was bound to this address
            # comes from here too, but under its own name.
            host = headers.get("host", "")
            name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
            if not loopback(name.strip("[]")):
                raise ApiError(403, f"expected this machine's own name as host, found {name!r}", code="wrong_host")
            origin = headers.get("origin")
            if origin is not None and not loopback(_host(origin)):
                message = f"expected a page of this machine's own, found one of {origin!r}"
                raise ApiError(403, message, code="wrong_origin")
        elif path not in OPEN:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            found = self.keys.find(key.strip()) if scheme.lower() == "bearer" else None
            if found is None:
                raise ApiError(
                    401,
                    "expected the header `Authorization: Bearer KEY` with one of the server's keys",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
            client = found
        if not (path.startswith("/v1/") and scope["method"] == "POST"):
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            message = f"expected the header `Content-Type: application/json`, found {kind or 'none'!r}"
            raise ApiError(415, message, code="unsupported_media_type")
        if self.rates is not None:
            wait = self.rates.wait(client, time.monotonic())
            if wait:
                raise too_many(f"expected at most {self.limits.per_minute:g} requests a minute, found more", wait)

    async def _whole_body(self, scope: Scope, receive: Receive) -> Receive:
        """Reads the body, and gives a `receive` that hands it on."""
        most = self.limits.body_bytes
        refused = ApiError(413, f"expected a body of at most {most} bytes, found more", code="request_too_large")
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise refused
        body = bytearray()
        try:
            async with asyncio.timeout(30):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise refused
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise ApiError(408, "expected the whole body within 30 s, found less", code="timeout") from None
        first: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]
        if message["type"] == "http.disconnect":
            first = [message]

        async def again() -> Message:
            return first.pop() if first else await receive()

        return again
