"""The page at `/`, what it polls, and its buttons."""

from __future__ import annotations

import asyncio
import logging
import threading
from array import array
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query
from fastapi.responses import HTMLResponse

from limbeck.errors import LimbeckError
from limbeck.online.server.openai_api import ApiError

LOG = logging.getLogger(__name__)
_POINTS = 1200  # kept of a whole life; then every second one goes, and they come half as often
_RECENT = 90  # the newest, each a second after the one before
_OF_DRAFT = ("verified", "alpha_sum", "proposals", "drafted")


class Columns:
    """Running totals of a service at points in time. Any stretch of them can be told from its two ends, so that points
    may be left out."""

    def __init__(self) -> None:
        self.times, self.tokens = array("d"), array("d")
        self.drafts: dict[str, dict[str, array[float]]] = {}

    def add(self, snapshot: Mapping[str, Any]) -> None:
        self.times.append(snapshot["wall_s"])
        self.tokens.append(snapshot["tokens"])
        for name, found in snapshot["drafts"].items():
            columns = self.drafts.setdefault(name, {key: array("d") for key in _OF_DRAFT})
            for key, column in columns.items():
                column.append(found[key])

    def keep(self, points: slice) -> None:
        self.times, self.tokens = self.times[points], self.tokens[points]
        for columns in self.drafts.values():
            columns.update({key: column[points] for key, column in columns.items()})

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "t": [round(t, 2) for t in self.times],
            "tokens": list(self.tokens),
            "drafts": {
                name: {key: [round(value, 4) for value in column] for key, column in columns.items()}
                for name, columns in self.drafts.items()
            },
        }


class History:
    """The whole life of a service in a bounded number of points, and its last minute and a half in all of them. A point
    is added every second; from any thread."""

    def __init__(self) -> None:
        self.period = 1  # one in so many points is kept for good
        self.count = 0
        self.whole, self.recent = Columns(), Columns()
        self.lock = threading.Lock()

    def add(self, snapshot: Mapping[str, Any]) -> None:
        with self.lock:
            self.recent.add(snapshot)
            if len(self.recent.times) > _RECENT:
                self.recent.keep(slice(1, None))
            if self.count % self.period == 0:
                self.whole.add(snapshot)
                if len(self.whole.times) > _POINTS:
                    self.period *= 2
                    self.whole.keep(slice(None, None, 2))
            self.count += 1

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        with self.lock:
            return {"history": self.whole.plain(), "recent": self.recent.plain()}


class Dashboard:
    def __init__(self, service: Any, model: str) -> None:
        self.service, self.model = service, model
        self.history = History()

    async def sample(self) -> None:
        """Adds a point to the history every second, until it is cancelled."""
        while True:
            try:
                self.history.add(await asyncio.to_thread(self.service.snapshot))  # it may wait for a lock
            except Exception:  # the page is not worth a server
                LOG.exception("dashboard: expected a point of the history, found an error")
            await asyncio.sleep(1)

    def data(self) -> dict[str, Any]:
        return {**self.service.snapshot(), "model": self.model, **self.history.plain()}

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
        def data() -> dict[str, Any]:  # in a thread, as the snapshot may wait for a lock
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
