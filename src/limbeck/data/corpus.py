"""Plain text for a language-modelling term: read whole, packed into blocks of one length."""

from __future__ import annotations

from typing import Any

import numpy as np

from limbeck.data.read import read
from limbeck.errors import DataError
from limbeck.types import Example, Rollout

COINS = 0x636F7270  # keeps these draws apart from all others of the same seed


class Corpus:
    """Blocks of `length` tokens, cut from all texts in their order, EOS after each; every token but BOS is learnt.

    `source`: what `read` reads, of rows with `text`. `left_out`: tokens at the end, short of a block. Raises DataError
    for other rows and for less text than one block.
    """

    def __init__(self, source: Any, tokenizer: Any, length: int) -> None:
        ids = [token for text in _texts(source) for token in [*_encoded(tokenizer, text), tokenizer.eos_token_id]]
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        fresh = length - len(bos)
        self.blocks = [bos + ids[start : start + fresh] for start in range(0, len(ids) - fresh + 1, fresh)]
        self.left_out = len(ids) % fresh
        if not self.blocks:
            raise DataError(
                f"data.corpus: expected text for one block of {length} tokens or more, found {len(ids)} tokens: "
                "give more text, or a smaller data.corpus_tokens"
            )

    def draw(self, examples: list[Example], seed: int, step: int) -> list[Rollout]:
        """As many blocks as there are examples, each drawn by (seed, step, row, which of the row's samples)."""
        seen: dict[int, int] = {}
        drawn: list[Rollout] = []
        for example in examples:
            sample = seen[example.index] = seen.get(example.index, -1) + 1
            block = int(np.random.default_rng((seed, COINS, step, example.index, sample)).integers(len(self.blocks)))
            tokens = self.blocks[block]
            drawn.append(Rollout(tokens, [False] + [True] * (len(tokens) - 1), 0, "dataset", "length", block))
        return drawn


def _texts(source: Any) -> list[str]:
    rows = read(source)
    lacking = next((number for number, row in enumerate(rows, 1) if "text" not in row), None)
    if lacking is not None:
        found = ", ".join(rows[lacking - 1])
        raise DataError(
            f"data.corpus: row {lacking}: expected plain text (a .txt file, or a column text), found {found}"
        )
    return [row["text"] for row in rows]


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
