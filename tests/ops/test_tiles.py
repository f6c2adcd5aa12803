"""The fast path of a tile (closed forms, eager and compiled) against autograd over the definitions."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.ops import DIVERGENCES, linear_terms, tiles
from limbeck.ops.closed_forms import CLOSED_FORMS, Point
from limbeck.types import Dense, Head, Hidden

N, V, H = 6, 40, 8
STATS = ("forward_kl", "reverse_kl", "agreement", "entropy")
PARAMS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in DIVERGENCES]
PARAMS += [("jsd", {"beta": 0.1, "normalize": True}), ("skew_forward_kl", {"skew": 0.0})]
PARAMS += [("skew_reverse_kl", {"skew": 0.0}), ("skew_forward_kl", {"skew": 0.7}), ("skew_reverse_kl", {"skew": 0.7})]


def gradient_by_logits(name: str, params: dict[str, Any], student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """By autograd, in float64."""
    logits = student.double().requires_grad_()
    with torch.enable_grad():
        log_q = torch.log_softmax(logits, -1)
        value = DIVERGENCES[name](log_q, torch.log_softmax(teacher.double(), -1), **params)
        (grad,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), grad


@pytest.mark.parametrize(("name", "params"), PARAMS, ids=str)
@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0])  # at 300 most float32 probabilities underflow to zero
def test_closed_form_is_the_definition(name: str, params: dict[str, Any], spread: float) -> None:
    student, teacher = spread * torch.randn(2, N, V)
    log_q, log_p = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    at = Point(log_q, log_p, log_q.exp(), log_p.exp())
    value, slope = CLOSED_FORMS[DIVERGENCES[name]](at, **params)
    found = slope - at.q_NV * slope.sum(-1, keepdim=True)
    expected, grad = gradient_by_logits(name, params, student, teacher)
    rounding = 1e-6 * (10 + spread)  # of float32 log-probabilities as large as a few times `spread`
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=rounding)
    torch.testing.assert_close(found.double(), grad, rtol=1e-4, atol=rounding)


@pytest.fixture(params=["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "compiled":
        if shutil.which("g++") is None:
            pytest.skip("compiled tiles: expected a C++ compiler, found none")
        monkeypatch.setattr(tiles, "COMPILE_FROM", 1)
    yield request.param
    tiles._compiled.cache_clear()  # pyright: ignore[reportPrivateUsage]
    tiles._compiled_logprobs.cache_clear()  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.usefixtures("path")
def test_fast_is_careful(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    """Divergence, likelihood, statistics, bias, scale, soft-cap, uneven last tile; the careful path is forced by taking
    the closed forms away."""
    monkeypatch.setattr(tiles, "TILE_ENTRIES", 4 * V)
    hidden = torch.randn(11, H, requires_grad=True)
    head = Head(torch.randn(V, H).requires_grad_(), torch.randn(V).requires_grad_(), scale=0.7, softcap=3.0)
    teacher = Hidden(torch.randn(11, H), Head(torch.randn(V, H), softcap=5.0))
    tokens = torch.randint(0, V, (11,))

    def run() -> list[Tensor]:
        options: dict[str, Any] = {"divergence": "jsd", "weights": (0.7, 0.3), "stats": STATS, "chunk_tokens": 7}
        terms = linear_terms(hidden, head, teacher, tokens, temperature=temperature, **options)
        assert head.bias_V is not None
        return [
            terms.loss_N,
            *terms.stats.values(),
            *torch.autograd.grad(terms.loss_N.sum(), (hidden, head.weight_VH, head.bias_V)),
        ]

    fast = run()
    monkeypatch.setattr(tiles, "CLOSED_FORMS", {})
    for found, right in zip(fast, run(), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("path")
def test_weights_see_the_tokens_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, an impossible token of the head (its bias is -inf) among the others, an uneven last tile."""
    monkeypatch.setattr(tiles, "TILE_ENTRIES", 4 * V)
    bias = torch.randn(V).index_fill(0, torch.tensor([5]), -torch.inf)
    head = Head(torch.randn(V, H), bias, scale=0.7)
    teacher = Hidden(torch.randn(11, H), Head(torch.randn(V, H), softcap=5.0))
    hidden, tokens = torch.randn(11, H), torch.randint(6, V, (11,))
    seen: list[list[Tensor]] = []

    def weights(_: slice, student_n: Tensor | None, teacher_n: Tensor | None) -> tuple[float, float]:
        assert student_n is not None and teacher_n is not None
        seen.append([student_n, teacher_n])
        return 1.0, 0.0

    linear_terms(hidden, head, teacher, tokens, divergence="forward_kl", weights=weights, chunk_tokens=7)
    student_NV = 0.7 * (hidden.double() @ head.weight_VH.double().T + bias.double())
    teacher_NV = 5 * torch.tanh(teacher.hidden_NH.double() @ teacher.head.weight_VH.double().T / 5)
    for logits_NV, parts in zip((student_NV, teacher_NV), zip(*seen, strict=True), strict=True):
        expected_N = logits_NV.log_softmax(-1)[range(11), tokens]
        torch.testing.assert_close(torch.cat(parts).double(), expected_N, rtol=1e-5, atol=1e-5)


