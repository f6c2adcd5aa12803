"""The drafts by themselves: vocabularies, packed weights, n-grams, the feature layer's two forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding_helpers import VOCABULARY
from speculative_helpers import feature, half, target
from test_decoding_families import tiny
from torch import nn

from limbeck.decoding import FeatureNet, NgramDraft, Request, Sampling, feature_shape, int8_weights, layers_draft
from limbeck.decoding.drafts.head import DraftHead
from limbeck.decoding.live import Live
from limbeck.decoding.packed import FEW_ROWS, Linear
from limbeck.errors import ModelError
from limbeck.models import output_head
from limbeck.ops.chunked import head_logits


def row(tokens: list[int], *, slot: int = 0, train: bool = True, stops: tuple[int, ...] = ()) -> Live:
    request = Request("a", tuple(tokens), Sampling(50, temperature=0, stop_tokens=stops), train=train)
    return Live(request, len(tokens) + 50, slot)


def always(rows: Any, confidence: Any) -> bool:
    return True


# -- packed weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 32), (61, 64), (24, 16), (64, 24), (3, 40)])
def test_packed_products_are_nearly_the_own(shape: tuple[int, int]):
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    linear, few = Linear(weight, bias, "int8"), FEW_ROWS["int8"]
    for rows in (1, 2, few, few + 1):
        hidden = torch.randn(rows, 1, shape[1])
        expected = nn.functional.linear(hidden, weight, bias)
        error = (linear(hidden) - expected).norm() / expected.norm()
        rounded = rows <= few and shape[1] % 16 == 0
        assert 1e-4 < error < 0.02 if rounded else torch.equal(linear(hidden), expected)


@pytest.mark.parametrize("width", [32, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_is_as_exact_as_the_model_is(width: int, dtype: torch.dtype):
    """Of a weight of zeros the product is the bias."""
    bias = torch.randn(8).to(dtype)
    product = Linear(torch.zeros(8, width, dtype=dtype), bias, "int8")(torch.randn(2, width).to(dtype))
    assert product.dtype == dtype and torch.equal(product, bias.expand(2, 8))


def test_layers_that_the_int8_kernel_reads_beyond_are_left_alone():
    model = nn.ModuleDict({"narrow": nn.Linear(24, 8), "wide": nn.Linear(32, 8)})
    whole: Any = target()
    whole.model.layers[0].extra = model
    with int8_weights(whole):
        assert "forward" in model["wide"].__dict__ and "forward" not in model["narrow"].__dict__


def test_unknown_packings_are_refused():
    with pytest.raises(ModelError, match="expected one of own, int8, .*found 'int3'"):
        layers_draft(target(), [0], weights="int3")


# -- vocabularies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma2", "phi", "llama"])
def test_a_reduced_head_scores_what_the_whole_one_does(family: str):
    """Soft-cap, bias and all; the request's own tokens are scored too, each for its request alone."""
    model: Any = tiny(family)
    head = output_head(model)
    ids = torch.tensor([40, 7, 7, 3])
    draft = DraftHead(head, 61, "own", ids)
    rows = [row([5, 6, 7], stops=(2,)), row([9, 3], slot=1)]
    vocabulary = draft.of(rows)
    assert vocabulary.ids_D is not None and vocabulary.ids_D.tolist() == [3, 7, 40, 2, 5, 6, 9]
    hidden_BH = torch.randn(2, 32)
    found, expected = vocabulary.logits(hidden_BH), head_logits(hidden_BH, head)[:, vocabulary.ids_D]
    mine = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 1]]).bool()
    torch.testing.assert_close(found[mine], expected[mine])
    assert (found[~mine] == -torch.inf).all()
    rows[0].tokens.append(11)
    alone = draft.of(rows[:1])
    assert alone.ids_D is not None and alone.ids_D.tolist() == [3, 7, 40, 2, 5, 6, 11]
    torch.testing.assert_close(alone.logits(hidden_BH[:1]), head_logits(hidden_BH[:1], head)[:, alone.ids_D])


def test_vocabularies_that_are_none_are_refused():
    for ids in ([], [0, VOCABULARY], [-1]):
        with pytest.raises(ModelError, match=f"from 0 to {VOCABULARY - 1}"):
            layers_draft(target(), [0], ids_D=torch.tensor(ids, dtype=torch.long))


