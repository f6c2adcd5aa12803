"""What was read and taken back leaves nothing behind, in every family; the lean forward is the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from speculative_helpers import copy_of, full_logits, target
from test_decoding_families import FAMILIES, PROMPTS, tiny

from limbeck.decoding import Engine, Fixed, Sampling, generate, layers_draft, lean, speculate
from limbeck.decoding import reader as reader_module
from limbeck.decoding.reader import Reader
from limbeck.errors import RolloutError

SERVED = [family for family in FAMILIES if family != "bloom"]


def texts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    lengths = (21, 13, 9, 30)[:count]
    return [torch.randint(3, 24, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def read_and_check(reader: Reader, model: Any, slots: list[int], parts: list[tuple[list[int], int, int]]) -> None:
    """Slot by slot tokens[start:stop] are read together; each gives what a full forward gives."""
    pieces = [tokens[start:stop] for tokens, start, stop in parts]
    hidden_BQH, _ = reader.read(slots, pieces, [start for _, start, _ in parts])
    for row, (tokens, start, stop) in enumerate(parts):
        found_QV = reader.logits(hidden_BQH[row, : stop - start])
        torch.testing.assert_close(found_QV, full_logits(model, tokens)[start:stop], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", SERVED)
def test_a_rolled_back_cache_is_a_fresh_one(family: str):
    model: Any = tiny(family)
    reader = Reader(model)
    rows = texts(4)
    cuts = [14, 6, 8, 21]
    read_and_check(reader, model, [0, 1, 2, 3], [(row, 0, cut) for row, cut in zip(rows, cuts, strict=True)])
    reader.read([0, 1, 2, 3], [[5, 6, 7, 8, 9]] * 4, cuts)  # tokens that are all rejected
    read_and_check(reader, model, [3, 1], [(rows[3], 21, 25), (rows[1], 6, 8)])  # some rows, in another order
    read_and_check(
        reader, model, [0, 1, 2, 3], [(rows[0], 14, 20), (rows[1], 8, 13), (rows[2], 8, 9), (rows[3], 25, 30)]
    )
    # Taken back by more than was read last, alone, and in steps of one.
    read_and_check(reader, model, [3], [(rows[3], 11, 16)])
    for column in range(16, 30):
        read_and_check(reader, model, [3], [(rows[3], column, column + 1)])
    reader.rows.copy_row(3, 0)
    read_and_check(reader, model, [0], [(rows[3], 28, 30)])


def test_the_buffers_hold_what_a_fresh_prefill_puts_there():
    model = target()
    old, new = Reader(model), Reader(model)
    row = texts(1)[0]
    with torch.no_grad():
        old.read([0], [row[:12]], [0])
        old.read([0], [[9] * 6], [12])
        old.read([0], [row[12:]], [12])
        new.read([0], [row], [0])
    for layer in range(2):
        pair: list[Any] = [reader.rows.cache.layers[layer] for reader in (old, new)]
        for kind in ("keys", "values"):
            one, other = (getattr(held, kind)[0, :, : len(row)] for held in pair)
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_greedy_is_plain_greedy_in_every_family(family: str):
    model: Any = tiny(family)
    sampling = Sampling(24, temperature=0)
    expected = [completion.tokens for completion in generate(model, PROMPTS, sampling)]
    for draft in (copy_of(model, 0.02), layers_draft(model, [0])):
        for max_batch in (1, 4):
            found = speculate(model, draft, PROMPTS, sampling, gamma=5, max_batch=max_batch)
            assert [completion.tokens for completion in found] == expected


def test_eager_attention_is_served_too():
    model: Any = tiny("mistral", attn_implementation="eager")
    sampling = Sampling(20, temperature=0)
    found = speculate(model, layers_draft(model, [0]), PROMPTS, sampling, max_batch=4)
    assert [c.tokens for c in found] == [c.tokens for c in generate(model, PROMPTS, sampling)]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_lean_forward_is_the_models(family: str):
    model: Any = tiny(family)
    reader = Reader(model)
    assert reader.lean is not None
    rows = texts(3)
    with torch.no_grad():
        reader.read([0, 1, 2], [row[:7] for row in rows], [0] * 3)
        for width, starts in ((1, [7, 6, 5]), (3, [4, 7, 6]), (4, [5, 5, 5])):
            pieces = [row[start : start + width] for row, start in zip(rows, starts, strict=True)]
            lean, taps = reader.read([0, 1, 2], pieces, starts, taps=(0, 2, -1))
            kept, reader.lean = reader.lean, None
            own, own_taps = reader.read([0, 1, 2], pieces, starts, taps=(0, 2, -1))
            reader.lean = kept
            assert taps is not None and own_taps is not None
            torch.testing.assert_close(lean, own, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(taps, own_taps, atol=1e-5, rtol=1e-4)


def test_models_that_are_only_like_a_lean_one_are_not_taken_for_it():
    for family in ("gemma3", "gpt2", "mixtral", "mistral", "qwen2", "phi"):
        assert Reader(tiny(family)).lean is None
    scaled: Any = tiny("llama")
    scaled.model.layers[1].mlp.register_forward_hook(lambda *arguments: arguments[-1] * 2)
    assert Reader(scaled).lean is None  # found by trying


@pytest.mark.parametrize(("weights", "made"), [("own", 1), ("int8", 2)])
def test_a_reader_packs_a_model_once(weights: str, made: int, monkeypatch: pytest.MonkeyPatch):
    """To try the lean way and then to serve by it: packed twice at a time, a large model has no room."""
    packs: list[str] = []

    class Counted(lean.Lean):
        def __init__(self, body: Any, cache: Any, weights: str, new: Any = None) -> None:
            packs.append(weights)
            super().__init__(body, cache, weights, new)

    monkeypatch.setattr(reader_module, "Lean", Counted)
    assert Reader(target(), weights).lean is not None
    assert packs == ["own", weights][:made]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_other_texts_are_refused(kind: str):
    """What the target makes of a text must not depend on the longest one beside it. A draft only guesses worse."""
    more: dict[str, Any] = {"factor": 2.0}
    if kind == "longrope":
        more = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}
    rotation = {"rope_type": kind, "rope_theta": 10_000.0, **more}
    model: Any = tiny("llama", rope_parameters=rotation)
    with pytest.raises(RolloutError, match=f"LlamaForCausalLM: expected positions .* found RoPE {kind}"):
        Engine(model, None, {}, Fixed(None, 0), max_batch=1)
    plain: Any = tiny("llama")
    sampling = Sampling(10, temperature=0)
    found = speculate(plain, layers_draft(model, [0]), PROMPTS, sampling)
    assert [c.tokens for c in found] == [c.tokens for c in generate(plain, PROMPTS, sampling)]
    layered: Any = tiny("gemma3")  # one rotation for each kind of layer
    layered.config.rope_parameters["full_attention"]["rope_type"] = kind
    with pytest.raises(RolloutError, match=f"found RoPE {kind}"):
        Engine(layered, None, {}, Fixed(None, 0), max_batch=1)


def test_models_that_cannot_be_read_so_are_refused():
    with pytest.raises(RolloutError, match="position_ids"):
        Reader(tiny("bloom"))
    from test_decoding_general import mamba

    with pytest.raises(RolloutError, match="plain keys and values"):
        Reader(mamba())