def test_compiled_is_what_a_large_vocabulary_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tiles.Request] = []

    def compiled(request: tiles.Request) -> Any:
        asked.append(request)
        return lambda tile: tiles._put(tiles.fast, request, tile)  # pyright: ignore[reportPrivateUsage]

    monkeypatch.setattr(tiles, "_compiled", compiled)
    monkeypatch.setattr(tiles, "_compiler_at_hand", lambda: True)
    for vocabulary in (tiles.COMPILE_FROM - 1, tiles.COMPILE_FROM):
        head = Head(torch.randn(vocabulary, H))
        linear_terms(torch.randn(N, H), head, None, torch.zeros(N, dtype=torch.long))
    assert len(asked) == 1
    monkeypatch.setattr(tiles, "_compiler_at_hand", lambda: False)
    linear_terms(torch.randn(N, H), head, None, torch.zeros(N, dtype=torch.long))
    assert len(asked) == 1


@pytest.mark.parametrize("name", DIVERGENCES)
def test_rows_with_zero_probabilities_among_others(name: str) -> None:
    """Row 2 has a token that is impossible for the teacher, row 4 one that is impossible for both: these rows alone are
    taken with care, and no other row is touched by it."""
    logits = torch.randn(N, V, dtype=torch.float64)
    teacher = torch.randn(N, V, dtype=torch.float64)
    teacher[2, 5] = teacher[4, 7] = logits[4, 7] = -torch.inf
    finite = torch.tensor([name not in ("reverse_kl", "jeffreys") or row != 2 for row in range(N)])
    expected, grad = gradient_by_logits(name, {}, logits, teacher)
    request = tiles.Request(DIVERGENCES[name], (), 1.0, (), tiles.Finish(), tiles.Finish())
    product = logits.clone()
    ones = torch.ones(N, dtype=torch.float64)
    tile = tiles.Tile(product, torch.zeros_like(logits[0]), teacher, divergence_weight_n=ones)
    values, bias_grad = tiles.tile_terms(request, tile)
    torch.testing.assert_close(values["divergence"], expected)
    torch.testing.assert_close(product[finite], grad[finite])
    assert bias_grad is not None
    if bool(finite.all()):
        torch.testing.assert_close(bias_grad, grad.sum(0))


def test_zero_weight_is_left_out() -> None:
    """An infinite divergence that nobody asked to minimise leaves the gradient of the likelihood alone."""
    hidden = torch.randn(N, H, requires_grad=True)
    head = Head(torch.randn(V, H).requires_grad_())
    logprobs = torch.log_softmax(torch.randn(N, V).index_fill(1, torch.tensor([3]), -torch.inf), -1)
    tokens = torch.randint(4, V, (N,))
    terms = linear_terms(hidden, head, Dense(logprobs), tokens, divergence="reverse_kl", weights=(0.0, 1.0))
    alone = linear_terms(hidden, head, None, tokens)
    found = torch.autograd.grad(terms.loss_N.sum(), (hidden, head.weight_VH))
    torch.testing.assert_close(found, torch.autograd.grad(alone.loss_N.sum(), (hidden, head.weight_VH)))
