"""The output head of a draft, for a part of the vocabulary.

A step of a small model costs as much for its head of 150 000 rows as for half of its layers, so that a draft scores the
tokens that the target's outputs use, and those that stand in the request itself: names, numbers, whatever it has just
written. All others have q = 0 (see `verify`: nothing of the output changes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.decoding.live import Live
from limbeck.decoding.packed import Linear
from limbeck.errors import ModelError
from limbeck.ops.tiles import Finish
from limbeck.types import Head


class DraftHead:
    """Scores the tokens `ids_D` (sorted, without repeats; None: all `vocabulary`) with packed weights, and some more.
    Where the body has int4 the head has int8: what is drafted depends on it most, and of the bytes it is little.

    `new`: weights by parameter, in place of the head's own. ModelError for `ids_D` that are none or no tokens.
    """

    def __init__(
        self,
        head: Head,
        vocabulary: int,
        weights: str,
        ids_D: Tensor | None = None,
        new: Mapping[Any, Tensor] | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.finish = Finish.of(head)
        replaced = new or {}
        self.weight_VH = replaced.get(head.weight_VH, head.weight_VH).detach()
        self.bias_V = None if head.bias_V is None else replaced.get(head.bias_V, head.bias_V).detach()
        if ids_D is not None and (not len(ids_D) or int(ids_D.min()) < 0 or int(ids_D.max()) >= vocabulary):
            raise ModelError(f"draft vocabulary: expected tokens from 0 to {vocabulary - 1}, found others or none")
        self.ids_D = None if ids_D is None else ids_D.to(self.weight_VH.device).unique()
        rows: Any = slice(0, vocabulary) if self.ids_D is None else self.ids_D
        self.project = Linear(self.weight_VH[rows], None, "int8" if weights == "int4" else weights)
        self.bias_D = None if self.bias_V is None else self.bias_V[rows]
        self.common = set[int]() if self.ids_D is None else set(self.ids_D.tolist())
        self.rare: dict[Live, tuple[int, set[int]]] = {}  # tokens looked through, those outside ids_D
        self.last: Vocabulary | None = None

    def of(self, rows: Sequence[Live]) -> Vocabulary:
        """The vocabulary of a proposal for these rows."""
        if self.ids_D is None:
            return Vocabulary(self, None, torch.zeros(0, dtype=torch.long), None)
        rare = [self._rare(row) for row in rows]
        extra = sorted(set().union(*rare))
        owned = None if len(rows) == 1 else [[token in tokens for token in extra] for tokens in rare]
        if self.last is None or self.last.extra != extra or self.last.owned != owned:
            device = self.weight_VH.device
            extra_E = torch.tensor(extra, dtype=torch.long, device=device)
            foreign_BE = None if owned is None else ~torch.tensor(owned, dtype=torch.bool, device=device)
            self.last = Vocabulary(self, torch.cat((self.ids_D, extra_E)), extra_E, foreign_BE, extra, owned)
        return self.last

    def _rare(self, row: Live) -> set[int]:
        seen, tokens = self.rare.get(row) or (0, set(row.request.sampling.stop_tokens) - self.common)
        tokens.update(token for token in row.tokens[seen:] if token not in self.common)
        self.rare[row] = (len(row.tokens), tokens)
        return tokens

    def close(self, row: Live) -> None:
        self.rare.pop(row, None)


@dataclass(eq=False)
class Vocabulary:
    """The tokens `ids_D` (None: all) that some rows may be given: the head's own, then the rare ones of any of the
    rows, which are `foreign_BE` to those that do not hold them."""

    head: DraftHead
    ids_D: Tensor | None
    extra_E: Tensor
    foreign_BE: Tensor | None
    extra: list[int] | None = None
    owned: list[list[bool]] | None = None

    def __post_init__(self) -> None:
        head = self.head
        self.weight_EH = head.weight_VH[self.extra_E] if len(self.extra_E) else None
        self.bias_D = head.bias_D
        if head.bias_V is not None and head.bias_D is not None:
            self.bias_D = torch.cat((head.bias_D, head.bias_V[self.extra_E]))

    @property
    def size(self) -> int:
        """Of the whole vocabulary."""
        return self.head.vocabulary

    def logits(self, hidden_BH: Tensor) -> Tensor:
        """Raw logits (B, D), float32."""
        product_BD = self.head.project(hidden_BH)
        if self.weight_EH is not None:
            product_BE = F.linear(hidden_BH.to(self.weight_EH.dtype), self.weight_EH)
            product_BD = torch.cat((product_BD, product_BE.to(product_BD.dtype)), -1)
        logits_BD = self.head.finish.logits(product_BD, self.bias_D)
        if self.foreign_BE is not None and self.foreign_BE.shape[1]:
            logits_BD[:, -self.foreign_BE.shape[1] :].masked_fill_(self.foreign_BE, -torch.inf)
        return logits_BD
