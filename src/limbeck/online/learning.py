"""One draft that learns: its buffer, its updater, its versions, and what is put in place of what, when."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.decoding.drafts import Draft
from limbeck.decoding.requests import Observed, Request
from limbeck.errors import CheckpointError, LimbeckError, RecipeError
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
_LEAST_VERIFIED = 8  # positions of a request by one version, from which on its acceptance counts
_LEAST_POSITIONS = 32  # for an update that time alone calls for
_MOST_BACKOFF = 32
_MOST_WAIT = 60.0  # s, at most, until a process that keeps dying is started again


@dataclass(frozen=True)
class Pace:
    """When an update begins and how much of the time it may take.

    It begins with `update_size` new positions, or `update_seconds` after the last, once the gate holds as many requests
    as can decide. Each verdict but `better` doubles size and seconds, to 32 times at most, and halves the share, unless
    the draft is cold. `share` is training's most part of the time in which requests are served. While the draft is cold
    there is no such bound: until an update gains less than `cold_gain` of acceptance, and again after one that gains as
    much. `window`: times `update_size`, the newest positions that an update trains on. `threads`: of its process.
    """

    update_size: int = 4096
    update_seconds: float = 300.0
    window: float = 16.0
    share: float = 0.1
    cold_gain: float = 0.01
    threads: int = 1


@dataclass
class Tally:
    """Of one draft's learning, for the snapshot. `failures`: updates, or whatever else was to be done, that ended with
    an error, and `last_error` of them. `last_gain` at the gate; `known_mass`: see `Result`."""

    updates: int = 0
    swaps: int = 0
    refusals: int = 0
    undecided: int = 0
    rollbacks: int = 0
    failures: int = 0
    last_error: str | None = None
    last_gain: float | None = None
    known_mass: float | None = None


@dataclass
class _Seen:
    """What a version has drafted of one request, as the target has judged it: sums of alpha_raw over positions."""

    version: int = 0
    alpha_sum: float = 0.0
    verified: int = 0

    def add(self, version: int, alpha_raw: Sequence[float]) -> None:
        """Of another version than before: that one's no longer counts."""
        if version != self.version:
            self.version, self.alpha_sum, self.verified = version, 0.0, 0
        self.alpha_sum += sum(alpha_raw)
        self.verified += len(alpha_raw)


