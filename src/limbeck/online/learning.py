"""One draft that learns: its buffer, its updater, its versions, and what is put in place of what, when."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.decoding.drafts import Draft
from limbeck.decoding.requests import Counters, Observed, Request
from limbeck.errors import CheckpointError, LimbeckError
from limbeck.online.buffer import Buffer, Lot
from limbeck.online.gate import Gate, Watch
from limbeck.online.learner import Training
from limbeck.online.updater import Build, Job, Result, Updater, UpdaterLost
from limbeck.online.versions import Versions

LOG = logging.getLogger(__name__)
Post = Callable[[Callable[[], None]], None]
Mark = Callable[[str, int], None]

_LOOK = 0.1  # s between two looks at the buffer
_EXPIRE = 1.0  # s
_PUT = 60.0  # s that a swap may wait for the end of a round
_LEAST_VERIFIED = 8  # positions of a request whose live acceptance counts
_LEAST_POSITIONS = 32  # for an update that time alone calls for
_MOST_BACKOFF = 32
_MOST_WAIT = 60.0  # s before a process that keeps dying is started again


@dataclass(frozen=True)
class Pace:
    """When an update begins and how much of the time it may take.

    It begins with `update_size` new positions, or `update_seconds` after the last; each verdict but `better` doubles
    both, to 32 times at most, and halves the share. `share` is training's most part of the time in which requests are
    served. While the draft is cold there is no such bound: until an update gains less than `cold_gain` of acceptance,
    and again after one that gains as much. `window`: times `update_size`, the newest positions that an update trains
    on.
    """

    update_size: int = 2048
    update_seconds: float = 300.0
    window: float = 4.0
    share: float = 0.1
    cold_gain: float = 0.03
    threads: int = 1


@dataclass
class Tally:
    updates: int = 0
    swaps: int = 0
    refusals: int = 0
    undecided: int = 0
    rollbacks: int = 0
    failures: int = 0
    last_error: str | None = None
    last_gain: float | None = None
    stop_before: float | None = None
    stop_after: float | None = None
    gate_requests: int = 0
    trained_positions: int = 0
    known_mass: float | None = None


@dataclass(eq=False)
class Learning:
    """Lets `draft` learn from its traffic. `build` makes its learner, with the weights that the draft was made with, in
    another process; `folder` holds its versions.

    From `start` on a thread waits for the buffer to fill, has the updater train and gate, and has the draft's new
    weights put in place between two rounds. A dead updater is started again; whatever fails, serving goes on.
    """

    draft: Draft
    build: Build
    folder: str | Path
    buffer: Buffer
    training: Training = field(default_factory=Training)
    gate: Gate = field(default_factory=Gate)
    pace: Pace = field(default_factory=Pace)
    watch: Watch = field(default_factory=Watch)
    seed: int = 0

    def __post_init__(self) -> None:
        self.versions = Versions(self.folder)
        self.updater = Updater(
            self.build, self.folder, self.training, self.gate, threads=self.pace.threads, seed=self.seed
        )
        self.tally = Tally()
        self.serving = 0
        self.cold = True
        self.backoff = 1
        self._alarm: str | None = None
        self._doubt = False
        self._forced = self._paused = self._ended = False
        self._again: float | None = None  # when an update that was lost with its process is tried again
        self._lost = 0
        self._swapped_at = 0  # traces known when this version began to serve
        self._started: dict[str, int] = {}  # the version that a request was first seen with
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="limbeck-learning", daemon=True)
        self._post: Post = lambda action: action()
        self._mark: Mark = lambda kind, version: None
        self._turn = threading.Lock()

    # -- life --------------------------------------------------------------------------------------------------------

    def start(self, post: Post, mark: Mark, turn: threading.Lock) -> None:
        """`post` has the engine's thread call something between two rounds; `mark` is told of swaps and the like; one
        of those who share `turn` trains at a time. The newest whole version is put in place first: then the updater is
        waited for, which knows whether it is of this draft (CheckpointError where not)."""
        self._post, self._mark, self._turn = post, mark, turn
        newest = self.versions.newest()
        if newest:
            self.updater.ready()
            self.draft.prepare(self.versions.weights(newest), newest)()
            self.serving, self.cold = newest, False
        self._last = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        self._ended = True
        self.updater.end()
        if self._thread.is_alive():
            self._thread.join(5)

    # -- from the engine's thread --------------------------------------------------------------------------------------

    def observe(self, row: Observed) -> None:
        self._started.setdefault(row.request.id, self.serving)
        self.buffer.observe(row)

    def close(self, request: Request, counters: Counters | None) -> None:
        """A request has ended."""
        self.buffer.close(request.id)
        version = self._started.pop(request.id, None)
        if version != self.serving or counters is None or counters.verified < _LEAST_VERIFIED:
            return
        if self.watch.add(counters.alpha_sum / counters.verified):
            self.watch.rest()
            self._doubt = True

    def tell(self, *, busy: bool) -> None:
        self.updater.set_busy(busy)

    # -- controls, from any thread -------------------------------------------------------------------------------------

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def force(self) -> None:
        self._forced = True

    @property
    def previous(self) -> int | None:
        """The version to which it would be rolled back."""
        return self.versions.before(self.serving)

    def ask_roll_back(self, why: str) -> None:
        self._alarm = why

    @property
    def training_s(self) -> float:
        return self.updater.worked

    def numbers(self) -> dict[str, Any]:
        """What is counted here, for the snapshot."""
        return {
            **vars(self.tally),
            **self.buffer.numbers(),
            "cold": self.cold,
            "share": self._share(),
            "training_s": self.training_s,
            "restarts": max(self.updater.restarts, 0),
        }

    # -- the thread that waits for the updater -------------------------------------------------------------------------

    def _run(self) -> None:
        expired = 0.0
        while not self._ended:
            time.sleep(_LOOK)
            if time.monotonic() - expired > _EXPIRE:
                self.buffer.expire()
                expired = time.monotonic()
            try:
                if self._alarm is not None or self._doubt:
                    with self._turn:
                        self._look_back()
                elif self._due():
                    with self._turn:
                        self._update()
            except UpdaterLost as error:
                if not self._ended:
                    self._failed(error)
                    self._lost += 1
                    self._again = time.monotonic() + min(2.0**self._lost, _MOST_WAIT) - 2
            except Exception as error:
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        LOG.warning("the draft's learning: %s", error)
        self.tally.failures += 1
        self.tally.last_error = f"{type(error).__name__}: {error}"
        self._last = time.monotonic()

    def _due(self) -> bool:
        if self._paused:
            return False
        if self._again is not None:
            return time.monotonic() >= self._again
        new = self.buffer.new
        if self._forced or new >= self.pace.update_size * self.backoff:
            return new > 0 or self._forced
        waited = time.monotonic() - self._last
        return waited >= self.pace.update_seconds * self.backoff and new >= _LEAST_POSITIONS

    def _share(self) -> float:
        return 1.0 if self.cold else self.pace.share / self.backoff

    def _job(self, lot: Lot, other: int | None = None) -> Job:
        return Job(self.serving, lot, other, getattr(self.draft, "ids_D", None))

    def _update(self) -> None:
        self._forced, self._again = False, None
        lot = self.buffer.take(round(self.pace.update_size * self.pace.window))
        if not lot.train:
            return
        self.updater.set_share(self._share())
        try:
            result = self.updater.run(self._job(lot))
        finally:
            self._last = time.monotonic()
        self._lost = 0
        if result.error is not None:
            self._failed(CheckpointError(result.error))
            return
        self._note(result)
        if result.number is not None:
            weights = self.versions.weights(result.number)
            self._put(result.number, weights)
            self.tally.swaps += 1
            self._mark("swap", result.number)
            self.watch.swapped()

    def _note(self, result: Result) -> None:
        tally, verdict = self.tally, result.verdict
        tally.updates += 1
        tally.trained_positions += result.positions
        tally.stop_before, tally.stop_after = result.before, result.after
        tally.known_mass = result.known
        tally.last_gain, tally.gate_requests = verdict.gain, verdict.requests
        self._mark("update", self.serving)
        if verdict.kind == "better":
            self.backoff = 1
            self.cold = verdict.gain >= self.pace.cold_gain
            return
        # A gate that has seen too few requests says nothing about the draft.
        gain = verdict.gain if result.before is None or result.after is None else result.after - result.before
        self.cold = self.cold and gain >= self.pace.cold_gain
        if not self.cold:
            self.backoff = min(2 * self.backoff, _MOST_BACKOFF)
        if verdict.kind == "worse":
            tally.refusals += 1
            self._mark("refusal", self.serving)
        else:
            tally.undecided += 1

    def _put(self, number: int, weights: dict[str, Any]) -> None:
        """Has the engine's thread put a version in place, and waits for it."""
        done = threading.Event()
        failed: list[Exception] = []
        install = self.draft.prepare(weights, number)

        def between() -> None:
            try:
                install()
                self.serving, self._swapped_at = number, self.buffer.count
            except Exception as error:
                failed.append(error)
            done.set()

        self._post(between)
        while not done.wait(_LOOK):
            if self._ended:
                return
        if failed:
            raise failed[0]

    def _look_back(self) -> None:
        """Rolls back when it was asked for; and when live acceptance has fallen, unless the version before is no better
        on the held-out requests since: then the traffic has changed, not the draft."""
        asked, self._alarm = self._alarm is not None, None
        self._doubt = False
        previous = self.previous
        if previous is None:
            return
        if not asked and self._traffic_changed(previous):
            return
        weights = self.versions.weights(previous)
        withdrawn = self.serving
        self.versions.withdraw(withdrawn)
        self._put(previous, weights)
        self.watch.rest()
        self.tally.rollbacks += 1
        self._mark("rollback", previous)

    def _traffic_changed(self, previous: int) -> bool:
        lot = self.buffer.take(0)
        gate = [trace for trace in lot.gate if trace.number > self._swapped_at]
        if not gate:
            return False
        try:
            result = self.updater.run(self._job(Lot([], [], gate, []), previous))
        except LimbeckError:
            return False
        return result.error is None and result.verdict.gain <= 0