def test_a_restricted_draft_drafts_no_other_token():
    draft = layers_draft(target(), [0], ids_D=half(target()))
    draft.bind(VOCABULARY)
    rows = [row([5, 7, 9]), row([11, 4], slot=1)]
    for each in rows:
        draft.open(each)
    drafted = draft.propose(rows, [12, 12], always).tokens
    assert set(drafted[0]) <= {*range(1, VOCABULARY, 2)} and set(drafted[1]) <= {*range(1, VOCABULARY, 2), 4}
    for each in rows:
        draft.settle(each, len(each.tokens) - 1, None)
    draft.restrict(torch.tensor([8, 10]))
    assert set(draft.propose(rows, [12, 12], always).tokens[0]) <= {5, 7, 9, 8, 10}
    for each in rows:
        draft.settle(each, len(each.tokens) - 1, None)
    draft.restrict(None)
    assert draft.propose(rows, [2, 2], always).ids_D is None


# -- how much is drafted -----------------------------------------------------------------------------------------------


def test_as_much_is_drafted_as_asked_and_the_last_token_is_never_dropped():
    draft = layers_draft(target(), [0, 1])
    draft.bind(VOCABULARY)
    rows = [row([5, 6, 7]), row([8, 9], slot=1)]
    for each in rows:
        draft.open(each)
    whole = draft.propose(rows, [6, 3], always)
    assert [len(tokens) for tokens in whole.tokens] == [6, 3] and whole.steps == 6
    for each in rows:
        draft.settle(each, len(each.tokens) - 1, None)
    asked: list[int] = []

    def once(rows: Any, confidence: Any) -> bool:
        asked.append(len(confidence[0]))
        return len(confidence[0]) < 2

    some = draft.propose(rows, [6, 6], once)
    # Asked after a token is in: what it is decides about the next one, not about itself.
    assert asked == [1, 2] and [tokens[:2] for tokens in whole.tokens] == some.tokens
    assert some.confidence == [pytest.approx(values[:2], abs=1e-5) for values in whole.confidence]


def test_nothing_is_drafted_behind_a_stop_token():
    plain = layers_draft(target(), [0])
    plain.bind(VOCABULARY)
    first = row([5, 6, 7])
    plain.open(first)
    drafted = plain.propose([first], [8], always).tokens[0]
    stopped = row([5, 6, 7], stops=(drafted[3],))
    plain.open(stopped)
    assert plain.propose([stopped], [8], always).tokens[0] == drafted[: drafted.index(drafted[3]) + 1]


# -- n-grams -----------------------------------------------------------------------------------------------------------


def test_what_followed_the_same_tokens_is_proposed():
    draft = NgramDraft(size=2)
    text = row([1, 2, 3, 4, 5, 9, 1, 2, 3])
    draft.open(text)
    assert draft.look_up(text, 4) == ([4, 5, 9, 1], 3)  # all three tokens that matched are counted
    text.tokens += [8, 6, 1, 2]
    assert draft.look_up(text, 3) == ([3, 8, 6], 2)  # the last occurrence
    text.tokens += [7, 7]
    assert draft.look_up(text, 3) == ((), 0)
    proposal = draft.propose([text], [3], always)
    assert proposal.tokens == [[]] and proposal.raw_BGD is None
    text.tokens += [7]  # overlaps with itself
    assert draft.look_up(text, 3) == ([7], 2)


def test_requests_share_what_was_written_within_bounds():
    draft = NgramDraft(size=2, shared_tokens=12, shared_seconds=100)

    def ended(tokens: list[int], **options: Any) -> None:
        text = row(tokens, **options)
        draft.open(text)
        draft.close(text)

    def proposed(tokens: list[int]) -> list[int]:
        text = row(tokens)
        draft.open(text)
        found = list(draft.look_up(text, 2)[0])
        del draft.own[text]
        return found

    ended([1, 2, 3, 4, 5])
    assert proposed([9, 1, 2]) == [3, 4]
    ended([6, 7, 8, 9], train=False)
    assert proposed([6, 7]) == []  # leaves no trace
    ended([1, 2, 8, 8, 8])
    assert proposed([1, 2]) == [8, 8] and proposed([3, 4]) == [5]
    ended([10, 11, 12, 13])  # 14 tokens: the oldest go
    assert proposed([3, 4]) == [] and proposed([1, 2]) == [8, 8] and draft.kept_tokens == 9
    ended(list(range(13)))
    assert draft.kept_tokens == 9  # one that is too long alone drives no other out
    now = draft.kept[0][0]
    draft.expire(now + 200)
    assert not draft.shared and not draft.kept and draft.kept_tokens == 0


