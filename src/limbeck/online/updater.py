"""The process that trains a draft: its own weights and optimiser, its own share of the time, killed without harm."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import CheckpointError, LimbeckError
from limbeck.online.buffer import Lot, Trace
from limbeck.online.gate import Gate, Verdict
from limbeck.online.learner import (
    Learner,
    Training,
    acceptances,
    fit,
    mean_known,
    optimiser_of,
    optimiser_state,
    restore,
    set_optimiser_state,
    snapshot,
)
from limbeck.online.versions import Version, Versions, fingerprint

LOG = logging.getLogger(__name__)
Build = Callable[[], Learner]
"""Makes the learner with its first weights, in the other process: a function of a module, or a `partial` of one."""

_BUSY, _SHARE, _END, _WORKED = range(4)  # of the numbers that both processes see
_NAP = 0.005  # s
_NICE = 10
_GRACE = 20.0  # s: told to end, it is gone in a fraction of one, but its niceness lets a busy machine make it wait


@dataclass(frozen=True, eq=False)
class Job:
    """Train on `lot`, from the version that serves (or from where the last job ended, if it began there too), and gate;
    or, with `other`, only compare that version with the one that serves, on the gate's traces. `ids`: the tokens that
    the draft may draft."""

    serving: int
    lot: Lot
    other: int | None = None
    ids: Tensor | None = None


@dataclass(frozen=True)
class Result:
    """What came of a job. `number`: the version that passed the gate, on disk. `before`, `after`: acceptance on the
    traces to stop by; the gate's own are in `verdict`. `known`: p(D), the target's
    mean mass on the tokens that the draft may draft."""

    verdict: Verdict
    number: int | None = None
    before: float | None = None
    after: float | None = None
    known: float | None = None
    error: str | None = None


_NOTHING = Result(Verdict("undecided", 0.0, 1.0, 0))


class UpdaterLost(LimbeckError):
    """The process ended before it answered."""


class Updater:
    """Starts the process at the first job, and again when it has died. One thread uses it; `set_busy`, `set_share` and
    `end` may be called from any."""

    def __init__(
        self, build: Build, folder: str | Path, training: Training, gate: Gate, *, threads: int, seed: int = 0
    ) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.numbers: Any = self.context.RawArray("d", 4)
        self.numbers[_SHARE] = 1.0
        self.arguments = (build, str(folder), training, gate, threads, seed)
        self.process: Any = None
        self.restarts = -1
        self.connection: Any = None

    def set_busy(self, busy: bool) -> None:
        """Whether requests are being served: then training takes its share of the time alone."""
        self.numbers[_BUSY] = busy

    def set_share(self, share: float) -> None:
        """Training's most share of the time while requests are served; 1: no bound."""
        self.numbers[_SHARE] = share

    @property
    def worked(self) -> float:
        """Seconds of work since the beginning, of all processes."""
        return self.numbers[_WORKED]

    def run(self, job: Job) -> Result:
        """Waits for the result. UpdaterLost where the process died, or was told to end."""
        self.ready()
        try:
            self.connection.send(job)
            return self._answer()
        except (OSError, EOFError) as error:
            raise UpdaterLost(
                f"expected the updater's answer, found its process gone ({error}): it is restarted"
            ) from None

    def ready(self) -> None:
        """Starts the process if none lives, and waits until it has its weights. CheckpointError where the versions are
        another draft's, UpdaterLost where it dies."""
        if self.process is not None and self.process.is_alive():
            return
        self.restarts += 1
        self.connection, theirs = self.context.Pipe()
        self.process = self.context.Process(
            target=_main, args=(theirs, self.numbers, os.getpid(), *self.arguments), name="limbeck-updater", daemon=True
        )
        self.process.start()
        theirs.close()
        try:
            error = self._answer().error
        except (OSError, EOFError) as lost:
            raise UpdaterLost(
                f"expected an updater that starts, found its process gone ({lost}): see its log"
            ) from None
        if error is not None:
            raise CheckpointError(error)

    def _answer(self) -> Result:
        while not self.connection.poll(0.1):
            if self.numbers[_END]:
                raise UpdaterLost("expected the updater's answer, found it told to end")
        return self.connection.recv()

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self.numbers[_END] = 1
        if self.process is not None:
            self.connection.close()  # an idle one waits for nothing else
            self.process.join(_GRACE)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()


class _Told(Exception):
    """To end in the middle of a job."""


@dataclass
class Throttle:
    """Holds the work back while others are served: of that time it takes `share` at most, counted from the last `start`
    on; idle time is free."""

    numbers: Any
    parent: int
    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    worked: float = 0.0
    passed: float = 0.0
    last: float = 0.0

    def start(self) -> None:
        self.worked = self.passed = 0.0
        self.last = self.now()

    def __call__(self) -> None:
        took = self.now() - self.last
        self.numbers[_WORKED] += took
        if self.numbers[_BUSY]:
            self.worked += took
            self.passed += took
        while True:
            if self.numbers[_END] or os.getppid() != self.parent:
                raise _Told
            start = self.now()
            if not self.numbers[_BUSY] or self.worked <= self.numbers[_SHARE] * self.passed:
                break
            self.sleep(_NAP)
            self.passed += self.now() - start
        self.last = self.now()


