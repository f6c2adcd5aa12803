"""What is drawn follows the target's distribution exactly, whatever drafts: counted against enumeration."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from decoding_helpers import llama
from scipy import stats
from speculative_helpers import copy_of, feature, full_logits, requests_of, serve
from test_decoding_families import tiny
from torch import Tensor

from limbeck.decoding import Draft, Engine, Fixed, NgramDraft, Request, Sampling, layers_draft, speculate
from limbeck.decoding.drafts import GoOn, Proposal
from limbeck.decoding.live import Live
from limbeck.decoding.sampler import History, served_logits

SIZE = 7  # of the vocabulary: all continuations of 4 tokens can be enumerated
PROMPT = [3, 4, 3]
LENGTH = 4
SAMPLES = 3000
JUDGE = "limbeck.decoding.judge"


def small(**changes: Any) -> Any:
    return llama(SIZE, scale=0.35, hidden_size=32, **changes)


def exact(model: Any, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """The probability of every completion, by full forwards over each prefix; shorter ones end with a stop token."""
    found: dict[tuple[int, ...], float] = {}
    open_ones: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        following: dict[tuple[int, ...], float] = {}
        for written, chance in open_ones.items():
            tokens_1T = torch.tensor([[*PROMPT, *written]])
            own_1T = torch.arange(tokens_1T.shape[1])[None] >= len(PROMPT)
            history = History(tokens_1T, torch.ones_like(own_1T), own_1T)
            logits_1V = full_logits(model, tokens_1T[0].tolist())[-1:]
            probs = served_logits(logits_1V, sampling, history).double().softmax(-1)[0].tolist()
            for token, prob in enumerate(probs):
                target = found if token in sampling.stop_tokens else following
                if prob > 0:
                    target[(*written, token)] = chance * prob
        open_ones = following
    return found | open_ones


def pvalue(drawn: list[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Of a chi-square test of the tokens from the second one on; cells of fewer than 5 are put together."""
    chances: Counter[tuple[int, ...]] = Counter()
    for tokens, chance in expected.items():
        chances[tokens[1:]] += chance  # type: ignore[assignment]
    counts = Counter(tokens[1:] for tokens in drawn)
    assert counts.keys() <= chances.keys(), "a completion that cannot be"
    cells = [[counts[key], len(drawn) * chance] for key, chance in chances.items()]
    large = [cell for cell in cells if cell[1] >= 5]
    rest = [sum(column) for column in zip(*(cell for cell in cells if cell[1] < 5), strict=True)]
    if rest and rest[1] > 0:
        large.append(rest)
    observed, wanted = zip(*large, strict=True)
    total = sum(observed) / sum(wanted)
    return float(stats.chisquare(observed, [value * total for value in wanted]).pvalue)


def drawn_by(model: Any, draft: Draft | None, sampling: Sampling, gamma: int = 3) -> list[tuple[int, ...]]:
    many = Sampling(**{**vars(sampling), "n": SAMPLES})
    completions = speculate(model, draft, [PROMPT], many, gamma=gamma, max_batch=500)
    return [tuple(completion.tokens) for completion in completions]


DRAFTS: dict[str, Callable[[Any], Draft]] = {
    "layers": lambda model: layers_draft(model, [0]),
    "layers of some tokens": lambda model: layers_draft(model, [0], ids_D=torch.tensor([0, 1, 5])),
    "near copy": lambda model: copy_of(model, 0.1),
    "feature": feature,
    "ngram": lambda model: NgramDraft(size=1, shared_tokens=0),
}
SAMPLINGS = {
    "plain": Sampling(LENGTH, seed=7),
    "hot, filtered": Sampling(LENGTH, temperature=1.4, top_k=5, top_p=0.9, seed=8),
    "penalties and a late stop": Sampling(
        LENGTH, temperature=0.9, repetition_penalty=1.3, frequency_penalty=0.4, stop_tokens=(2,), min_tokens=2, seed=9
    ),
}


@pytest.mark.parametrize("kind", DRAFTS)
def test_the_distribution_is_the_targets(kind: str):
    model = small()
    drawn = drawn_by(model, DRAFTS[kind](model), SAMPLINGS["plain"])
    assert pvalue(drawn, exact(model, SAMPLINGS["plain"])) > 1e-3


