"""A draft without a model: what followed the last tokens when they stood there before, in the same text (prompt lookup)
or in another request's (a cache that all requests share). It costs nothing, and pays where text repeats itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic

from torch import Tensor

from limbeck.decoding.drafts import GoOn, Proposal
from limbeck.decoding.live import Live
from limbeck.errors import ModelError

_LONGEST = 32  # matched tokens that are counted
_KEYS = 100_000  # requests whose random numbers are remembered: more than go into the cache in its time

Index = dict[tuple[int, ...], tuple[Sequence[int], int]]
"""For the tokens of an n-gram: the text that holds it, and the place after it there."""


@dataclass(eq=False)
class _Own:
    """The n-grams of one request's text, of which the first `seen` places are indexed."""

    seen: int = 0
    index: dict[tuple[int, ...], int] = field(default_factory=dict[tuple[int, ...], int])


class NgramDraft:
    """`size`: tokens that must match, at least. The shared cache keeps at most `shared_tokens` tokens of requests that
    have ended, each for `shared_seconds` (0 tokens: no cache); none of a request whose `train` is false.

    With such a cache the other traffic decides what is proposed, and so which of the tokens that the target's
    distribution allows a seeded request is given: the distribution is the same, the completion may be another. That
    holds where the proposals do not depend on the request's own random numbers. A sampled request is given nothing of
    the cache once another one with the same seed, stream and sample has gone into it, whose text they have drawn.
    """

    version = 0
    taps: tuple[int, ...] = ()
    ids_D: Tensor | None = None

    def __init__(self, *, size: int = 3, shared_tokens: int = 200_000, shared_seconds: float = 3600.0) -> None:
        self.size = size
        self.shared_tokens = shared_tokens
        self.shared_seconds = shared_seconds
        self.benched = False
        self.own: dict[Live, _Own] = {}
        self.shared: Index = {}
        self.kept: deque[tuple[float, list[int]]] = deque()  # when a request ended, its tokens
        self.kept_tokens = 0
        self.drawn: dict[tuple[int, int], None] = {}  # the keys of the sampled requests in it, and of some before

    def bind(self, vocabulary: int, context: int | None = None) -> None:
        """It knows no vocabulary: it repeats tokens that it has seen."""

    def open(self, row: Live) -> None:
        self.own[row] = _Own()

    def behind(self, row: Live) -> int:
        return 0

    def settle(self, row: Live, known: int, hidden_TF: Tensor | None) -> None:
        """It has no state that a rejection could spoil."""

    def move(self, source: int, target: int) -> None:
        """It has no slots."""

    def prepare(self, state: Mapping[str, Tensor], version: int) -> Callable[[], None]:
        raise ModelError("n-gram draft: expected no weights, found some: it has none to swap")

    def close(self, row: Live) -> None:
        del self.own[row]
        if not row.request.train or len(row.tokens) > self.shared_tokens:
            return
        if row.request.sampling.temperature > 0:
            self.drawn.pop(row.keys[0], None)
            self.drawn[row.keys[0]] = None
            if len(self.drawn) > _KEYS:
                del self.drawn[next(iter(self.drawn))]
        now = monotonic()
        self.kept.append((now, row.tokens))
        self.kept_tokens += len(row.tokens)
        for end in range(self.size, len(row.tokens)):
            self.shared[tuple(row.tokens[end - self.size : end])] = (row.tokens, end)
        self.expire(now)

    def expire(self, now: float | None = None) -> None:
        """Forgets the oldest texts, beyond the bounds in tokens and seconds."""
        before = (monotonic() if now is None else now) - self.shared_seconds
        while self.kept and (self.kept_tokens > self.shared_tokens or self.kept[0][0] < before):
            _, tokens = self.kept.popleft()
            self.kept_tokens -= len(tokens)
            for end in range(self.size, len(tokens)):
                key = tuple(tokens[end - self.size : end])
                if key in self.shared and self.shared[key][0] is tokens:
                    del self.shared[key]

    def look_up(self, row: Live, most: int) -> tuple[Sequence[int], int]:
        """(at most `most` tokens that followed the same tokens before, how many of these matched)."""
        own, tokens = self.own[row], row.tokens
        for end in range(max(own.seen, self.size), len(tokens)):
            own.index[tuple(tokens[end - self.size : end])] = end
        own.seen = max(own.seen, len(tokens))
        key = tuple(tokens[-self.size :])
        self.expire()
        found: tuple[Sequence[int], int] = ((), 0)
        places = [(tokens, own.index[key])] if key in own.index else []
        drawn = row.request.sampling.temperature > 0 and row.keys[0] in self.drawn
        places += [self.shared[key]] if key in self.shared and not drawn else []
        for text, place in places:
            length = self.size
            while length < min(_LONGEST, place, len(tokens)) and text[place - length - 1] == tokens[-length - 1]:
                length += 1
            if length > found[1]:
                found = (text[place : place + most], length)
        return found

    def propose(self, rows: Sequence[Live], most: Sequence[int], go_on: GoOn) -> Proposal:
        proposal = Proposal(rows, [], [])
        for row, count in zip(rows, most, strict=True):
            tokens, length = self.look_up(row, count)
            proposal.tokens.append(list(tokens))
            proposal.confidence.append([ngram_confidence(length)] * len(tokens))
        return proposal


def ngram_confidence(length: int) -> float:
    """A guess from the number of tokens that matched, for a controller to correct."""
    return length / (length + 2)
