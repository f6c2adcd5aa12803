"""The page at `/`, what it polls, and its buttons."""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query
from fastapi.responses import HTMLResponse

from limbeck.errors import LimbeckError
from limbeck.online.server.openai_api import ApiError

LOG = logging.getLogger(__name__)
_POINTS = 1200  # kept; then every second one goes, and they come half as often
_OF_DRAFT = ("verified", "alpha_sum", "proposals", "drafted")


class History:
    """Running totals of a service at points in time, as columns. Any stretch of them can be told from its two ends, so
    that points may be left out: it covers the whole life of a service in a bounded number of them."""

    def __init__(self) -> None:
        self.period = 1.0  # s
        self.times, self.tokens = array("d"), array("d")
        self.drafts: dict[str, dict[str, array[float]]] = {}

    def add(self, snapshot: Mapping[str, Any]) -> None:
        self.times.append(snapshot["wall_s"])
        self.tokens.append(snapshot["tokens"])
        for name, found in snapshot["drafts"].items():
            columns = self.drafts.setdefault(name, {key: array("d") for key in _OF_DRAFT})
            for key, column in columns.items():
                column.append(found[key])
        if len(self.times) > _POINTS:
            self.period *= 2
            self.times, self.tokens = self.times[::2], self.tokens[::2]
            for columns in self.drafts.values():
                columns.update({key: column[::2] for key, column in columns.items()})

    def columns(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "t": [round(t, 2) for t in self.times],
            "tokens": list(self.tokens),
            "drafts": {
                name: {key: [round(value, 4) for value in column] for key, column in columns.items()}
                for name, columns in self.drafts.items()
            },
        }


class Dashboard:
    def __init__(self, service: Any, model: str) -> None:
        self.service, self.model = service, model
        self.history = History()

    async def sample(self) -> None:
        """Adds a point to the history now and then, until it is cancelled."""
        while True:
            try:
                self.history.add(self.service.snapshot())
            except Exception:  # the page is not worth a server
                LOG.exception("dashboard: expected a point of the history, found an error")
            await asyncio.sleep(self.history.period)

    def data(self) -> dict[str, Any]:
        return {**self.service.snapshot(), "model": self.model, "history": self.history.columns()}

    def add_routes(self, app: FastAPI) -> None:
        page = files("limbeck.online.server").joinpath("page.html").read_text(encoding="utf-8")
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        headers = {
            "content-security-policy": f"{policy}; img-src data:; frame-ancestors 'none'",
            "cache-control": "no-cache",
        }

        @app.get("/", response_class=HTMLResponse)
        async def index() -> HTMLResponse:
            return HTMLResponse(page, headers=headers)

        @app.get("/dashboard.json")
        async def data() -> dict[str, Any]:
            return self.data()

        actions: dict[str, Callable[[str | None], Any]] = {
            "pause": lambda draft: self.service.pause(),
            "resume": lambda draft: self.service.resume(),
            "update": self.service.force_update,
            "rollback": self.service.roll_back,
        }
        for name, action in actions.items():
            app.post(f"/dashboard/{name}", name=f"dashboard_{name}")(_button(action))


def _button(action: Callable[[str | None], Any]) -> Callable[..., Awaitable[dict[str, str]]]:
    async def press(
        draft: Annotated[str | None, Query(max_length=256, description="which draft; all, if left out")] = None,
        mine: Annotated[
            str | None, Header(alias="X-Limbeck-Dashboard", description="any: a page of another site cannot set it")
        ] = None,
    ) -> dict[str, str]:
        if mine is None:
            raise ApiError(403, "expected the header X-Limbeck-Dashboard, which another site's page cannot set")
        try:
            await asyncio.to_thread(action, draft)
        except LimbeckError as error:
            raise ApiError(409, str(error)) from None
        return {"status": "ok"}

    return press
