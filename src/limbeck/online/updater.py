"""The process that trains a draft: its own weights and optimiser, its own share of the time, killed without harm."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import CheckpointError, LimbeckError
from limbeck.models import fingerprint
from limbeck.online.buffer import Lot, Trace
from limbeck.online.gate import Gate, Verdict
from limbeck.online.learner import (
    Average,
    Fitted,
    Idle,
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
from limbeck.online.versions import Version, Versions

LOG = logging.getLogger(__name__)
Build = Callable[[], Learner]
"""Makes the learner with its first weights, in the other process: a function of a module, or a `partial` of one."""

_BUSY, _SHARE, _END, _WORKED, _HELD = range(5)  # of the numbers that both processes see
_NAP = 0.005  # s
_OWN = "own/"  # before the names of weights that are trained, beside those that serve: see `Average`
_GAIN = 0.01  # of acceptance
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
    """Starts the process at the first job, and again when it has died. From the first job on whose share is bounded, it
    is nice to others. One thread uses it; `set_busy`, `set_share`, `set_held` and `end` may be called from any."""

    def __init__(
        self, build: Build, folder: str | Path, training: Training, gate: Gate, *, threads: int, seed: int = 0
    ) -> None:
        self.context = _context()
        self.numbers: Any = self.context.RawArray("d", 5)
        self.numbers[_SHARE] = 1.0
        self.arguments = (build, str(folder), training, gate, threads, seed)
        self.process: Any = None
        self.begun = False  # the process has its weights
        self.restarts = -1
        self.connection: Any = None

    def set_busy(self, busy: bool) -> None:
        """Whether requests are being served: then training takes its share of the time alone."""
        self.numbers[_BUSY] = busy

    def set_share(self, share: float) -> None:
        """Training's most share of the time while requests are served; 1: no bound."""
        self.numbers[_SHARE] = share

    def set_held(self, held: bool) -> None:
        """Whether the work of a job stands still, busy or not."""
        self.numbers[_HELD] = held

    @property
    def worked(self) -> float:
        """Seconds of a core since the beginning, of all processes."""
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
        self.begun = False
        self.process = self._started()  # one that `end` can end
        try:
            error = self._answer().error
        except (OSError, EOFError) as lost:
            raise UpdaterLost(
                f"expected an updater that starts, found its process gone ({lost}): see its log"
            ) from None
        if error is not None:
            raise CheckpointError(error)
        self.begun = True

    def _started(self) -> Any:
        """A process at the other end of the connection. The first of all is forked only when the library is loaded,
        which whoever ends this server need not wait for: UpdaterLost."""
        self.connection, theirs = self.context.Pipe()
        process: Any = self.context.Process(
            target=_main, args=(theirs, self.numbers, *self.arguments), name="limbeck-updater", daemon=True
        )
        starting = threading.Thread(target=process.start, name="limbeck-updater-start", daemon=True)
        starting.start()
        while starting.is_alive():
            if self.numbers[_END]:
                self.connection.close()  # a process that starts after all finds nobody, and goes
                raise UpdaterLost("expected an updater that starts, found it told to end")
            starting.join(0.1)
        if process.pid is None:
            raise UpdaterLost("expected an updater that starts, found that no process could be made: see the log")
        theirs.close()
        return process

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
            if not self.begun:  # it loads a library for seconds, and has nothing to lose
                self.process.kill()
            self.process.join(_GRACE)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()


def _context() -> Any:
    """Where the system lets it, updaters are forks of one process that has imported this module and run nothing: the
    second draft's, or one in the place of one that was killed, need not load it again."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class _Told(Exception):
    """To end in the middle of a job."""


@dataclass
class Throttle:
    """Holds the work back while others are served: of that time it takes `share` of a core at most, counted from the
    last `start` on; idle time is free. `spent`: seconds of a core, since one that waits for others' work takes none."""

    numbers: Any
    alive: Callable[[], bool]
    now: Callable[[], float] = time.perf_counter
    spent: Callable[[], float] = time.process_time
    sleep: Callable[[float], None] = time.sleep
    worked: float = 0.0
    passed: float = 0.0
    last: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        self.worked = self.passed = 0.0
        self.last = self.now(), self.spent()

    def __call__(self) -> None:
        passed, worked = self.now() - self.last[0], self.spent() - self.last[1]
        self.numbers[_WORKED] += worked
        if self.numbers[_BUSY]:
            self.worked += worked
            self.passed += passed
        while True:
            if self.numbers[_END] or not self.alive():
                raise _Told
            start, held = self.now(), self.numbers[_HELD]
            if not held and (not self.numbers[_BUSY] or self.worked <= self.numbers[_SHARE] * self.passed):
                break
            self.sleep(_NAP)
            if not held:
                self.passed += self.now() - start
        self.last = self.now(), self.spent()


