"""What live traffic teaches: the target's distributions at verified positions, kept as the verify pass shows them.

Nothing here runs a model. A position is the index of a token (see `decoding.requests`); the distribution kept for it is
the one that this token is drawn from, at temperature 1, unfiltered: the `top` likeliest tokens and the mass outside
them. What a student's acceptance sum_v min(p, q) can be wrong by for the missing tokens is at most that mass.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.decoding.requests import Observed
from limbeck.online.coins import coin
from limbeck.ops.sparse import top_k

Positions = Literal["rejected", "all"]
Role = Literal["train", "stop", "gate"]
Array = NDArray[Any]

_CHOICES = (8, 16, 32, 64, 128, 256)
_SEEN = 256  # positions whose tails choose `top`
_ENTRY_BYTES = 200  # of a trace's own fields, about


@dataclass(frozen=True, eq=False)
class Trace:
    """One request: its `tokens` up to the last position kept, once. At position `positions[n]`: the ids and
    log-probabilities (float16) of the target's likeliest tokens, and its log mass outside them (float32).

    `role`: to train on, to stop training by, or for the gate. `columns_TF`: the target's hidden states of the columns
    [0, T), as bfloat16 seen as int16. `until`: when it must be forgotten, of `time.time()`. `number`: its own,
    the higher the later the request has ended.
    """

    number: int
    id: str
    tokens: Array
    positions: Array
    ids_NK: Array
    logprobs_NK: Array
    tail_N: Array
    role: Role
    until: float
    columns_TF: Array | None = None

    @property
    def size(self) -> int:
        return len(self.positions)

    @property
    def bytes(self) -> int:
        arrays = (self.tokens, self.positions, self.ids_NK, self.logprobs_NK, self.tail_N, self.columns_TF)
        return _ENTRY_BYTES + sum(array.nbytes for array in arrays if array is not None)


@dataclass(eq=False)
class _Growing:
    """A request that is still served."""

    tokens: Any
    role: Role
    keep: bool
    born: float
    positions: list[int] = field(default_factory=list[int])
    pieces: list[tuple[Array, Array, Array]] = field(default_factory=list[tuple[Array, Array, Array]])
    columns: list[Array] = field(default_factory=list[Array])
    bytes: int = 0
    dropped: bool = False  # too old or too much: what is still to come of it would not be whole


class Buffer:
    """The observer of an engine, for one draft.

    positions: `rejected` keeps, of each pass, the index whose drafted token was rejected (where nothing was drafted:
    the one that was written); `all` keeps every verified one. Requests with `keep_all` keep all of theirs, for gate and
    stop in turn; when newer ones have taken their place there (`held_out` of each), they are trained on.
    top: how many tokens of a distribution; None: the fewest of 8, 16, ..., 256 whose tail is at most `error` in the
    mean over the first positions, which is how far the mean acceptance measured here can be off.
    most_bytes, seconds: bounds; the oldest go first. taps: whether the draft reads the target's hidden states: they are
    kept, and no position before index 2, where it drafts nothing.
    replay: how many traces that are trained on are kept beside the newest (a uniform sample: Vitter's algorithm R).

    `observe` and `close` are called from one thread, the rest from any.
    """

    def __init__(
        self,
        *,
        positions: Positions = "rejected",
        top: int | None = None,
        error: float = 0.01,
        most_bytes: int = 256 << 20,
        seconds: float = 3600.0,
        held_out: int = 24,
        replay: int = 0,
        taps: bool = False,
        seed: int = 0,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.keeps: Positions = positions
        self.top, self.error = top, error
        self.most_bytes, self.seconds = most_bytes, seconds
        self.held_out, self.replay = held_out, replay
        self.taps, self.seed, self.now = taps, seed, now
        self.traces: deque[Trace] = deque()
        self.held: dict[Role, deque[Trace]] = {"stop": deque(), "gate": deque()}
        self.past: list[Trace] = []
        self.new = 0  # positions to train on since the last `take`
        self._fresh = 0  # and their traces
        self.count = self.apart_count = self.offered = 0
        self.tail_sum, self.seen = 0.0, 0
        self._tails = [0.0] * len(_CHOICES)
        self._growing: OrderedDict[str, _Growing] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    # -- from the engine ---------------------------------------------------------------------------------------------

    def observe(self, row: Observed) -> None:
        """Keeps what this row shows. The logits are read here and now, never later."""
        with self._lock:
            growing = self._growing.get(row.request.id) or self._begin(row)
            if not growing.dropped:
                self._keep(growing, row)

    def _keep(self, growing: _Growing, row: Observed) -> None:
        if row.hidden_TF is not None and self.taps:
            piece = row.hidden_TF.detach().to(torch.bfloat16).cpu().view(torch.int16).numpy().copy()
            growing.columns.append(piece)
            growing.bytes += piece.nbytes
        places = self._places(row, growing.keep)
        if len(places):
            piece = self._compress(row.logits_nV[places[0] : places[-1] + 1])
            growing.pieces.append(piece)
            growing.positions += [row.start + place for place in places]
            growing.bytes += sum(array.nbytes for array in piece) + 4 * len(places)

    def _begin(self, row: Observed) -> _Growing:
        role: Role = "train"
        if row.request.keep_all:
            role = "stop" if self.apart_count % 2 else "gate"
            self.apart_count += 1
        growing = self._growing[row.request.id] = _Growing(row.tokens, role, row.request.keep_all, self.now())
        return growing

    def _places(self, row: Observed, keep: bool) -> range:
        """Which of the row's n distributions are kept: always a run of them."""
        if self.taps and row.start < 2:  # no draft that reads hidden states has two tokens before it
            return range(0)
        if keep or self.keeps == "all":
            return range(row.verified or 1)
        if row.rejected is not None:
            return range(row.accepted, row.accepted + 1)
        return range(0) if row.verified else range(1)

    def _compress(self, logits_nV: Tensor) -> tuple[Array, Array, Array]:
        """(ids, log-probabilities, log tail) of these rows."""
        logprobs_nV = logits_nV.float().log_softmax(-1)
        most = min(self.top or _CHOICES[-1], logprobs_nV.shape[1])
        kept = top_k(logprobs_nV, most)
        self.tail_sum += float(kept.tail_logprob_N.exp().sum())
        self.seen += len(logprobs_nV)
        if self.top is None:
            self._choose_top(kept.logprobs_NK)
        return (
            kept.tokens_NK.to(torch.int32).cpu().numpy(),
            kept.logprobs_NK.to(torch.float16).cpu().numpy(),
            kept.tail_logprob_N.cpu().numpy(),
        )

    def _choose_top(self, logprobs_nK: Tensor) -> None:
        """The first positions are kept with the most tokens; when there are enough of them, they choose `top`."""
        mass_nK = logprobs_nK.exp().cumsum(-1)
        for place, top in enumerate(_CHOICES):
            column = min(top, mass_nK.shape[1]) - 1
            self._tails[place] += float((1 - mass_nK[:, column]).clamp(min=0).sum())
        if self.seen >= _SEEN:
            fits = [top for top, tail in zip(_CHOICES, self._tails, strict=True) if tail <= self.error * self.seen]
            self.top = fits[0] if fits else _CHOICES[-1]

    def close(self, id: str) -> None:
        """This request has ended: what it showed becomes a trace."""
        with self._lock:
            growing = self._growing.pop(id, None)
            if growing is not None and growing.positions:
                self._file(self._trace(id, growing))
            self._shrink()

    def _trace(self, id: str, growing: _Growing) -> Trace:
        last = growing.positions[-1]
        ids_NK, logprobs_NK, tail_N = joined(growing.pieces)
        columns_TF = np.concatenate(growing.columns)[:last] if growing.columns else None
        tokens = np.array(growing.tokens[: last + 1], np.int32)
        positions = np.array(growing.positions, np.int32)
        self.count += 1
        until = growing.born + self.seconds
        return Trace(self.count, id, tokens, positions, ids_NK, logprobs_NK, tail_N, growing.role, until, columns_TF)

    def _file(self, trace: Trace) -> None:
        self._bytes += trace.bytes
        if trace.role == "train":
            self._release(trace)
            return
        held = self.held[trace.role]
        held.append(trace)
        if len(held) > self.held_out:
            self._release(replace(held.popleft(), role="train"))

    def _release(self, trace: Trace) -> None:
        """It is trained on from now on, and may be remembered for replay."""
        self.traces.append(trace)
        self.new += trace.size
        self._fresh += 1
        self.offered += 1
        if len(self.past) < self.replay:
            self.past.append(trace)
        elif self.replay:
            place = int(coin(self.seed, "replay", self.offered) * self.offered)
            if place >= self.replay:
                return
            self._bytes -= self.past[place].bytes
            self.past[place] = trace
        else:
            return
        self._bytes += trace.bytes

    # -- bounds ------------------------------------------------------------------------------------------------------

    def expire(self) -> None:
        """Forgets what is too old or too much."""
        with self._lock:
            self._bound()

    def _bound(self) -> None:
        now = self.now()
        for pool in self._pools():
            for trace in [trace for trace in pool if trace.until <= now]:
                pool.remove(trace)
                self._bytes -= trace.bytes
        for growing in self._growing.values():
            if growing.born + self.seconds <= now:
                _drop(growing)
        self._shrink()

    def _shrink(self) -> None:
        while self.bytes > self.most_bytes:
            pool = next((pool for pool in self._pools() if pool), None)
            if pool is not None:
                self._bytes -= pool[0].bytes
                del pool[0]
                continue
            oldest = next((growing for growing in self._growing.values() if growing.bytes), None)
            if oldest is None:
                break
            _drop(oldest)

    def _pools(self) -> list[deque[Trace] | list[Trace]]:
        return [self.traces, self.past, self.held["stop"], self.held["gate"]]

    # -- what is there -----------------------------------------------------------------------------------------------

    def take(self, positions: int, new: float = float("inf")) -> Lot:
        """To train on, the traces that no lot before this had (where there are none, of all), of which the newest with
        about `new` positions; the held-out ones; and to replay, those before them with about so many `positions`, and
        those remembered. They stay in the buffer."""
        with self._lock:
            self._bound()
            traces = list(self.traces)
            place = len(traces)
            first = place - min(self._fresh or place, place)
            while place > first and new > 0:
                place -= 1
                new -= traces[place].size
            older: dict[int, Trace] = {}
            for trace in reversed(traces[:place]):
                if positions <= 0:
                    break
                older[trace.number] = trace
                positions -= trace.size
            fresh = {trace.number for trace in traces[place:]}
            older |= {trace.number: trace for trace in self.past if trace.number not in fresh}
            self.new = self._fresh = 0
            return Lot(traces[place:], list(self.held["stop"]), list(self.held["gate"]), list(older.values()))

    def whole_since(self, number: int) -> list[Trace]:
        """The traces behind this number that hold all the verified positions of their requests, oldest first."""
        with self._lock:
            self._bound()
            pools = [self.held["stop"], self.held["gate"], *([self.traces] if self.keeps == "all" else [])]
            found = [trace for pool in pools for trace in pool if trace.number > number]
        return sorted(found, key=lambda trace: trace.number)

    @property
    def bytes(self) -> int:
        return self._bytes + sum(growing.bytes for growing in list(self._growing.values()))

    def numbers(self) -> dict[str, float]:
        """Sizes and ages, for the snapshot. `buffer_error`: how far the mean acceptance measured on it may be off."""
        with self._lock:
            traces = [trace for pool in (self.traces, *self.held.values()) for trace in pool]
            born = [trace.until - self.seconds for trace in traces] + [one.born for one in self._growing.values()]
            return {
                "buffer_positions": sum(trace.size for trace in traces),
                "buffer_held": sum(len(pool) for pool in self.held.values()),
                "buffer_bytes": self.bytes,
                "buffer_age_s": self.now() - min(born) if born else 0.0,
                "buffer_error": self.tail_sum / self.seen if self.seen else 0.0,
            }


@dataclass(frozen=True, eq=False)
class Lot:
    """What one update is made of: see `Buffer.take`."""

    train: list[Trace]
    stop: list[Trace]
    gate: list[Trace]
    replay: list[Trace]


def joined(pieces: Iterable[tuple[Array, Array, Array]]) -> tuple[Array, Array, Array]:
    """Side by side, as wide as the narrowest: what is cut off goes to the tail."""
    pieces = list(pieces)
    width = min(ids.shape[1] for ids, _, _ in pieces)
    tails = [np.logaddexp(tail, _logsum(logprobs[:, width:])) for _, logprobs, tail in pieces]
    ids_NK = np.concatenate([ids[:, :width] for ids, _, _ in pieces])
    logprobs_NK = np.concatenate([logprobs[:, :width] for _, logprobs, _ in pieces])
    return ids_NK, logprobs_NK, np.concatenate(tails).astype(np.float32)


def _logsum(logprobs_NK: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.log(np.exp(logprobs_NK.astype(np.float32)).sum(-1))


def _drop(growing: _Growing) -> None:
    growing.positions.clear()
    growing.pieces.clear()
    growing.columns.clear()
    growing.bytes, growing.dropped = 0, True