@dataclass(eq=False)
class Worker:
    """What the process does with a job. `base`: the version that its weights came from."""

    learner: Learner
    versions: Versions
    training: Training
    gate: Gate
    seed: int
    breathe: Any
    base: int = 0
    generator: torch.Generator = field(default_factory=torch.Generator)
    serving: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    optimiser: Any = None
    known: dict[int, tuple[float, int]] = field(default_factory=dict[int, tuple[float, int]])  # of the serving version

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.seed)
        self.optimiser = optimiser_of(self.learner, self.training)
        self.versions.claim(fingerprint(self.learner.trained()))
        newest = self.versions.newest()
        if newest is None:
            self.serving = snapshot(self.learner)
            self.versions.save(self._version(self.versions.next()))
        else:
            self._take(newest)

    def run(self, job: Job) -> Result:
        if not same_tokens(job.ids, self.learner.ids_D):
            self.learner.ids_D, self.known = job.ids, {}
        if job.serving != self.base:
            self._take(job.serving)
        gate = job.lot.gate
        if job.other is not None:
            return self._compare(gate, job.other)
        serving = self._of_serving(gate)
        fitted = fit(
            self.learner,
            self.optimiser,
            job.lot.train,
            job.lot.stop,
            self.training,
            self.generator,
            replay=job.lot.replay,
            breathe=self.breathe,
        )
        found = acceptances(self.learner, gate, self.training.batch_tokens, self.breathe)
        known = mean_known(self.learner, job.lot.train + gate)
        verdict = self.gate.judge([serving[trace.number][0] for trace in gate], [found[t.number][0] for t in gate])
        if not fitted.finite:
            verdict = replace(verdict, kind="worse")
        result = Result(verdict, None, fitted.before, fitted.after, known)
        if verdict.kind == "worse":
            self._take(job.serving)
        elif verdict.kind == "better":
            return self._publish(result, found)
        return result

    def _publish(self, result: Result, found: dict[int, tuple[float, int]]) -> Result:
        number = self.versions.next()
        try:
            self.versions.save(self._version(number))
        except CheckpointError as error:
            return replace(result, error=str(error))
        self.base, self.serving, self.known = number, snapshot(self.learner), found
        return replace(result, number=number)

    def _compare(self, gate: list[Trace], other: int) -> Result:
        serving = self._of_serving(gate)
        own = snapshot(self.learner)
        restore(self.learner, self.versions.weights(other))
        found = acceptances(self.learner, gate, self.training.batch_tokens, self.breathe)
        restore(self.learner, own)
        return Result(self.gate.judge([serving[t.number][0] for t in gate], [found[t.number][0] for t in gate]))

    def _of_serving(self, gate: list[Trace]) -> dict[int, tuple[float, int]]:
        """Acceptances of the serving version, whatever the learner's weights are by now."""
        unknown = [trace for trace in gate if trace.number not in self.known]
        own = snapshot(self.learner)
        restore(self.learner, self.serving)
        known = self.known | acceptances(self.learner, unknown, self.training.batch_tokens, self.breathe)
        restore(self.learner, own)
        self.known = {trace.number: known[trace.number] for trace in gate}
        return self.known

    def _version(self, number: int) -> Version:
        state = optimiser_state(self.learner, self.optimiser) | {"generator": self.generator.get_state()}
        return Version(number, snapshot(self.learner), state, {"objective": self.training.objective})

    def _take(self, number: int) -> None:
        """Weights, optimiser and random numbers of a version on disk."""
        version = self.versions.load(number)
        restore(self.learner, version.weights)
        set_optimiser_state(self.learner, self.optimiser, version.state)
        self.generator.set_state(version.state["generator"])
        self.base, self.serving, self.known = number, snapshot(self.learner), {}


def same_tokens(one_D: Tensor | None, other_D: Tensor | None) -> bool:
    """Whether two reduced vocabularies (None: the whole one) are the same."""
    if one_D is None or other_D is None:
        return one_D is other_D
    return torch.equal(one_D, other_D)


def _main(
    connection: Any,
    numbers: Any,
    parent: int,
    build: Build,
    folder: str,
    training: Training,
    gate: Gate,
    threads: int,
    seed: int,
) -> None:
    """The process: jobs in, results out, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who serves decides
    os.nice(_NICE)
    torch.set_num_threads(threads)
    breathe = Throttle(numbers, parent)
    try:
        try:
            worker = Worker(build(), Versions(folder), training, gate, seed, breathe)
        except LimbeckError as error:
            connection.send(replace(_NOTHING, error=str(error)))
            return
        connection.send(_NOTHING)
        while True:
            _answer_one(connection, worker, breathe)
    except (EOFError, OSError, _Told):
        return


def _answer_one(connection: Any, worker: Worker, breathe: Throttle) -> None:
    job: Job = connection.recv()
    breathe.start()
    try:
        result = worker.run(job)
    except LimbeckError as error:
        result = replace(_NOTHING, error=str(error))
    breathe()
    connection.send(result)