@pytest.mark.parametrize("name", list(SAMPLINGS)[1:])
@pytest.mark.parametrize("kind", ["layers of some tokens", "near copy", "ngram"])
def test_filters_and_penalties_are_of_both_models_or_of_none(kind: str, name: str):
    model = small()
    drawn = drawn_by(model, DRAFTS[kind](model), SAMPLINGS[name], gamma=2)
    assert pvalue(drawn, exact(model, SAMPLINGS[name])) > 1e-3


def test_the_count_finds_a_draft_that_is_always_accepted(monkeypatch: pytest.MonkeyPatch):
    """The negative control of all of the above."""
    model = small()
    monkeypatch.setattr(f"{JUDGE}.accepts", lambda p_N, q_N, uniforms_N: torch.ones_like(p_N).bool())
    for kind in ("layers", "near copy"):
        drawn = drawn_by(model, DRAFTS[kind](model), SAMPLINGS["plain"])
        assert pvalue(drawn, exact(model, SAMPLINGS["plain"])) < 1e-9


@pytest.mark.parametrize("wrong", ["p", "other side"])
def test_the_count_finds_a_wrong_residual(monkeypatch: pytest.MonkeyPatch, wrong: str):
    model = small()

    def residual(p_NV: Tensor, q_ND: Tensor, ids_D: Tensor | None) -> Tensor:
        return p_NV if wrong == "p" else (q_ND - p_NV).clamp(min=1e-9)

    monkeypatch.setattr(f"{JUDGE}.residual", residual)
    drawn = drawn_by(model, layers_draft(model, [0]), SAMPLINGS["plain"])
    assert pvalue(drawn, exact(model, SAMPLINGS["plain"])) < 1e-9


class Sure(Fixed):
    """Drafts on while the draft is sure of its last tokens."""

    def go_on(self, draft: str, rows: Sequence[Live], confidence: Sequence[Sequence[float]]) -> bool:
        return min(values[-1] for values in confidence) > 0.2


