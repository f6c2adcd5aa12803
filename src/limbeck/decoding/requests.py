"""What the speculative engine takes, gives, and shows of each round.

Indices: token i of a request is the i-th of prompt and completion together, from 0. The distribution *at* index i is
the one that token i is drawn from: the target computes it from the tokens [0, i).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from limbeck.decoding.sampler import Sampling

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Request:
    """One completion to write. `sampling.n` is 1: a caller that wants several adds several, with `sample` 0, 1, ...

    `sampling.seed`, `stream` and `sample` fix the random numbers, whatever else is served beside it (as in `generate`).
    Which tokens they draw depends on what is drafted, too: a sampled completion repeats where its drafts do (they do
    not with a controller that measures, or n-grams of other requests), its distribution is the same in any case.
    `route` names the draft, None: the controller's choice. `train` false keeps the request out of every observation.
    `keep_all` is not read here: it tells the observer to keep all verified positions, not the rejected alone.
    """

    id: str
    tokens: tuple[int, ...]
    sampling: Sampling
    stream: tuple[int, ...] = ()
    sample: int = 0
    route: str | None = None
    train: bool = True
    keep_all: bool = False


@dataclass
class Counters:
    """What drafting did for one request. `drafted`, `accepted`: tokens; the bonus token is neither. `verified`:
    positions at which a drafted token was judged, the first rejected one included, none after the end of the
    completion; `alpha_sum`: over them, sum_v min(p, q) as served, so that alpha = alpha_sum / verified. `rounds`:
    target passes that gave it a token, the last one over its prompt included."""

    drafted: int = 0
    accepted: int = 0
    verified: int = 0
    rounds: int = 0
    alpha_sum: float = 0.0


@dataclass(frozen=True)
class Event:
    """New tokens of one request, with their log-probabilities by the target (temperature 1, unfiltered, nats).

    The last event has a `finish_reason`, and `counters`; its `tokens` may be empty (`cancelled`, `error`). The stop
    token, and the token that completes a stop string, stay in `tokens`. `error`: why, in one line.
    """

    id: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason | None = None
    counters: Counters | None = None
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Observed:
    """One request in one pass of the target: the `n` indices start, ..., start + n - 1 that its tokens were taken from.

    tokens: prompt and completion so far, these n included. The engine's own list, which grows later: never changed
        before its end, and not copied.
    logits_nV: the target's raw logits at these indices (float32, temperature 1, before penalties and filters, without
        padding rows). A view of the round's tensor: compress it or copy it at once.
    drafted: the draft's tokens for start, start + 1, ...; the first `accepted` of them became tokens. Those at the
        first `verified` indices were judged; of the index after (bonus, or no draft at all) only the target's
        distribution is known. Tokens drafted behind the end of the completion are not here.
    alpha, alpha_raw: sum_v min(p, q) at each verified index, as served, and at temperature 1 unfiltered.
    hidden_TF: where any draft reads the target's hidden states, those of all layers of `Engine.taps` side by side in
        that order (a draft reads those of its own `taps`), at the columns that the pass has read for good, which are
        [start + n - 1 - T, start + n - 1). Column c holds what the target makes of the tokens [0, c], from which it
        predicts index c + 1: the last n rows belong to the n indices. T is n, but for the first token the prompt's
        length, however many passes have read it: the pieces of a request follow each other without gap. A view too.
    draft, version: who drafted; None and 0 where nobody did.
    """

    request: Request
    tokens: Sequence[int]
    start: int
    logits_nV: torch.Tensor
    drafted: tuple[int, ...] = ()
    accepted: int = 0
    alpha: tuple[float, ...] = ()
    alpha_raw: tuple[float, ...] = ()
    hidden_TF: torch.Tensor | None = None
    draft: str | None = None
    version: int = 0

    @property
    def verified(self) -> int:
        return len(self.drafted)

    @property
    def rejected(self) -> int | None:
        """The index whose drafted token was rejected, or None."""
        return self.start + self.accepted if self.accepted < len(self.drafted) else None


@dataclass(frozen=True, eq=False)
class Observation:
    """What one pass of the target showed, for every request in it whose `train` is true."""

    rows: list[Observed] = field(default_factory=list[Observed])


Observer = Callable[[Observation], None]
