"""One draft that learns: its buffer, its updater, its versions, and what is put in place of what, when."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from limbeck.decoding.drafts import Draft
from limbeck.decoding.requests import Observed, Request
from limbeck.errors import CheckpointError, LimbeckError, RecipeError
from limbeck.online.buffer import Buffer, Lot, Trace
from limbeck.online.gate import Gate, Watch
from limbeck.online.learner import Training
from limbeck.online.pace import Pace
from limbeck.online.updater import Build, Job, Result, Updater, UpdaterLost
from limbeck.online.versions import Versions
from limbeck.online.vocabulary import reranked

LOG = logging.getLogger(__name__)
Post = Callable[[Callable[[], None]], None]
Mark = Callable[[str, int], None]

_LOOK = 0.1  # s between two looks at the buffer
_EXPIRE = 1.0  # s
_LEAST_PROPOSALS = 8  # of a request, from which on its acceptance counts
_LEAST_POSITIONS = 32  # for an update that time alone calls for
_MOST_BACKOFF = 32
_MOST_WAIT = 60.0  # s, at most, until a process that keeps dying is started again


class Taught(Draft, Protocol):
    """A draft that can learn."""

    def restrict(self, ids_D: Tensor | None) -> None:
        """From the next round on these tokens alone are drafted, beside those of a request itself (None: all)."""
        ...


@dataclass
class Tally:
    """Of one draft's learning, for the snapshot. `failures`: updates, or whatever else was to be done, that ended with
    an error, and `last_error` of them. `last_gain` at the gate; `known_mass`: see `Result`."""

    updates: int = 0
    swaps: int = 0
    refusals: int = 0
    undecided: int = 0
    rollbacks: int = 0
    reranks: int = 0
    failures: int = 0
    last_error: str | None = None
    last_gain: float | None = None
    known_mass: float | None = None


@dataclass
class _Seen:
    """How a request was drafted that began with this version: alpha_raw of the first token of each proposal, since a
    better draft proposes further, where it is less sure."""

    version: int
    alpha_sum: float = 0.0
    proposals: int = 0


@dataclass(eq=False)
class Learning:
    """Lets `draft` learn from its traffic. `build` makes its learner, with the weights that the draft was made with, in
    another process; `folder` holds its versions.

    From `start` on a thread waits for the buffer to fill, has the updater train and gate, and has the draft's new
    weights put in place between two rounds. A dead updater is started again; whatever fails, serving goes on.
    `cold`: it begins as one that has learnt nothing (see `Pace`).
    RecipeError for a buffer that holds out fewer requests than the gate can decide on.
    """

    draft: Taught
    build: Build
    folder: str | Path
    buffer: Buffer
    training: Training = field(default_factory=Training)
    gate: Gate = field(default_factory=Gate)
    pace: Pace = field(default_factory=Pace)
    watch: Watch = field(default_factory=Watch)
    seed: int = 0
    cold: bool = True

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
        self.backoff = 1
        self.broken = False  # by an error in the engine's thread: it learns no more
        self._asked: int | None = None  # the version to be taken back
        self._doubt = False  # whether acceptance has fallen by the one that serves
        self._forced = self._paused = self._looking = self._ended = False
        self._again: float | None = None  # when an update that was lost with its process is tried again
        self._lost = 0
        self._prepared = 0.0  # s
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
            self.serving, self.cold = newest, self.cold and newest == 0
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
        self.updater.end()  # the thread may have begun another process meanwhile

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
        if own and row.alpha_raw:
            seen = self._seen.setdefault(row.request.id, _Seen(row.version))
            seen.alpha_sum += row.alpha_raw[0]
            seen.proposals += 1
        self.buffer.observe(row)

    def _close(self, request: Request) -> None:
        self.buffer.close(request.id)
        seen = self._seen.pop(request.id, None)
        if seen is None or seen.version != self.serving or seen.proposals < _LEAST_PROPOSALS:
            return
        if self.watch.add(seen.alpha_sum / seen.proposals):
            self.watch.rest()
            self._doubt = True
            self._hold()

    @property
    def hungry(self) -> bool:
        """Whether the gate holds too few requests for a verdict."""
        return len(self.buffer.held["gate"]) < self.gate.least

    def tell(self, *, busy: bool) -> None:
        self.updater.set_busy(busy)

    # -- controls, from any thread -------------------------------------------------------------------------------------

    def pause(self) -> None:
        """No update begins, and one that runs stands still."""
        self._paused = True
        self._hold()

    def resume(self) -> None:
        self._paused = False
        self._hold()

    def _hold(self) -> None:
        """What is paused stands still, unless there may be a version to take back: that waits for nobody."""
        wanted = self._looking or self._doubt or self._asked is not None
        self.updater.set_held(self._paused and not wanted)

    def force(self) -> None:
        self._forced = True

    @property
    def previous(self) -> int | None:
        """The version to which it would be rolled back."""
        return self.versions.before(self.serving)

    def ask_roll_back(self) -> None:
        """Back to `previous`, after the update that runs, paused or not."""
        self._asked = self.serving
        self._hold()

    @property
    def training_s(self) -> float:
        """Seconds of a core: of the updater, and of what puts its versions in place."""
        return self.updater.worked + self._prepared

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
        self._carefully(self.updater.ready)  # to load takes as long as some updates
        expired = 0.0
        while not self._ended:
            time.sleep(_LOOK)
            if time.monotonic() - expired > _EXPIRE:
                self.buffer.expire()
                expired = time.monotonic()
            if self.broken:
                continue
            if self._asked is not None or self._judgeable():
                self._carefully(self._look_back)
            elif self._due():
                self._carefully(self._update)

    def _carefully(self, action: Callable[[], None]) -> None:
        """Whatever fails, serving goes on; one of those who share the turn acts at a time."""
        try:
            with self._turn:
                action()
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
        if self.hungry:  # no verdict could come of it
            return False
        if new >= self._size():
            return True
        waited = time.monotonic() - self._last
        return waited >= self.pace.update_seconds * self.backoff and new >= _LEAST_POSITIONS

    def _size(self) -> float:
        return self.pace.size(cold=self.cold, updates=self.tally.updates, backoff=self.backoff)

    def _share(self) -> float:
        return 1.0 if self.cold else self.pace.share / self.backoff

    def _job(self, lot: Lot, other: int | None = None) -> Job:
        ids_D = self.draft.ids_D
        return Job(self.serving, lot, other, None if ids_D is None else ids_D.cpu())

    def _update(self) -> None:
        self._forced, self._again = False, None
        lot = self.pace.take(self.buffer, self._size())
        if not lot.train:
            return
        self._rerank(lot)
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
        if verdict.requests < self.gate.least:  # forced too soon: nothing is known
            tally.undecided += 1
            return
        # While it gains where it stops, an undecided gate does not end the haste.
        gain, level = verdict.gain, 0.0
        if result.before is not None and result.after is not None:
            gain, level = max(gain, result.after - result.before), result.after
        self.cold = gain >= self.pace.least_gain and level < self.pace.cold
        if gain >= self.pace.least_gain:
            self.backoff = 1
        else:
            self.backoff = min(2 * self.backoff, _MOST_BACKOFF)
        if verdict.kind == "better":
            return
        if verdict.kind == "worse":
            tally.refusals += 1
            self._mark("refusal", self.serving)
        else:
            tally.undecided += 1

    def _put(self, number: int, then: Callable[[], None]) -> bool:
        """Has a version put in place. False: the service has ended before."""
        start = time.thread_time()
        install = self.draft.prepare(self.versions.weights(number), number)
        self._prepared += time.thread_time() - start

        def put() -> None:
            install()
            self.serving, self._swapped_at = number, self.buffer.count
            self._doubt = False
            self._hold()
            then()

        return self._between(put)

    def _between(self, action: Callable[[], None]) -> bool:
        """Has the engine's thread do this between two rounds, and waits for it. False: the service has ended before."""
        done = threading.Event()
        failed: list[Exception] = []

        def between() -> None:
            try:
                action()
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

    def _rerank(self, lot: Lot) -> None:
        """A reduced head follows the traffic."""
        ids_D = self.draft.ids_D
        if ids_D is None:
            return
        new_D = reranked(ids_D.cpu(), [*lot.train, *lot.stop, *lot.gate, *lot.replay])
        if new_D is not None and self._between(lambda: self.draft.restrict(new_D.to(ids_D.device))):
            self.tally.reranks += 1

    def _judgeable(self) -> bool:
        """Whether acceptance has fallen, and enough was served since the last swap to say why."""
        return self._doubt and len(self._since_swap()) >= self.gate.least

    def _since_swap(self) -> list[Trace]:
        """What neither the version that serves nor the one before it has learnt from."""
        return self.buffer.whole_since(self._swapped_at)[-self.buffer.held_out :]

    def _look_back(self) -> None:
        self._looking = True
        try:
            self._reconsider()
        finally:
            self._looking = False
            self._hold()

    def _reconsider(self) -> None:
        """Rolls back when it was asked for; and when live acceptance has fallen, unless the version before is not shown
        to be better on the requests since: then the traffic has changed, not the draft, and there is much to learn."""
        asked, self._asked = self._asked == self.serving, None
        doubted, self._doubt = self._doubt, False
        previous = self.previous
        if not asked and not doubted:  # the version that was meant serves no more
            return
        if not asked and (previous is None or self._traffic_changed(previous)):
            self.backoff = 1
            return
        if previous is None:
            return
        withdrawn = self.serving
        if self._put(previous, self.watch.rest):
            self.tally.rollbacks += 1
            self._mark("rollback", previous)
            self.versions.withdraw(withdrawn)

    def _traffic_changed(self, previous: int) -> bool:
        try:
            result = self.updater.run(self._job(Lot([], [], self._since_swap(), []), previous))
            if result.error is not None:
                raise CheckpointError(result.error)
        except LimbeckError as error:
            self._failed(error)
            return False
        return result.verdict.kind != "better"