@dataclass(eq=False)
class Learning:
    """Lets `draft` learn from its traffic. `build` makes its learner, with the weights that the draft was made with, in
    another process; `folder` holds its versions.

    From `start` on a thread waits for the buffer to fill, has the updater train and gate, and has the draft's new
    weights put in place between two rounds. A dead updater is started again; whatever fails, serving goes on.
    RecipeError for a buffer that holds out fewer requests than the gate can decide on.
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
        if self.buffer.held_out < self.gate.least:
            raise RecipeError(
                f"held_out: expected at least {self.gate.least} requests, on fewer of which a gate with the error "
                f"{self.gate.error:g} never decides, found {self.buffer.held_out}: raise it"
            )
        self.versions = Versions(self.folder)
        self.updater = Updater(
            self.build, self.folder, self.training, self.gate, threads=self.pace.threads, seed=self.seed
        )
        self.tally = Tally()
        self.serving = 0
        self.cold = True
        self.backoff = 1
        self.broken = False  # by an error in the engine's thread: it learns no more
        self._asked = self._doubt = False
        self._forced = self._paused = self._ended = False
        self._again: float | None = None  # when an update that was lost with its process is tried again
        self._lost = 0
        self._swapped_at = 0  # traces known when this version began to serve
        self._seen: dict[str, _Seen] = {}
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="limbeck-learning", daemon=True)
        self._post: Post = lambda action: action()
        self._mark: Mark = lambda kind, version: None
        self._turn = threading.Lock()

    # -- life --------------------------------------------------------------------------------------------------------

    def start(self, post: Post, mark: Mark, turn: threading.Lock) -> None:
        """`post` has the engine's thread call something between two rounds; `mark` is told of swaps and the like; one
        of those who share `turn` trains at a time. Where there are versions, the updater is waited for, which knows
        whether they are of this draft (CheckpointError where not), and the newest whole one is put in place."""
        self._post, self._mark, self._turn = post, mark, turn
        newest = self.versions.newest()
        if newest is not None:
            self.updater.ready()
            self.draft.prepare(self.versions.weights(newest), newest)()
            self.serving, self.cold = newest, newest == 0
        self._last = time.monotonic()
        self._thread.start()

    def give_up(self) -> None:
        """Nobody serves any more: nothing is put in place from now on."""
        self._ended = True

    def stop(self) -> None:
        self._ended = True
        self.updater.end()
        if self._thread.is_alive():
            self._thread.join(5)

    # -- from the engine's thread --------------------------------------------------------------------------------------

    def observe(self, row: Observed, *, own: bool) -> None:
        """`own`: it is this draft's proposal that the row shows. An error here ends the learning, not the serving."""
        self._guarded(lambda: self._observe(row, own))

    def close(self, request: Request) -> None:
        """A request has ended. Errors as in `observe`."""
        self._guarded(lambda: self._close(request))

    def _guarded(self, action: Callable[[], None]) -> None:
        if self.broken:
            return
        try:
            action()
        except Exception as error:
            self.broken = True
            self._failed(error)

    def _observe(self, row: Observed, own: bool) -> None:
        if own and row.version == self.serving:
            seen = self._seen.setdefault(row.request.id, _Seen())
            seen.add(row.version, row.alpha_raw)
        self.buffer.observe(row)

    def _close(self, request: Request) -> None:
        self.buffer.close(request.id)
        seen = self._seen.pop(request.id, None)
        if seen is None or seen.version != self.serving or seen.verified < _LEAST_VERIFIED:
            return
        if self.watch.add(seen.alpha_sum / seen.verified):
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

    def ask_roll_back(self) -> None:
        self._asked = True

    @property
    def training_s(self) -> float:
        return self.updater.worked

    def numbers(self) -> dict[str, Any]:
        """What is counted here, for the snapshot."""
        return {
            **vars(self.tally),
            **self.buffer.numbers(),
            "cold": self.cold,
            "broken": self.broken,
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
            if self.broken:
                continue
            try:
                if self._asked or self._doubt:
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
        """A LimbeckError says what there is to say; of another, where it comes from is worth the lines."""
        LOG.warning("the draft's learning: %s", error, exc_info=None if isinstance(error, LimbeckError) else error)
        self.tally.failures += 1
        self.tally.last_error = f"{type(error).__name__}: {error}"
        self._last = time.monotonic()

    def _due(self) -> bool:
        if self._paused:
            return False
        if self._again is not None:
            return time.monotonic() >= self._again
        new = self.buffer.new
        if self._forced:
            return True
        if len(self.buffer.held["gate"]) < self.gate.least:  # no verdict could come of it
            return False
        if new >= self.pace.update_size * self.backoff:
            return True
        waited = time.monotonic() - self._last
        return waited >= self.pace.update_seconds * self.backoff and new >= _LEAST_POSITIONS

    def _share(self) -> float:
        return 1.0 if self.cold else self.pace.share / self.backoff

    def _job(self, lot: Lot, other: int | None = None) -> Job:
        ids_D = self.draft.ids_D
        return Job(self.serving, lot, other, None if ids_D is None else ids_D.cpu())

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
            try:
                put = self._put(result.number, self.watch.swapped)
            except Exception:
                self.versions.withdraw(result.number)  # it would be the newest, and never has served
                raise
            if put:
                self.tally.swaps += 1
                self._mark("swap", result.number)

    def _note(self, result: Result) -> None:
        tally, verdict = self.tally, result.verdict
        tally.updates += 1
        tally.known_mass, tally.last_gain = result.known, verdict.gain
        self._mark("update", self.serving)
        if verdict.kind == "better":
            self.backoff = 1
            self.cold = verdict.gain >= self.pace.cold_gain
            return
        if verdict.requests < self.gate.least:  # forced too soon: nothing is known
            tally.undecided += 1
            return
        # While it gains where it stops, an undecided gate does not end the haste.
        gain = verdict.gain if result.before is None or result.after is None else result.after - result.before
        self.cold = self.cold and gain >= self.pace.cold_gain
        if not self.cold:
            self.backoff = min(2 * self.backoff, _MOST_BACKOFF)
        if verdict.kind == "worse":
            tally.refusals += 1
            self._mark("refusal", self.serving)
        else:
            tally.undecided += 1

    def _put(self, number: int, then: Callable[[], None]) -> bool:
        """Has the engine's thread put a version in place, and waits for it. False: the service has ended before."""
        done = threading.Event()
        failed: list[Exception] = []
        install = self.draft.prepare(self.versions.weights(number), number)

        def between() -> None:
            try:
                install()
                self.serving, self._swapped_at = number, self.buffer.count
                then()
            except Exception as error:
                failed.append(error)
            done.set()

        self._post(between)
        while not done.wait(_LOOK):
            if self._ended:
                return False
        if failed:
            raise failed[0]
        return True

    def _look_back(self) -> None:
        """Rolls back when it was asked for; and when live acceptance has fallen, unless the version before is no better
        on the held-out requests since: then the traffic has changed, not the draft."""
        asked = self._asked
        self._asked = self._doubt = False
        previous = self.previous
        if previous is None:
            return
        if not asked and self._traffic_changed(previous):
            return
        withdrawn = self.serving
        if self._put(previous, self.watch.rest):
            self.tally.rollbacks += 1
            self._mark("rollback", previous)
            self.versions.withdraw(withdrawn)

    def _traffic_changed(self, previous: int) -> bool:
        gate = [trace for trace in self.buffer.apart("gate") if trace.number > self._swapped_at]
        if not gate:
            return False
        try:
            result = self.updater.run(self._job(Lot([], [], gate, []), previous))
            if result.error is not None:
                raise CheckpointError(result.error)
        except LimbeckError as error:
            self._failed(error)
            return False
        return result.verdict.gain <= 0