@dataclass(eq=False)
class Worker:
    """What the process does with a job. `base`: the version that its weights came from. Training that finds nothing
    better is followed by a third of the learning rate, and training that gains by three times as much again: what
    teaches a draft from nothing ruins one that was trained before."""

    learner: Learner
    versions: Versions
    training: Training
    gate: Gate
    seed: int
    breathe: Any
    idle: Idle = lambda: False
    base: int = 0
    generator: torch.Generator = field(default_factory=torch.Generator)
    serving: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    optimiser: Any = None
    average: Average = field(default_factory=Average)
    known: dict[int, tuple[float, int]] = field(default_factory=dict[int, tuple[float, int]])  # of the serving version
    rate: float = 1.0  # times the learning rate

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.seed)
        self.optimiser = optimiser_of(self.learner, self.training)
        self.versions.claim(fingerprint(self.learner.trained()))
        newest = self.versions.newest()
        if newest is None:
            self.serving = snapshot(self.learner)
            self.versions.save(self._version(self.versions.next()))
        else:
            self.rate = float(self._take(newest)["rate"])

    def run(self, job: Job) -> Result:
        if not same_tokens(job.ids, self.learner.ids_D):
            self.learner.ids_D, self.known = job.ids, {}
        if job.serving != self.base:
            self._take(job.serving)
        gate = job.lot.gate
        if job.other is not None:
            return self._compare(gate, job.other)
        serving = self._of_serving(gate)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * self.training.learning_rate
        fitted = fit(
            self.learner,
            self.optimiser,
            job.lot.train,
            job.lot.stop,
            self.training,
            self.generator,
            replay=job.lot.replay,
            average=self.average,
            breathe=self.breathe,
            idle=self.idle,
        )
        self.rate = next_rate(self.rate, fitted)
        found = acceptances(self.learner, gate, self.training.batch_tokens, self.breathe)
        known = mean_known(self.learner, job.lot.train + gate)
        verdict = self._judge(gate, serving, found)
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
        return Result(self._judge(gate, serving, found))

    def _judge(
        self, gate: list[Trace], serving: Mapping[int, tuple[float, int]], found: Mapping[int, tuple[float, int]]
    ) -> Verdict:
        """The newest first: where traffic changes, they are what it is now."""
        numbers = [trace.number for trace in reversed(gate)]
        return self.gate.judge([serving[number][0] for number in numbers], [found[number][0] for number in numbers])

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
        state = optimiser_state(self.learner, self.optimiser)
        state |= {"generator": self.generator.get_state(), "rate": torch.tensor(self.rate)}
        weights = snapshot(self.learner)
        own = self.average.own or weights
        state |= {"averaged": torch.tensor(self.average.steps), **{_OWN + name: own[name].clone() for name in own}}
        return Version(number, weights, state, {"objective": self.training.objective})

    def _take(self, number: int) -> dict[str, Tensor]:
        """Weights, optimiser and random numbers of a version on disk; gives all its state. CheckpointError for one
        that an older limbeck wrote, whose state lacks some of that."""
        version = self.versions.load(number)
        lacking = {"averaged", "generator", "rate", *(_OWN + name for name in version.weights)} - set(version.state)
        if lacking:
            raise CheckpointError(
                f"{self.versions.folder}: expected versions that training can go on from, found version {number} "
                f"without {min(lacking)!r}, as an older limbeck wrote them: name another folder, or serve them with "
                "--no-learning"
            )
        restore(self.learner, version.weights)
        set_optimiser_state(self.learner, self.optimiser, version.state)
        own = {name: version.state[_OWN + name] for name in version.weights}
        self.average = Average(own, int(version.state["averaged"]))
        self.generator.set_state(version.state["generator"])
        self.base, self.serving, self.known = number, snapshot(self.learner), {}
        return version.state


def next_rate(rate: float, fitted: Fitted) -> float:
    """See `Worker`; within 1/1000 and 1."""
    if fitted.before is None or fitted.after is None:
        return rate
    gain = fitted.after - fitted.before
    return min(3 * rate, 1.0) if gain >= _GAIN else max(rate / 3, 1e-3) if gain <= 0 else rate


def same_tokens(one_D: Tensor | None, other_D: Tensor | None) -> bool:
    """Whether two reduced vocabularies (None: the whole one) are the same."""
    if one_D is None or other_D is None:
        return one_D is other_D
    return torch.equal(one_D, other_D)


def _main(
    connection: Any,
    numbers: Any,
    build: Build,
    folder: str,
    training: Training,
    gate: Gate,
    threads: int,
    seed: int,
) -> None:
    """The process: jobs in, results out, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who serves decides
    torch.set_num_threads(threads)
    parent: Any = multiprocessing.parent_process()
    breathe = Throttle(numbers, parent.is_alive)
    try:
        try:
            worker = Worker(build(), Versions(folder), training, gate, seed, breathe, idle=lambda: not numbers[_BUSY])
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
    if breathe.numbers[_SHARE] < 1:  # beside busy servers a nice process gets next to nothing: not while it is cold
        os.nice(max(_NICE - os.nice(0), 0))
    breathe.start()
    try:
        result = worker.run(job)
    except LimbeckError as error:
        result = replace(_NOTHING, error=str(error))
    breathe()
    connection.send(result)
