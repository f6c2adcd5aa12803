"""Plain text for a language-modelling term: packed whole, drawn by counters."""

from __future__ import annotations

from collections import Counter

import pytest

from limbeck.data.corpus import Corpus
from limbeck.data.embedded.vocabulary import tokenizer as embedded_tokenizer
from limbeck.errors import DataError
from limbeck.types import Example

TEXTS = [f"Ada has {number} red apples and Tom has {number} pears." for number in range(2, 9)]
ROWS = [{"text": text} for text in TEXTS]


def test_blocks_hold_all_texts_in_order_each_with_its_end() -> None:
    tokenizer = embedded_tokenizer()
    corpus = Corpus(ROWS, tokenizer, 8)
    expected: list[int] = []
    for text in TEXTS:
        expected += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert all(len(block) == 8 and block[0] == tokenizer.bos_token_id for block in corpus.blocks)
    packed = [token for block in corpus.blocks for token in block[1:]]
    assert packed == expected[: len(packed)] and packed.count(tokenizer.eos_token_id) >= len(TEXTS) - 1
    assert corpus.left_out == len(expected) - len(packed) < 7


def test_what_is_drawn_depends_on_seed_step_row_and_sample_and_is_learnt_but_for_bos() -> None:
    corpus = Corpus(ROWS, embedded_tokenizer(), 8)

    def drawn(seed: int, step: int, *rows: int) -> list[int]:
        rollouts = corpus.draw([Example([1], [False], 1, index=row) for row in rows], seed, step)
        assert all(rollout.mask == [False] + [True] * 7 for rollout in rollouts)
        assert all(rollout.tokens == corpus.blocks[rollout.index] for rollout in rollouts)
        return [rollout.index for rollout in rollouts]

    steps = range(40)
    first = [drawn(0, step, 4)[0] for step in steps]
    assert first == [drawn(0, step, 7, 4)[1] for step in steps]  # whatever else is in the batch
    others = {
        "seed": [drawn(1, step, 4)[0] for step in steps],
        "row": [drawn(0, step, 7)[0] for step in steps],
        "sample": [drawn(0, step, 4, 4)[1] for step in steps],
    }
    # Two of 40 independent draws agree in 40 / blocks places: 3 of 14 blocks or so, and a stuck step in all.
    blocks = len(corpus.blocks)
    for name, other in others.items():
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 40 / blocks + 4 * (40 / blocks) ** 0.5, name
    assert len(Counter(first)) > blocks / 2


def test_too_little_text_and_rows_that_are_no_text() -> None:
    with pytest.raises(DataError, match="expected text for one block of 4000 tokens or more"):
        Corpus(ROWS, embedded_tokenizer(), 4000)
    with pytest.raises(DataError, match="row 1: expected plain text .* found prompt"):
        Corpus([{"prompt": "a"}], embedded_tokenizer(), 8)
