"""A service: the engine in a thread of its own, requests from any thread, and drafts that learn beside it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from time import perf_counter
from typing import Any

from limbeck.decoding.controller import Round
from limbeck.decoding.requests import Counters, Event, Observation, Request
from limbeck.decoding.speculative import Engine
from limbeck.errors import RolloutError
from limbeck.online.coins import HeldOut, held_out_of
from limbeck.online.learning import Learning
from limbeck.online.ledger import Clock, Ledger, Watched
from limbeck.online.routing import Routing

LOG = logging.getLogger(__name__)
OnEvent = Callable[[Event], None]

_MARKS = 200  # of each kind: updates are many, and must not push out the swaps
_POSITIONS = 64  # counted one by one of the positions in a proposal
_IDLE = 0.5  # s without a request after which the loop looks about


@dataclass
class DraftCounts:
    """What one draft did. `proposals`: its turns, a request in a round; `alpha_sum` over the `verified` positions;
    `kept[j]`: how often its j-th token stood; `lengths[n]`: how often n tokens of a proposal did."""

    proposals: int = 0
    drafted: int = 0
    accepted: int = 0
    verified: int = 0
    alpha_sum: float = 0.0
    gamma: float = 0.0
    kept: list[int] = field(default_factory=list[int])
    lengths: list[int] = field(default_factory=list[int])


@dataclass
class _Open:
    """A request that is served."""

    request: Request
    tag: str | None
    on_event: OnEvent
    draft: str | None
    tokens: int = 0
    first: float = 0.0
    counted: Counters = field(default_factory=Counters)  # of its own, those that are in the draft's


class ServiceEnded(RolloutError):
    """The service has stopped or failed."""


class Service:
    """Serves `engine`, whose thread it owns from `start` to `stop`.

    learning: by draft, what lets it learn (see `Learning`); none: it serves without. routing: chooses a draft for each
    request; by default a request gets the draft that it names. `held_out` says which requests keep all their verified
    positions. One round in `plain_every` is decoded plainly, to know the speedup (0: none).

    `submit`, `cancel`, `snapshot`, `pause`, `resume`, `force_update` and `roll_back` may be called from any thread.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        learning: Mapping[str, Learning] | None = None,
        routing: Routing | None = None,
        held_out: HeldOut | None = None,
        plain_every: int = 50,
        seed: int = 0,
    ) -> None:
        self.engine = engine
        self.learning = dict(learning or {})
        unknown = sorted(set(self.learning) - set(engine.drafts))
        if unknown:
            known = ", ".join(engine.drafts) or "none"
            raise RolloutError(
                f"learning: expected the engine's drafts ({known}), found {unknown[0]}: name one of them"
            )
        self.routing = routing or Routing(list(engine.drafts))
        keeps_all = all(learning.buffer.keeps == "all" for learning in self.learning.values())
        self.held_out = held_out or held_out_of("all" if keeps_all else "rejected")
        self.seed = seed
        self.ledger = Ledger()
        every = plain_every if engine.drafts else 0
        self._trains = threading.Lock()  # whoever trains holds it
        engine.controller = Watched(engine.controller, self.ledger, every, self._count, self._trains.locked)
        engine.observer = self._observe if self.learning else None
        self.counts = {name: DraftCounts() for name in engine.drafts}
        self.requests = 0
        self.marks: dict[str, deque[dict[str, Any]]] = {}  # by kind
        self.failure: str | None = None
        self._open: dict[str, _Open] = {}
        self._between: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._ended = self._closed = False
        self._paused = False
        self._clock = Clock()
        self._resting: float | None = None  # since when nothing is to be done
        self._thread = threading.Thread(target=self._run, name="limbeck-engine", daemon=True)

    # -- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to serve; the drafts that learn take up their newest whole version first. CheckpointError where the
        versions on disk are another draft's."""
        for name, learning in self.learning.items():
            learning.start(self.between_rounds, partial(self._mark, name), self._trains)
        self.ledger.started = perf_counter()
        self._clock = Clock(self.ledger.started)
        self._thread.start()

    def stop(self) -> None:
        """Cancels what is still written, and ends the thread and the updaters."""
        self._ended = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        for learning in self.learning.values():
            learning.stop()

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- requests ----------------------------------------------------------------------------------------------------

    def submit(self, request: Request, on_event: OnEvent) -> None:
        """Takes a request in. `on_event` is called with its events, in order, from the engine's thread: it must be
        quick. The last one has a `finish_reason`. An `on_event` that raises cancels its request.

        `request.route` is a draft's name or a tag of the routing. RolloutError as from `Engine.add`, and for an id that
        is being served; ServiceEnded from a service that has stopped or failed.
        """
        with self._lock:
            if self._closed:
                why = self.failure or "it was stopped"
                raise ServiceEnded(f"expected a service that runs, found one that has ended ({why}): start another")
            if request.id in self._open:
                raise RolloutError(f"expected a new id, found {request.id!r}, which is being served: choose another")
            self.requests += 1
            tag, draft = request.route, self.routing.choose(request.route)
            # The main one is left to the controller, which may do without it.
            request = replace(request, route=None if draft == self.routing.main else draft)
            hungry = any(self.learning[name].hungry for name in self._taught_by(request))
            keep = request.train and self.held_out.keeps(self.seed, request.tokens, hungry=hungry)
            request = replace(request, keep_all=keep or request.keep_all)
            self._open[request.id] = _Open(request, tag, on_event, draft)
        try:
            self.engine.add(request)
        except BaseException:
            with self._lock:
                del self._open[request.id]
            raise
        self._wake.set()

    def cancel(self, id: str) -> None:
        """Ends a request at the next round, by an event with the reason `cancelled`; an unknown one is not missed."""
        self.engine.cancel(id)
        self._wake.set()

    def between_rounds(self, action: Callable[[], None]) -> None:
        """Has the engine's thread call `action` before its next round."""
        self._between.append(action)
        self._wake.set()

    # -- controls ----------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """No update begins until `resume`; one that runs is left to end."""
        self._paused = True
        for learning in self.learning.values():
            learning.pause()

    def resume(self) -> None:
        self._paused = False
        for learning in self.learning.values():
            learning.resume()

    def force_update(self, draft: str | None = None) -> None:
        """An update of this draft (None: of all) as soon as possible, with whatever its buffer holds. RolloutError for
        a draft that does not learn, and while updates are paused."""
        if self._paused:
            raise RolloutError("force_update: expected learning that runs, found it paused: resume it first")
        for learning in self._learners(draft):
            learning.force()

    def roll_back(self, draft: str | None = None) -> None:
        """Back to the version before the one that serves (None: of all drafts that have one). RolloutError where there
        is none."""
        chosen = self._learners(draft)
        able = [learning for learning in chosen if learning.previous is not None]
        if not able:
            raise RolloutError("roll_back: expected a version before the one that serves, found none: nothing to do")
        for learning in able:
            learning.ask_roll_back()

    def _learners(self, draft: str | None) -> list[Learning]:
        if draft is None and self.learning:
            return list(self.learning.values())
        if draft is None or draft not in self.learning:
            known = ", ".join(self.learning) or "none"
            raise RolloutError(f"expected a draft that learns ({known}), found {draft!r}: name one of them")
        return [self.learning[draft]]

    # -- numbers -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts of what was done since the start.

        `running`, `waiting`, `requests`, `tokens`, `learning` (on, paused, off), `failure`; `drafts` by name (the
        fields of `DraftCounts`, kind, version, benched, and what `Learning.numbers` gives); `ledger` (seconds; all but
        `training` add up to `wall_s`, but for the round of this moment), `per_token`, `speedup` and
        `plain_tokens_per_s` (None: not known); `marks` (t, kind, draft, version).
        """
        now = perf_counter()
        resting = self._resting
        self.ledger.training = sum(learning.training_s for learning in self.learning.values())
        ledger = self.ledger.seconds(self.engine.seconds)
        ledger["idle"] += 0.0 if resting is None else now - resting
        return {
            "running": len(self.engine.rows),
            "waiting": len(self.engine.waiting),
            "requests": self.requests,
            "tokens": self.ledger.tokens,
            "learning": "off" if not self.learning else "paused" if self._paused else "on",
            "failure": self.failure,
            "wall_s": now - self.ledger.started,
            "drafts": {name: self._numbers(name) for name in self.engine.drafts},
            "ledger": ledger,
            "per_token": self.ledger.per_token(self.engine.seconds),
            "speedup": self.ledger.speedup,
            "plain_tokens_per_s": self.ledger.plain_tokens_per_s,
            "marks": sorted((mark for kind in list(self.marks.values()) for mark in list(kind)), key=itemgetter("t")),
        }

    def _numbers(self, name: str) -> dict[str, Any]:
        draft, counts = self.engine.drafts[name], self.counts[name]
        learning = self.learning.get(name)
        own = dict(vars(counts), kept=list(counts.kept), lengths=list(counts.lengths))
        kind = type(draft).__name__.removesuffix("Draft").lower()
        more = {} if learning is None else learning.numbers()
        return {"kind": kind, "version": draft.version, "benched": draft.benched, **own, **more}

    def _mark(self, draft: str, kind: str, version: int) -> None:
        seconds = perf_counter() - self.ledger.started
        marks = self.marks.setdefault(kind, deque(maxlen=_MARKS))
        marks.append({"t": seconds, "kind": kind, "draft": draft, "version": version})

    def _count(self, round_: Round) -> None:
        """A round's drafting, into the counts of each draft: by what the requests' own counters have gained."""
        for drafted in round_.drafted:
            opened = self._open.get(drafted.row.request.id)
            if opened is None:
                continue
            counts, now, before = self.counts[drafted.draft], drafted.row.counters, opened.counted
            opened.counted = replace(now)
            proposed, kept = now.drafted - before.drafted, now.accepted - before.accepted
            alpha, verified = now.alpha_sum - before.alpha_sum, now.verified - before.verified
            counts.proposals += 1
            counts.drafted += proposed
            counts.accepted += kept
            counts.gamma += 0.05 * (proposed - counts.gamma)
            for table, places in ((counts.kept, range(kept)), (counts.lengths, (kept,))):
                for place in places:
                    if place < _POSITIONS:
                        table.extend([0] * (place + 1 - len(table)))
                        table[place] += 1
            counts.alpha_sum += alpha
            counts.verified += verified

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._ended:
                self._turn()
        except Exception as error:
            LOG.exception("the engine: expected a round, found an error: start the service anew")
            self.failure = f"{type(error).__name__}: {error}"
        finally:
            self._end_all()

    def _turn(self) -> None:
        """What is to be done between two rounds, and a round, or where there is none, a rest."""
        ledger, clock = self.ledger, self._clock
        while self._between:
            self._apply(self._between.popleft())
        busy = self.engine.busy
        self._tell(busy=busy)
        ledger.overhead += clock.lap()
        if not busy:
            self._resting = clock.last
            self._wake.wait(_IDLE)
            self._wake.clear()
            self._resting = None
            ledger.idle += clock.lap()
            for draft in self.engine.drafts.values():
                draft.expire()
            return
        before = _total(self.engine)
        events = self.engine.step()
        ledger.overhead += clock.lap() - (_total(self.engine) - before)
        for event in events:
            self._deliver(event)
        ledger.overhead += clock.lap()

    def _apply(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:
            LOG.exception("between two rounds: expected new weights in place, found an error: the old ones serve on")

    def _tell(self, *, busy: bool) -> None:
        for learning in self.learning.values():
            learning.tell(busy=busy)

    def _observe(self, observation: Observation) -> None:
        for row in observation.rows:
            for name in self._taught_by(row.request):
                seen = replace(row, hidden_TF=self.engine.tapped_by(name, row.hidden_TF))
                self.learning[name].observe(seen, own=row.draft == name)

    def _taught_by(self, request: Request) -> Iterable[str]:
        """A request teaches the draft that it was routed to, and where nobody chose and none is the main one, all."""
        draft = request.route or self.routing.main
        if draft is None:
            return self.learning
        return [draft] if draft in self.learning else []

    def _deliver(self, event: Event) -> None:
        opened = self._open.get(event.id)
        if opened is None:
            return
        self.ledger.tokens += len(event.tokens)
        opened.first = opened.first or perf_counter()
        opened.tokens += len(event.tokens)
        if event.finish_reason is not None:
            if opened.draft is not None and opened.tokens > 1:
                self.routing.record(opened.tag, opened.draft, opened.tokens - 1, perf_counter() - opened.first)
            for name in self._taught_by(opened.request):
                self.learning[name].close(opened.request)
            with self._lock:  # until here, an error is told to this request too
                del self._open[event.id]
        try:
            opened.on_event(event)
        except Exception:
            LOG.exception("request %s: expected on_event to return, found an error: it is cancelled", event.id)
            if event.finish_reason is None:
                opened.on_event = _nobody
                self.engine.cancel(event.id)

    def _end_all(self) -> None:
        """Tells everybody who still waits."""
        reason = "cancelled" if self.failure is None else "error"
        for learning in self.learning.values():
            learning.give_up()
        with self._lock:
            self._closed = True
            left, self._open = list(self._open.values()), {}
        for opened in left:
            with suppress(Exception):
                opened.on_event(Event(opened.request.id, [], [], reason, None, self.failure))


def _total(engine: Engine) -> float:
    return sum(vars(engine.seconds).values())


def _nobody(_: Event) -> None:
    pass
