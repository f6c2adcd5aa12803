"""A draft that is a causal model of the target's vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from limbeck.decoding.clock import now
from limbeck.decoding.drafts import GoOn, Proposal
from limbeck.decoding.drafts.head import DraftHead
from limbeck.decoding.drafts.steps import behind, draft_by_steps
from limbeck.decoding.live import Live
from limbeck.decoding.pieces import PIECE, together
from limbeck.decoding.reader import Reader
from limbeck.errors import ModelError, PreflightError


class ModelDraft:
    """`model` belongs to the draft from now on. `weights`: see `packed.FEW_ROWS`. `ids_D`: the tokens that it may
    draft, beside those of a request itself; None: all. The model's own weights stay as they are, for prompts and for
    whoever trains them.

    Raises RolloutError for a model that `Reader` refuses, ModelError for `ids_D` that are no tokens.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, model: Any, *, weights: str = "own", ids_D: Tensor | None = None) -> None:
        self.reader = Reader(model, weights)
        self.reader.model.eval()
        self.vocabulary = self.reader.head.size
        self.head = DraftHead(self.reader.head, self.vocabulary, weights, ids_D)
        self.version = 0
        self.benched = False
        self.read: dict[Live, int] = {}  # columns of its slot that hold its tokens

    @property
    def ids_D(self) -> Tensor | None:
        return self.head.ids_D

    def bind(self, vocabulary: int, context: int | None = None) -> None:
        if self.vocabulary != vocabulary:
            raise PreflightError(
                f"draft: expected the target's vocabulary of {vocabulary} tokens, found {self.vocabulary}: declare the "
                "tokens that they share by limbeck.models.set_vocabulary, or take a draft of the target's family"
            )
        self.reader.rows.bound(context)

    def restrict(self, ids_D: Tensor | None) -> None:
        """From the next round on these tokens alone are drafted, beside those of a request itself (None: all)."""
        self.head = DraftHead(self.reader.head, self.vocabulary, self.reader.weights, ids_D)

    def open(self, row: Live) -> None:
        self.read[row] = 0
        self.reader.rows.keep(len(self.read))

    def close(self, row: Live) -> None:
        del self.read[row]
        self.head.close(row)
        self.reader.rows.keep(len(self.read))

    def move(self, source: int, target: int) -> None:
        self.reader.rows.copy_row(source, target)

    def settle(self, row: Live, known: int, hidden_TF: Tensor | None) -> None:
        self.read[row] = min(self.read[row], known)

    def behind(self, row: Live) -> int:
        return behind(len(row.tokens) - self.read[row])

    def propose(self, rows: Sequence[Live], most: Sequence[int], go_on: GoOn) -> Proposal:
        limit = self.reader.limit
        if limit is not None:  # its context may end before the target's
            most = [min(count, limit + 1 - len(row.tokens)) for row, count in zip(rows, most, strict=True)]
        wanted = {row: count for row, count in zip(rows, most, strict=True) if count > 0}
        start = now(self.reader.device)
        read = self._catch_up(list(wanted))
        read_s = now(self.reader.device) - start
        rows = [row for row in wanted if not self.behind(row)]
        proposal = self._drafted(rows, [wanted[row] for row in rows], go_on) if rows else Proposal([], [])
        proposal.read, proposal.read_seconds = read, read_s
        return proposal

    def _drafted(self, rows: Sequence[Live], most: Sequence[int], go_on: GoOn) -> Proposal:
        slots = [row.slot for row in rows]
        vocabulary = self.head.of(rows)

        def first() -> Tensor:
            starts = [self.read[row] for row in rows]
            unread = [row.tokens[start:] for row, start in zip(rows, starts, strict=True)]
            hidden_BQH, _ = self.reader.read(slots, unread, starts)
            return vocabulary.logits(hidden_BQH[range(len(rows)), [len(tokens) - 1 for tokens in unread]])

        def then(newest: list[int], step: int) -> Tensor:
            starts = [len(row.tokens) + step - 1 for row in rows]
            hidden_B1H, _ = self.reader.read(slots, [[token] for token in newest], starts)
            return vocabulary.logits(hidden_B1H[:, 0])

        proposal = draft_by_steps(rows, most, go_on, first, then, vocabulary)
        for row, tokens in zip(rows, proposal.tokens, strict=True):
            self.read[row] = len(row.tokens) + min(len(tokens), max(proposal.steps - 1, 0))
        return proposal

    def expire(self) -> None:
        """It keeps nothing of a request that has ended."""

    def prepare(self, state: Mapping[str, Tensor], version: int) -> Callable[[], None]:
        model, head = self.reader.model, self.head
        own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        new = fitted(own, state)
        packed = self.reader.pack(new)
        made = DraftHead(self.reader.head, self.vocabulary, self.reader.weights, head.ids_D, new)

        def put() -> None:
            for weight, tensor in new.items():
                weight.data = tensor
            packed()
            if self.head is head:
                self.head = made
            else:  # restricted meanwhile
                self.restrict(self.head.ids_D)
            if self.benched:  # what it has read with its last weights may be NaN
                self.reader.rows.forget()
                self.read = dict.fromkeys(self.read, 0)
            self.version, self.benched = version, False

        return put

    def _catch_up(self, rows: Sequence[Live]) -> int:
        """Rows that are behind read on, a piece each at most, whoever is beside them: what a request is given does not
        depend on that. How many columns they have read."""
        late = [row for row in rows if self.behind(row)]
        counts = [min(self.behind(row), PIECE) for row in late]
        for group in together(counts):
            starts = [self.read[late[place]] for place in group]
            texts = [
                late[place].tokens[start : start + counts[place]] for place, start in zip(group, starts, strict=True)
            ]
            self.reader.read([late[place].slot for place in group], texts, starts)
            for place in group:
                self.read[late[place]] += counts[place]
        return sum(counts)


def fitted(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
    """The new weights by what they replace, by identity, for tied weights have two names: on its device and in its
    dtype. ModelError unless each has the name and shape of one of `own`."""
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            found = "no such weight" if name not in own else str(tuple(own[name].shape))
            raise ModelError(
                f"new weights of a draft: expected {name} {found} as in the serving one, found {tuple(tensor.shape)}: "
                "train the draft that is served"
            )
    return {own[name]: weight.detach().to(own[name].device, own[name].dtype) for name, weight in state.items()}
