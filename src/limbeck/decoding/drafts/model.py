"""A draft that is a causal model of the target's vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from limbeck.decoding.drafts import GoOn, Proposal
from limbeck.decoding.drafts.head import DraftHead
from limbeck.decoding.drafts.steps import draft_by_steps
from limbeck.decoding.live import Live
from limbeck.decoding.reader import Reader
from limbeck.errors import ModelError, PreflightError

_PREFILL = 4  # unread tokens from which a row reads alone, before the others' first step


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

    def bind(self, vocabulary: int) -> None:
        if self.vocabulary != vocabulary:
            raise PreflightError(
                f"draft: expected the target's vocabulary of {vocabulary} tokens, found {self.vocabulary}: declare the "
                "tokens that they share by limbeck.models.set_vocabulary, or take a draft of the target's family"
            )

    def restrict(self, ids_D: Tensor | None) -> None:
        """From the next round on these tokens alone are drafted, beside those of a request itself (None: all)."""
        self.head = DraftHead(self.reader.head, self.vocabulary, self.reader.weights, ids_D)

    def open(self, row: Live) -> None:
        self.read[row] = 0

    def close(self, row: Live) -> None:
        del self.read[row]
        self.head.close(row)

    def move(self, source: int, target: int) -> None:
        self.reader.rows.copy_row(source, target)

    def settle(self, row: Live, known: int, hidden_TF: Tensor | None) -> None:
        self.read[row] = min(self.read[row], known)

    def propose(self, rows: Sequence[Live], most: Sequence[int], go_on: GoOn) -> Proposal:
        limit = self.reader.limit
        if limit is not None:  # its context may end before the target's
            most = [max(min(count, limit + 1 - len(row.tokens)), 0) for row, count in zip(rows, most, strict=True)]
        slots = [row.slot for row in rows]
        vocabulary = self.head.of(rows)

        def first() -> Tensor:
            self._catch_up(rows)
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

    def _catch_up(self, rows: Sequence[Live]) -> None:
        """Rows with much to read, a prompt for instance, read all but their newest token."""
        late = [row for row in rows if len(row.tokens) - self.read[row] > _PREFILL]
        if late:
            starts = [self.read[row] for row in late]
            tokens = [row.tokens[start:-1] for row, start in zip(late, starts, strict=True)]
            self.reader.read([row.slot for row in late], tokens, starts)
            for row in late:
                self.read[row] = len(row.tokens) - 1


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
