"""Recorded answers replayed through the buffer, the updater's worker and the gate that a server uses: what a draft
would have learnt from them, request by request, without writing anything twice.

What is simulated is drafting alone: at each index a drafted token stands with the probability alpha_raw that it has
there, sum_v min(p, q): exact in the mean over a target's answers at temperature 1, whatever the recorded token is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from limbeck.decoding import Sampling
from limbeck.decoding.requests import Observed, Request
from limbeck.errors import CheckpointError
from limbeck.online import Buffer, Gate, Learner, Pace, Trace, Training, Versions
from limbeck.online.buffer import Positions
from limbeck.online.coins import coin, held_out_of
from limbeck.online.learner import alphas, batch, fit, optimiser_of, restore
from limbeck.online.updater import Job, Worker

_CHUNK = 8  # requests judged side by side: an update serves so many requests late at most
_SAMPLING = Sampling(1)


@dataclass
class Point:
    """One request: alpha over the positions that were verified, how many these are, the version that served."""

    alpha: float
    verified: int
    version: int


@dataclass
class Replay:
    """One draft on a stream, with requests held out as a service does it; training takes no time here, and nothing
    backs off. `remembered`: traces of any earlier time that are kept for replay. `idle`: nobody is served while an
    update trains, which may then take `Training.idle_epochs`."""

    build: Callable[[], Learner]
    vocabulary: int
    folder: Path
    training: Training
    pace: Pace
    gamma: int
    seed: int
    positions: Positions = "all"
    learns: bool = True
    remembered: int = 0
    idle: bool = False
    requests: int = 0
    updates: int = 0
    swaps: int = 0
    gate: Gate = field(default_factory=Gate)

    def __post_init__(self) -> None:
        self.serving = self.build()
        self.version = 0
        self.buffer = Buffer(
            positions=self.positions,
            seconds=float("inf"),
            most_bytes=1 << 32,
            replay=self.remembered,
            seed=self.seed,
        )
        if self.learns:
            learner = self.build()
            restore(learner, self.serving.trained())  # trained on before, maybe
            self.worker = Worker(
                learner,
                Versions(self.folder),
                self.training,
                self.gate,
                self.seed,
                breathe=lambda: None,
                idle=lambda: self.idle,
            )

    def run(self, stream: Sequence[Trace]) -> list[Point]:
        """Serves these requests, in their order."""
        points: list[Point] = []
        for start in range(0, len(stream), _CHUNK):
            chunk = stream[start : start + _CHUNK]
            for trace, alphas_n in zip(chunk, alphas_of(self.serving, chunk), strict=True):
                points.append(self._serve(trace, alphas_n))
            if self.learns:
                self._update()
        return points

    def _serve(self, trace: Trace, alphas_n: np.ndarray) -> Point:
        self.requests += 1
        prompt = tuple(trace.tokens[: trace.positions[0]].tolist())
        keep = held_out_of(self.positions).keeps(self.seed, prompt, hungry=self._hungry)
        request = Request(f"{self.requests}", prompt, _SAMPLING, keep_all=keep)
        judged: list[float] = []
        tokens = trace.tokens.tolist()  # as the engine's own list, of which the buffer takes what it has seen
        for first, drafted, accepted in rounds(alphas_n, self.gamma, self.seed, self.requests):
            judged += alphas_n[first : first + drafted].tolist()
            if self.learns:
                self.buffer.observe(self._observed(request, tokens, trace, first, drafted, accepted))
        self.buffer.close(request.id)
        return Point(float(np.mean(judged)) if judged else 0.0, len(judged), self.version)

    def _observed(
        self, request: Request, tokens: list[int], trace: Trace, first: int, drafted: int, accepted: int
    ) -> Observed:
        written = min(accepted + 1, trace.size - first)
        start = int(trace.positions[first])
        ids = [*trace.tokens[start : start + accepted].tolist(), -1][:drafted]  # the rejected one: any other
        logits_nV = _logits(trace, slice(first, first + written), self.vocabulary)
        return Observed(request, tokens, start, logits_nV, tuple(ids), accepted)

    @property
    def _hungry(self) -> bool:
        return len(self.buffer.held["gate"]) < self.gate.least

    def _update(self) -> None:
        cold = self.updates < 2  # as a draft is that has never served: what it begins with is not known here
        size = self.pace.size(cold=cold, updates=self.updates, backoff=1)
        if self._hungry or self.buffer.new < size:
            return
        result = self.worker.run(Job(self.version, self.pace.take(self.buffer, size), None, self.serving.ids_D))
        if result.error is not None:
            raise CheckpointError(result.error)
        self.updates += 1
        if result.number is not None:
            restore(self.serving, self.worker.serving)
            self.version = result.number
            self.swaps += 1


def rounds(alphas_n: np.ndarray, gamma: int, seed: int, request: int) -> list[tuple[int, int, int]]:
    """(first index, drafted tokens that are judged, those that stand) of each pass of the target over an answer whose
    n tokens have these chances. The first pass, which reads the prompt, judges none."""
    made, first = [(0, 0, 0)], 1
    while first < len(alphas_n):
        most = min(gamma, len(alphas_n) - first)
        accepted = 0
        while accepted < most and coin(seed, f"stands {request}", first + accepted) < alphas_n[first + accepted]:
            accepted += 1
        made.append((first, min(accepted + 1, most), accepted))
        first += accepted + 1
    return made


def _logits(trace: Trace, places: slice, vocabulary: int) -> torch.Tensor:
    """The recorded distributions as logits over the whole vocabulary, their tails spread evenly."""
    ids_NK = torch.from_numpy(trace.ids_NK[places].astype(np.int64))
    tail_N = torch.from_numpy(trace.tail_N[places]).float() - np.log(max(vocabulary - ids_NK.shape[1], 1))
    logits_NV = tail_N[:, None].expand(-1, vocabulary).clone()
    return logits_NV.scatter_(1, ids_NK, torch.from_numpy(trace.logprobs_NK[places].astype(np.float32)))


def alphas_of(learner: Learner, traces: Sequence[Trace]) -> list[np.ndarray]:
    """Of each trace, alpha_raw at each of its positions."""
    alpha_N = alphas(learner, batch(traces)).numpy()
    return np.split(alpha_N, np.cumsum([trace.size for trace in traces])[:-1])


def train_offline(learner: Learner, traces: Sequence[Trace], training: Training, seed: int) -> int:
    """Trains on all positions of these answers, a tenth of them held out to stop by. The steps that were taken."""
    stop = traces[::10]
    train = [trace for place, trace in enumerate(traces) if place % 10]
    generator = torch.Generator().manual_seed(seed)
    return fit(learner, optimiser_of(learner, training), train, stop, training, generator).steps


def acceptance_on(learner: Learner, traces: Sequence[Trace]) -> float:
    """Mean alpha_raw over all positions of these answers."""
    chunks = [traces[place : place + _CHUNK] for place in range(0, len(traces), _CHUNK)]
    return float(np.concatenate([alpha_n for chunk in chunks for alpha_n in alphas_of(learner, chunk)]).mean())
