"""The page's data, its buttons, and the page in a real browser."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from online_server_browser import Tab, browser
from online_server_helpers import Recorded, Start, client_of, listening, served_by, wait_for

from limbeck.errors import RolloutError
from limbeck.online.server import Keys
from limbeck.online.server.dashboard import History

NAMES = ("layers-4", "gsm8k")
LEARNT = ("updates", "swaps", "undecided", "refusals", "rollbacks", "failures", "restarts", "buffer_positions")
LEARNT += ("buffer_bytes", "buffer_age_s", "buffer_held", "buffer_error")
NOT_YET = dict.fromkeys(("last_gain", "known_mass", "last_error"))


def draft_of(**changes: Any) -> dict[str, Any]:
    zeros = ("gamma", "proposals", "drafted", "accepted", "verified", "alpha_sum", "version", "benched")
    zeros = dict.fromkeys((*zeros, *LEARNT), 0)
    return {"kind": "layers", **zeros, **NOT_YET, "cold": True, "broken": False, "kept": [], "lengths": [], **changes}


def untaught() -> dict[str, Any]:
    """A draft that does not learn, and has not been used."""
    learnt = {*LEARNT, *NOT_YET, "cold", "broken"}
    return {name: value for name, value in draft_of(kind="ngram").items() if name not in learnt}


class Scripted:
    """What a service would say, without one: a day of traffic in no time. It remembers which buttons were pressed."""

    failure = None

    def __init__(self) -> None:
        self.learning = "on"
        self.pressed: list[tuple[str, str | None]] = []
        self.state: dict[str, Any] = {
            "running": 0,
            "waiting": 0,
            "requests": 0,
            "tokens": 0,
            "wall_s": 20.0,
            "drafts": {name: draft_of() for name in NAMES} | {"ngram": untaught()},
            "ledger": dict.fromkeys(("prefill", "draft", "verify", "overhead", "idle", "training"), 0.0),
            "per_token": {},
            "speedup": None,
            "plain_tokens_per_s": None,
            "marks": [],
        }

    def snapshot(self) -> dict[str, Any]:
        return {**self.state, "learning": self.learning}

    def pause(self) -> None:
        self.learning = "paused"

    def resume(self) -> None:
        self.learning = "on"

    def force_update(self, draft: str | None = None) -> None:
        self.pressed.append(("update", draft))

    def roll_back(self, draft: str | None = None) -> None:
        raise RolloutError("roll_back: expected a version before the one that serves, found none: nothing to do")

    def live(self, history: History, seconds: int = 600) -> None:
        """Two drafts that get better, with a pause of the traffic, and marks of every kind."""
        draw = random.Random(1)
        drafts = {name: draft_of(lengths=[0] * 6, kept=[0] * 5) for name in NAMES}
        marks: list[dict[str, Any]] = []
        tokens = 0
        for second in range(seconds):
            for place, (name, start) in enumerate(zip(NAMES, (0.25, 0.55), strict=True)):
                if 250 < second < 290:
                    break
                draft = drafts[name]
                alpha = min(0.86, start + 0.4 * (1 - math.exp(-draft["swaps"] / 5))) + draw.gauss(0, 0.04)
                for _ in range(20):
                    kept = next((k for k in range(5) if draw.random() > alpha), 5)
                    tokens += kept + 1
                    counted = {"proposals": 1, "drafted": 5, "accepted": kept, "verified": min(kept + 1, 5)}
                    for key, value in counted.items():
                        draft[key] += value
                    draft["alpha_sum"] += alpha * counted["verified"]
                    draft["lengths"][kept] += 1
                kinds = {5: ("updates", "update"), 6: ("swaps", "swap"), 20: ("refusals", "refusal")}
                if (second + 11 * place) % 31 in kinds:
                    key, kind = kinds[(second + 11 * place) % 31]
                    draft[key] += 1
                    draft["version"] = draft["swaps"]
                    marks.append({"t": second, "kind": kind, "draft": name, "version": draft["version"]})
                draft |= {"gamma": 5.0, "buffer_positions": second * 37 % 2048, "buffer_bytes": second << 10}
            self.state |= {"wall_s": float(second), "tokens": tokens, "drafts": drafts | {"ngram": untaught()}}
            history.add(self.state)
        drafts["gsm8k"] |= {"failures": 2, "last_error": "UpdaterLost: <gone>", "broken": True, "last_gain": 0.0123}
        marks.append({"t": 400, "kind": "rollback", "draft": "gsm8k", "version": 7})
        spent = {"prefill": 11.0, "draft": 88.0, "verify": 220.0, "overhead": 13.0, "idle": 260.0, "training": 41.0}
        self.state |= {"marks": marks, "ledger": spent, "speedup": 1.84, "plain_tokens_per_s": 61.0}
        self.state |= {"running": 7, "waiting": 3, "requests": 812}


@contextmanager
def page_of(stories: tuple[Any, Any], service: Any, **changes: Any) -> Iterator[tuple[str, History]]:
    """(address, history) of a server around what is scripted."""
    from limbeck.online.server import create_app

    app = create_app(served_by(stories, service, **changes))
    with listening(app) as address:
        yield address, app.state.dashboard.history


def test_history_covers_a_whole_life_in_few_points() -> None:
    """Totals at the ends of any stretch are exact, whatever was left out between them."""
    history, service = History(), Scripted()
    for second in range(10_000):
        service.state |= {"wall_s": float(second), "tokens": second**2}
        service.state["drafts"]["gsm8k"]["verified"] = 3 * second
        history.add(service.state)
    columns, recent = history.plain()["history"], history.plain()["recent"]
    assert recent["t"] == list(range(9910, 10_000)) and recent["tokens"][-1] == 9999**2  # the last ones, each
    assert recent["drafts"]["gsm8k"]["verified"] == [3 * t for t in recent["t"]]
    assert 600 <= len(columns["t"]) <= 1201 and history.period == 16
    assert columns["t"][0] == 0 and columns["t"][-1] > 9990 - 16
    assert columns["tokens"] == [t**2 for t in columns["t"]]
    assert columns["drafts"]["gsm8k"]["verified"] == [3 * t for t in columns["t"]]
    assert {len(column) for column in columns["drafts"]["layers-4"].values()} == {len(columns["t"])}


def test_dashboard_tells_what_the_service_did(start: Start, service: Recorded) -> None:
    with start(service=service) as address:
        client_of(address).completions.create(model="stories260k", prompt="Once", max_tokens=30, temperature=0)
        found = httpx.get(f"{address}/dashboard.json").json()
    draft = found["drafts"]["cut"]
    assert found["tokens"] == 30 and found["model"] == "stories260k" and found["learning"] == "off"
    assert sum(draft["lengths"]) == draft["proposals"] > 0
    assert sum(place * count for place, count in enumerate(draft["lengths"])) == draft["accepted"]
    assert found["history"]["drafts"]["cut"].keys() == {"verified", "alpha_sum", "proposals", "drafted"}


def test_dashboard_keeps_nobody_waiting(stories: tuple[Any, Any]) -> None:
    """A snapshot waits for the buffer's lock: who asks for a text does not."""
    service, asked, go_on = Scripted(), threading.Semaphore(0), threading.Event()
    real = service.snapshot

    def slow() -> dict[str, Any]:
        asked.release()
        assert go_on.wait(60)
        return real()

    with page_of(stories, service) as (address, history), ThreadPoolExecutor(1) as pool:
        service.snapshot = slow
        try:
            found = pool.submit(httpx.get, f"{address}/dashboard.json", timeout=30)
            assert asked.acquire(timeout=10) and asked.acquire(timeout=10)  # by the page, and for the history
            assert httpx.get(f"{address}/health", timeout=10).status_code == 200
        finally:
            go_on.set()
        assert found.result().json()["model"] == "stories260k"
        wait_for(lambda: history.count)


