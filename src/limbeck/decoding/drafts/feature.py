"""A draft of one decoder layer that reads the target's hidden states (see `feature_net`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.decoding.clock import now
from limbeck.decoding.drafts import GoOn, Proposal
from limbeck.decoding.drafts.feature_net import FeatureNet
from limbeck.decoding.drafts.head import DraftHead
from limbeck.decoding.drafts.model import fitted
from limbeck.decoding.drafts.steps import behind, draft_by_steps
from limbeck.decoding.live import Live
from limbeck.decoding.packed import check_packing, install, pack
from limbeck.decoding.pieces import together
from limbeck.decoding.ragged_cache import RaggedCache, causal_mask
from limbeck.errors import PreflightError
from limbeck.models import output_head, unwrap

_LOST = -1  # in place of the columns read: columns are missing, nothing more can be drafted
_MOST_UNREAD = 256  # columns of the target's states that a row keeps, unless its last piece is longer


class FeatureDraft:
    """`net` belongs to the draft from now on, in the target's dtype. weights, ids_D: see `ModelDraft`. The target's
    embedding and output head are used as they are."""

    def __init__(self, net: FeatureNet, target: Any, *, weights: str = "own", ids_D: Tensor | None = None) -> None:
        base: Any = unwrap(target)
        self.embedding: Any = base.get_input_embeddings()
        self.net = net.to(self.embedding.weight).eval()
        check_packing(weights, self.embedding.weight.device)
        self.weights = weights
        self.target_head = output_head(base)
        self.vocabulary = self.target_head.size
        self.head = DraftHead(self.target_head, self.vocabulary, weights, ids_D)
        self.taps = net.shape.taps
        self.cache = RaggedCache()
        self.version = 0
        self.benched = False
        self.read: dict[Live, int] = {}  # columns of its slot made from the target's states
        self.unread: dict[Live, list[Tensor]] = {}
        install(pack(net, weights))

    @property
    def ids_D(self) -> Tensor | None:
        return self.head.ids_D

    def bind(self, vocabulary: int, context: int | None = None) -> None:
        if self.vocabulary != vocabulary:
            raise PreflightError(
                f"feature draft: expected the engine's target, of {vocabulary} tokens, found one of {self.vocabulary}: "
                "make the draft for the target that is served"
            )
        self.cache.bound(context)

    def restrict(self, ids_D: Tensor | None) -> None:
        """From the next round on these tokens alone are drafted, beside those of a request itself (None: all)."""
        self.head = DraftHead(self.target_head, self.vocabulary, self.weights, ids_D)

    def open(self, row: Live) -> None:
        self.read[row] = 0
        self.unread[row] = []
        self.cache.keep(len(self.read))

    def close(self, row: Live) -> None:
        del self.read[row], self.unread[row]
        self.head.close(row)
        self.cache.keep(len(self.read))

    def move(self, source: int, target: int) -> None:
        self.cache.copy_row(source, target)

    def settle(self, row: Live, known: int, hidden_TF: Tensor | None) -> None:
        """Nobody may be asking for drafts of this row: what is too much to keep is read before its time."""
        assert hidden_TF is not None
        if self.read[row] == _LOST:
            return
        if sum(map(len, self.unread[row])) > _MOST_UNREAD:
            if self.benched:
                self._lose(row)
                return
            self._catch_up([row])
        self.unread[row].append(hidden_TF.clone())

    def behind(self, row: Live) -> int:
        return behind(sum(map(len, self.unread[row])))

    def propose(self, rows: Sequence[Live], most: Sequence[int], go_on: GoOn) -> Proposal:
        wanted = {row: count for row, count in zip(rows, most, strict=True) if self.read[row] != _LOST}
        if not wanted:
            return Proposal([], [])
        rows, device = list(wanted), self.embedding.weight.device
        start = now(device)
        read = self._read_ahead(rows)
        read_s = now(device) - start
        proposal = self._drafted(rows, list(wanted.values()), go_on)
        proposal.read, proposal.read_seconds = read, read_s
        return proposal

    def _drafted(self, rows: Sequence[Live], most: Sequence[int], go_on: GoOn) -> Proposal:
        vocabulary = self.head.of(rows)
        state_B1H = torch.zeros(0)

        def first() -> Tensor:
            nonlocal state_B1H
            state_B1H = self._catch_up(rows)
            return vocabulary.logits(self.net.norm(state_B1H[:, 0]))

        def then(newest: list[int], step: int) -> Tensor:
            nonlocal state_B1H
            starts = [len(row.tokens) + step - 2 for row in rows]
            state_B1H = self._run(rows, state_B1H, [[token] for token in newest], starts)
            return vocabulary.logits(self.net.norm(state_B1H[:, 0]))

        return draft_by_steps(rows, most, go_on, first, then, vocabulary)

    def expire(self) -> None:
        """It keeps nothing of a request that has ended."""

    def prepare(self, state: Mapping[str, Tensor], version: int) -> Callable[[], None]:
        new = fitted(dict(self.net.named_parameters()), state)
        packed = pack(self.net, self.weights, new)

        def put() -> None:
            for weight, tensor in new.items():
                weight.data = tensor
            install(packed)
            if self.benched:  # what it has read with its last weights may be NaN, and cannot be read again
                self.cache.forget()
                for row in [row for row, read in self.read.items() if read]:
                    self._lose(row)
            self.version, self.benched = version, False

        return put

    def _lose(self, row: Live) -> None:
        self.read[row] = _LOST
        self.unread[row] = []

    def _read_ahead(self, rows: Sequence[Live]) -> int:
        """Rows that are behind read all but the last of their columns, similar ones together. How many they were."""
        late = [row for row in rows if self.behind(row)]
        counts = [self.behind(row) for row in late]
        for group in together(counts):
            some = [late[place] for place in group]
            features = [torch.cat(self.unread[row]) for row in some]
            for row, piece in zip(some, features, strict=True):
                self.unread[row] = [piece[:-1]]
            self._catch_up(some)
            for row, piece in zip(some, features, strict=True):
                self.unread[row] = [piece[-1:].clone()]
        return sum(counts)

    def _catch_up(self, rows: Sequence[Live]) -> Tensor:
        """Reads what the target has made of these rows since. The states (B, 1, H) of their last columns."""
        starts = [self.read[row] for row in rows]
        features = [torch.cat(self.unread[row]) for row in rows]
        states_BQH = self.net.fuse(
            torch.nn.utils.rnn.pad_sequence(features, batch_first=True).to(self.net.fuse.weight.dtype)
        )
        tokens = [
            row.tokens[start + 1 : start + 1 + len(piece)]
            for row, start, piece in zip(rows, starts, features, strict=True)
        ]
        states_BQH = self._run(rows, states_BQH, tokens, starts)
        for row, start, piece in zip(rows, starts, features, strict=True):
            self.read[row] = start + len(piece)
            self.unread[row] = []
        return states_BQH[range(len(rows)), [len(piece) - 1 for piece in features]][:, None]

    def _run(self, rows: Sequence[Live], states_BQH: Tensor, tokens: list[list[int]], starts: list[int]) -> Tensor:
        """The layer's output (B, Q, H) at the columns from `starts` on."""
        width = states_BQH.shape[1]
        device = states_BQH.device
        padded = [[*row, *[0] * (width - len(row))] for row in tokens]
        embedded_BQH = self.embedding(torch.tensor(padded, device=device)).to(states_BQH.dtype)
        self.cache.place([row.slot for row in rows], starts, width)
        positions_BQ = torch.tensor(starts)[:, None] + torch.arange(width)
        queries, keys, values = self.net.attention_inputs(states_BQH, embedded_BQH, positions_BQ.to(device))
        keys, values = self.cache.cache.update(keys, values, 0)
        mask_BQT = causal_mask(positions_BQ, torch.arange(keys.shape[2])).to(device)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask_BQT[:, None], enable_gqa=True)
        return self.net.output(states_BQH, attended)