def test_a_seed_is_given_no_text_that_it_may_have_drawn():
    """Neither its own nor one that was written with it at hand. Greedy requests draw nothing."""
    draft = NgramDraft(size=2)

    def written(seed: int, tokens: list[int], *, temperature: float = 1.0, close: bool = True) -> list[int]:
        request = Request("a", tuple(tokens), Sampling(50, temperature=temperature, seed=seed))
        text = Live(request, 90, 0)
        draft.open(text)
        found = list(draft.look_up(text, 2)[0])
        if close:
            draft.close(text)
        return found

    assert written(1, [1, 2, 3, 4, 5]) == []
    assert written(1, [9, 1, 2]) == []
    assert written(1, [9, 1, 2], temperature=0, close=False) == [3, 4]
    assert written(2, [9, 1, 2], close=False) == [3, 4]
    assert written(2, [1, 2, 3, 4, 5]) == []  # copied from the first, for all that is known
    assert written(1, [9, 1, 2], close=False) == []
    assert written(3, [9, 3, 4], temperature=0) == [5]
    assert written(3, [9, 3, 4], close=False) == [5]  # of the seed's own there is nothing


# -- the feature layer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_what_training_unrolls_is_what_serving_computes(family: str):
    """Drafts from every column, the text's own tokens forced: hidden states of both forwards, step by step."""
    model: Any = tiny(family)
    draft = feature(model)
    net = draft.net
    tokens = torch.randint(3, 60, (12,)).tolist()
    steps = 4
    with torch.no_grad():
        states = model(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states
        features_TF = torch.cat([states[tap][0] for tap in draft.taps], -1)
        embedded_1TH = draft.embedding(torch.tensor([tokens[1:]]))
        unrolled = net.unroll(features_TF[None, :-1], embedded_1TH, steps)
        assert [piece.shape[1] for piece in unrolled] == [11, 10, 9, 8]
        text = row(tokens[:1])
        draft.open(text)
        for known in range(2, len(tokens) + 1):  # tokens [0, known) are the request's; the target has read known - 1
            text.tokens = tokens[:known]
            draft.settle(text, known - 1, features_TF[known - 2 : known - 1])
            seen: list[torch.Tensor] = []
            handle = net.norm.register_forward_hook(lambda *parts, seen=seen: seen.append(parts[-1]))
            forced = tokens[known:]

            def go_on(rows: Any, confidence: Any, forced: list[int] = forced) -> bool:
                return len(confidence[0]) < min(steps, len(forced) + 1)

            _force(draft, text, forced, steps, go_on)
            handle.remove()
            for step, hidden in enumerate(seen):
                if step <= len(forced) and known - 2 < unrolled[step].shape[1]:
                    torch.testing.assert_close(hidden[0], unrolled[step][0, known - 2], atol=1e-5, rtol=1e-4)


def _force(draft: Any, text: Live, forced: list[int], steps: int, go_on: Any) -> None:
    """Drafts, with the text's tokens in place of the draft's own."""
    original = draft._run

    def run(rows: Any, states: Any, tokens: list[list[int]], starts: list[int]) -> Any:
        step = starts[0] + len(tokens[0]) - len(text.tokens) + 1
        if step > 0:
            tokens = [[forced[step - 1]]] if step <= len(forced) else tokens
        return original(rows, states, tokens, starts)

    draft._run = run
    draft.propose([text], [steps], go_on)
    draft._run = original


def settled(draft: Any, text: Live, features_TF: torch.Tensor, width: int) -> list[int]:
    """Shows the draft a text's columns, `width` at a time, as views of more; the columns that it kept meanwhile."""
    kept: list[int] = []
    for start in range(0, len(features_TF), width):
        draft.settle(text, start + width, features_TF[start : start + width])
        kept.append(sum(map(len, draft.unread[text])))
    return kept


def test_what_nobody_asks_the_feature_draft_for_is_bounded():
    """Two routes, or a controller that does not draft: the states of a long text are read now and then, not kept."""
    model: Any = target()
    many = torch.randint(3, 24, (701,)).tolist()
    features_TF = torch.randn(700, 2 * 64)
    proposals: list[list[int]] = []
    for width in (1, 700):
        draft, text = feature(model), row(many)
        draft.open(text)
        with torch.no_grad():
            kept = settled(draft, text, features_TF, width)
            own = [piece.untyped_storage().nbytes() == piece.numel() * 4 for piece in draft.unread[text]]
            assert all(own)  # no view that keeps a whole round's tensor
            assert width > 1 or (max(kept) == 257 and draft.read[text] > 0)
            proposals.append(draft.propose([text], [4], always).tokens[0])
        assert draft.unread[text] == [] and len(proposals[-1]) == 4
        draft.close(text)
        assert not draft.read and not draft.unread
    assert proposals[0] == proposals[1]


def test_a_benched_feature_draft_keeps_what_it_has_not_read():
    """Its weights gave NaN: rows it has read with them are lost, those it has not read are drafted for again."""
    model: Any = target()
    draft, rows = feature(model), [row([5, 6, 7]), row([8, 9, 4], slot=1), row([3] * 400, slot=2)]
    good = {name: weight.clone() for name, weight in draft.net.named_parameters()}
    features_TF = torch.randn(400, 2 * 64)
    with torch.no_grad():
        for text in rows[:2]:
            draft.open(text)
            settled(draft, text, features_TF[: len(text.tokens) - 1], 2)
        draft.prepare({name: torch.full_like(weight, torch.nan) for name, weight in good.items()}, 1)()
        assert not draft.propose(rows[:1], [2], always).finite
        draft.benched = True
        draft.open(rows[2])
        kept = settled(draft, rows[2], features_TF[:399], 1)
        assert kept[-1] == 0 and max(kept) == 257  # too much to keep, and nothing to read it with
        draft.prepare(good, 2)()
        proposal = draft.propose(rows, [3, 3, 3], always)
        assert proposal.rows == rows[1:2] and [len(drafted) for drafted in proposal.tokens] == [3]
        assert draft.propose(rows[:1], [3], always).rows == []
    assert not draft.benched and draft.version == 2


def test_drafts_say_what_they_may_draft():
    model = target()
    drafts = (layers_draft(model, [0], ids_D=half(model)), feature(model, ids_D=half(model)))
    for draft in drafts:
        assert draft.ids_D is not None and draft.ids_D.tolist() == half(model).tolist()
        draft.restrict(None)
        assert draft.ids_D is None
    assert NgramDraft().ids_D is None


def test_the_unrolled_steps_can_be_trained():
    model: Any = tiny("llama")
    net = FeatureNet(feature_shape(model, inner=32))
    text = torch.randint(3, 60, (2, 20))
    with torch.no_grad():
        states = model(input_ids=text, output_hidden_states=True).hidden_states
        logits = model(input_ids=text).logits
    features = torch.cat([states[tap] for tap in net.shape.taps], -1)[:, :-1]
    embedded = model.get_input_embeddings()(text[:, 1:]).detach()
    head = output_head(model)

    def losses() -> list[torch.Tensor]:
        return [
            nn.functional.cross_entropy(
                head_logits(hidden.flatten(0, 1), head), logits[:, 1 + step :].argmax(-1).flatten()
            )
            for step, hidden in enumerate(net.unroll(features, embedded, 3))
        ]

    before = [loss.item() for loss in losses()]
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        torch.stack(losses()).sum().backward()
        assert all(weight.grad is not None for weight in net.parameters())
        optimiser.step()
    assert all(after.item() < 0.6 * first for after, first in zip(losses(), before, strict=True))


def test_the_feature_layer_is_as_wide_as_the_target():
    shape = feature_shape(tiny("qwen3"))
    assert (shape.width, shape.heads, shape.key_heads, shape.head_width) == (32, 4, 2, 8)
    assert shape.taps == tuple(sorted(shape.taps)) and max(shape.taps) <= 3