def test_dashboard_buttons_reach_the_service(stories: tuple[Any, Any]) -> None:
    service = Scripted()
    with page_of(stories, service) as (address, _):
        headers = {"X-Limbeck-Dashboard": "1"}
        press: Any = lambda path: httpx.post(f"{address}/dashboard/{path}", headers=headers)  # noqa: E731
        assert press("pause").status_code == 200 and service.learning == "paused"
        assert press("resume").status_code == 200 and service.learning == "on"
        assert press("update?draft=gsm8k").status_code == 200 and press("update").status_code == 200
        assert service.pressed == [("update", "gsm8k"), ("update", None)]
        refused = press("rollback")
        assert refused.status_code == 409 and "expected a version before" in refused.json()["error"]["message"]
        # A form of another site's page can be sent here, but not with this header.
        assert httpx.post(f"{address}/dashboard/pause").status_code == 403 and service.learning == "on"
        assert httpx.get(f"{address}/dashboard/pause").status_code == 405
        assert "content-security-policy" in httpx.get(address).headers


PROBE = """(() => {
  const sizes = (selector) => [...document.querySelectorAll(selector)].map((element) => {
    const box = element.getBoundingClientRect(); return [box.width, box.height]; });
  const inside = (element) => !element.closest(".scroll") && element.getBoundingClientRect().right > innerWidth + 1;
  return {
    width: innerWidth, scroll: document.documentElement.scrollWidth,
    background: getComputedStyle(document.body).backgroundColor,
    tiles: [...document.querySelectorAll(".tiles b")].map((element) => element.textContent),
    lines: sizes(".plot path.line"), plots: sizes(".plot > svg"), bars: sizes(".bar"),
    marks: [...document.querySelectorAll("#alpha .mark")].map((element) => element.dataset.kind),
    empty: document.querySelectorAll(".empty").length,
    rows: document.querySelectorAll("#drafts tbody tr").length,
    drafts: document.querySelector("#drafts").innerText,
    nonsense: document.body.innerText.match(/undefined|NaN|null|Infinity|\\[object/g),
    outside: [...document.querySelectorAll("main *")].filter(inside).map((element) => element.outerHTML.slice(0, 90)),
    small: [...document.querySelectorAll("text, td, th, p, span, small")].filter(
      (element) => element.textContent.trim() && parseFloat(getComputedStyle(element).fontSize) < 11).length,
    state: document.querySelector("#state").innerText.trim(), said: document.querySelector("#say").innerText,
    failure: document.querySelector("#failure").innerText, light: document.querySelector("#state").className,
  };
})()"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


POINT = """(() => {
  const plot = document.querySelector("#alpha"), box = plot.getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2 }));
})()"""
NOWHERE = "about:blank"  # before the server ends: a page that goes on asking has a problem
READY = "document.querySelectorAll('.tiles li').length === 6"


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (420, True)])
def test_dashboard_in_a_browser(stories: tuple[Any, Any], tab: Tab, width: int, dark: bool) -> None:
    service = Scripted()
    with page_of(stories, service) as (address, history):
        tab.show(width, 1200, dark=dark)
        tab.open(address)
        tab.until(READY)
        empty = tab.ask(PROBE)
        service.live(history)
        tab.open(address)
        tab.until(f"{READY} && document.querySelectorAll('#alpha svg').length")
        busy = tab.ask(PROBE)
        service.state["failure"] = "RuntimeError: <no memory left>"
        tab.until("document.querySelector('#state').innerText.trim() === 'engine ended'")
        failed = tab.ask(PROBE)
        tab.ask(POINT)
        tip = tab.ask("document.querySelector('#alpha .tip').innerText")
        tab.open(NOWHERE)
    for found in (empty, busy, failed):
        assert found["width"] == width and found["scroll"] <= width and found["outside"] == [] and found["small"] == 0
        assert found["nonsense"] is None
        lightness = sum(map(int, found["background"][4:-1].split(",")))
        assert lightness < 120 if dark else lightness > 700
    assert empty["empty"] == 5 and empty["lines"] == [] and empty["tiles"][:3] == ["–", "0", "–"]
    assert busy["empty"] == 0 and busy["rows"] == 3 and busy["state"] == "learning"
    assert busy["failure"] == "" and failed["failure"].endswith("RuntimeError: <no memory left>")
    assert failed["light"] == "state lost" and busy["light"] == "state on"
    assert "gsm8k, last failure: UpdaterLost: <gone>" in busy["drafts"] and "learns no more" in busy["drafts"]
    assert "0.012" in busy["drafts"] and "last failure" not in empty["drafts"]
    assert busy["tiles"][2:5] == ["1.84×", "7 + 3", "812"]
    assert len(busy["lines"]) == 5 and all(line[0] > 200 for line in busy["lines"])
    assert all(line[1] > 5 for line in busy["lines"][:3])  # acceptance and speed go up
    assert set(busy["marks"]) == {"update", "swap", "refusal", "rollback"} and busy["marks"].count("rollback") == 1
    assert len(busy["bars"]) == 6 and all(bar[0] > 1 for bar in busy["bars"])
    assert all(name in tip for name in NAMES)
    assert tab.problems == []


def test_dashboard_tells_the_last_seconds_of_a_long_life(stories: tuple[Any, Any], tab: Tab) -> None:
    """A token and a position a second for hours, of which one in five stood; then 15 s of 100, and four in five."""
    service = Scripted()
    with page_of(stories, service) as (address, history):
        tokens, alpha_sum = 0, 0.0
        for second in range(10_000):
            quick = second >= 9985
            tokens += 100 if quick else 1
            alpha_sum += 80 if quick else 0.2
            counted = {"verified": tokens, "alpha_sum": alpha_sum, "proposals": tokens, "drafted": tokens}
            service.state["drafts"]["gsm8k"] = draft_of(**counted)
            service.state |= {"wall_s": float(second), "tokens": tokens, "running": 1}
            history.add(service.state)
        tab.show(900, 900, dark=False)
        tab.open(address)
        tab.until(READY)
        found = tab.ask(PROBE)
        tab.open(NOWHERE)
    assert found["tiles"][:2] == ["0.78", "100"] and "0.78" in found["drafts"]


def test_dashboard_buttons_in_a_browser(stories: tuple[Any, Any], tab: Tab) -> None:
    service = Scripted()
    with page_of(stories, service, keys=Keys(["a-secret-key"])) as (address, _):
        tab.show(900, 900, dark=False)
        tab.open(address)
        tab.until("document.querySelector('#ask').open")  # nothing is shown without the key
        assert tab.ask("document.querySelectorAll('.tiles li').length") == 0
        tab.ask("document.querySelector('#key').value = 'a-secret-key'; document.querySelector('#ask button').click()")
        tab.until(READY)
        tab.ask("document.querySelector('#toggle').click()")
        tab.until("document.querySelector('#state').innerText.includes('paused')")
        assert service.learning == "paused"
        tab.ask("document.querySelector('#toggle').click()")
        tab.until("document.querySelector('#toggle').innerText.startsWith('Pause')")
        tab.ask("document.querySelector('#draft').value = 'gsm8k'; document.querySelector('#update').click()")
        tab.ask("document.querySelector('#rollback').click()")
        tab.until("document.querySelector('#say').innerText.includes('expected a version before')")
        assert service.learning == "on" and service.pressed == [("update", "gsm8k")]
        tab.open(NOWHERE)
    refused = [problem for problem in tab.problems if "401" in problem or "409" in problem]
    assert tab.problems == refused  # Chromium reports these two itself