class Withheld:
    """A draft that takes back a token of which it is not sure, once it has seen which one it is."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft

    def __getattr__(self, name: str) -> Any:
        return getattr(self.draft, name)

    def propose(self, rows: Sequence[Live], most: Sequence[int], go_on: GoOn) -> Proposal:
        proposal = self.draft.propose(rows, most, go_on)
        for tokens, confidence in zip(proposal.tokens, proposal.confidence, strict=True):
            if confidence and confidence[-1] <= 0.3:
                tokens.pop()
        return proposal


def drawn_while_sure(model: Any, draft: Any) -> list[tuple[int, ...]]:
    engine = Engine(model, None, {"draft": draft}, Sure("draft", 3), max_batch=4)
    requests = [Request(str(sample), tuple(PROMPT), SAMPLINGS["plain"], (), sample) for sample in range(SAMPLES // 2)]
    return [tuple(event.tokens) for event in serve(engine, requests)]


def test_drafting_on_may_depend_on_confidence_but_no_token_is_taken_back():
    model = small()
    expected = exact(model, SAMPLINGS["plain"])
    assert pvalue(drawn_while_sure(model, copy_of(model, 0.1)), expected) > 1e-3
    assert pvalue(drawn_while_sure(model, Withheld(copy_of(model, 0.1))), expected) < 1e-9


def test_a_swap_in_the_middle_changes_no_distribution():
    model = small()
    draft = copy_of(model, 0.1)
    first = {name: weight.clone() for name, weight in draft.reader.model.named_parameters()}

    def swap(steps: int) -> None:
        torch.manual_seed(steps)
        draft.prepare({name: weight + 0.1 * torch.randn_like(weight) for name, weight in first.items()}, steps)()

    engine = Engine(model, None, {"draft": draft}, Fixed("draft", 2), max_batch=250)
    requests = [Request(str(sample), tuple(PROMPT), SAMPLINGS["plain"], (), sample) for sample in range(SAMPLES)]
    drawn = [tuple(event.tokens) for event in serve(engine, requests, after=swap)]
    assert draft.version > 20 and pvalue(drawn, exact(model, SAMPLINGS["plain"])) > 1e-3


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "qwen2", "llama"])
def test_measured_acceptance_is_the_overlap(family: str):
    """Accepted tokens minus the sum of sum_v min(p, q) over the positions judged is a martingale."""
    model = tiny(family)
    sampling = Sampling(40, temperature=1.2, top_p=0.95, seed=3)
    engine = Engine(model, None, {"draft": copy_of(model, 0.03)}, Fixed("draft", 3), max_batch=16)
    prompts = [[5 + index, 6, 7] for index in range(32)]
    alphas: list[float] = []
    engine.observer = lambda seen: alphas.extend(alpha for row in seen.rows for alpha in row.alpha)
    counters = [event.counters for event in serve(engine, requests_of(prompts, sampling))]
    accepted = sum(counter.accepted for counter in counters if counter)
    verified = sum(counter.verified for counter in counters if counter)
    total = sum(counter.alpha_sum for counter in counters if counter)
    assert sum(alphas) == pytest.approx(total) and len(alphas) == verified > 400
    assert 0.2 < total / verified < 0.95
    deviation = sum(alpha * (1 - alpha) for alpha in alphas) ** 0.5
    assert abs(accepted - total) < 4 * deviation


def test_a_draft_that_is_the_target_is_always_accepted():
    model = small()
    engine = Engine(model, None, {"draft": copy_of(model)}, Fixed("draft", 3), max_batch=8)
    sampling = Sampling(20, temperature=1.1, seed=2)
    for event in serve(engine, requests_of([[3, index % SIZE] for index in range(30)], sampling)):
        counters = event.counters
        assert counters is not None and counters.accepted == counters.verified > 10
        assert counters.alpha_sum == pytest.approx(counters.verified, abs=1e-4)


def test_disjoint_supports_accept_nothing():
    """A bias in the output layer leaves the target the even tokens, and the draft the odd ones."""
    model, other = tiny("phi"), tiny("phi")
    with torch.no_grad():
        model.lm_head.bias[1::2] = -1e9
        other.lm_head.bias[0::2] = -1e9
    draft = layers_draft(other, range(other.config.num_hidden_layers))
    engine = Engine(model, None, {"draft": draft}, Fixed("draft", 3), max_batch=4)
    for event in serve(engine, requests_of([[5, 6], [7], [9, 8]], Sampling(12, seed=1))):
        counters = event.counters
        assert counters is not None and counters.accepted == 0 and counters.verified == 11 - 1
        assert counters.alpha_sum == 0 and all(token % 2 == 0 for token in event.tokens)


def second_tokens(*, same: bool) -> list[int]:
    """Of a uniform distribution over three tokens, by many seeds: the second answer's second token, when the first
    answer to the same prompt stands in the shared cache; `same`: of the same seed."""
    model = llama(3)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    draft = NgramDraft(size=1)
    engine = Engine(model, None, {"ngram": draft}, Fixed("ngram", 1), max_batch=1)
    tokens: list[int] = []
    for seed in range(250):
        for place, other in enumerate((0, 0 if same else 1 << 32)):
            request = Request(f"{seed} {place}", (0, 1), Sampling(3, seed=seed + other))
            last = serve(engine, [request])[0].tokens[1]
        tokens.append(last)
        draft.expire(1e18)  # what other pairs have left
    return tokens


def test_what_a_request_has_drawn_before_is_not_proposed_to_it():
    """A proposal that its own random numbers have drawn is judged by them once more: (2/9, 5/9, 2/9) comes out."""
    for same in (True, False):
        counts = Counter(second_tokens(same=same))
        assert stats.chisquare([counts[token] for token in range(3)]).pvalue > 1e-3


def test_every_pair_of_tokens_is_drawn_as_often_as_it_should():
    """One random number for two purposes would leave each token right and pairs of them wrong."""
    model = small()
    drawn = drawn_by(model, copy_of(model, 0.3), Sampling(2, temperature=1.5, seed=11), gamma=1)
    expected = exact(model, Sampling(LENGTH, temperature=1.5))
    chances = Counter[tuple[int, ...]]()
    for tokens, chance in expected.items():
        chances[tokens[:2]] += chance  # type: ignore[assignment]
    counts = Counter(drawn)
    cells = list(itertools.product(range(SIZE), repeat=2))
    wanted = [len(drawn) * chances[cell] for cell in cells]
    scale = len(drawn) / sum(wanted)
    assert stats.chisquare([counts[cell] for cell in cells], [value * scale for value in wanted]).pvalue > 1e-3
