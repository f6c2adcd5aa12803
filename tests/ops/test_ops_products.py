"""Products by oneDNN are torch's own products: values, gradients, and where they are left alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.ops import products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")

ROWS, INPUTS, OUTPUTS = 96, 272, 260  # above both bounds


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """As on a machine where oneDNN wins; the shapes of the weights of the products that it was given."""
    shapes: list[tuple[int, ...]] = []
    given = products._onednn

    def told(hidden: Tensor, weight_VH: Tensor, bias_V: Tensor | None = None) -> Tensor:
        shapes.append(tuple(weight_VH.shape))
        return given(hidden, weight_VH, bias_V)

    monkeypatch.setattr(products, "onednn_wins", lambda: True)
    monkeypatch.setattr(products, "_onednn", told)
    yield shapes


def inputs(*leading: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(*leading, INPUTS, dtype=dtype, requires_grad=True)
    return hidden, torch.randn(OUTPUTS, INPUTS, dtype=dtype, requires_grad=True), torch.randn(OUTPUTS, dtype=dtype)


@pytest.mark.parametrize("leading", [(ROWS,), (4, ROWS // 4)])
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients_are_those_of_float64(taken: list, leading: tuple[int, ...], biased: bool):
    hidden, weight, bias = inputs(*leading)
    given = [hidden, weight, *([bias.requires_grad_()] if biased else [])]
    upstream = torch.randn(*leading, OUTPUTS)
    found = products.linear(*given)
    gradients = torch.autograd.grad(found, given, upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = F.linear(*exact)
    expected_gradients = torch.autograd.grad(expected, exact, upstream.double())
    assert found.shape == expected.shape and torch.allclose(found.double(), expected, atol=1e-4)
    for mine, right in zip(gradients, expected_gradients, strict=True):
        assert mine.shape == right.shape and torch.allclose(mine.double(), right, atol=1e-3)
    assert taken == [(OUTPUTS, INPUTS), (INPUTS, OUTPUTS), (INPUTS, ROWS)]  # product, and both its gradients


def test_only_gradients_that_are_asked_for_are_computed(taken: list):
    hidden, weight, _ = inputs(ROWS)
    products.linear(hidden, weight.detach()).sum().backward()
    assert hidden.grad is not None and taken == [(OUTPUTS, INPUTS), (INPUTS, OUTPUTS)]


@pytest.mark.parametrize("by_weight", [False, True])
def test_a_second_derivative_is_right(taken: list, by_weight: bool):
    hidden, weight, _ = inputs(ROWS)
    of, by = (weight, hidden) if by_weight else (hidden, weight)
    seconds = []
    for product in (products.linear, F.linear):
        (first,) = torch.autograd.grad(product(hidden, weight).pow(2).sum(), of, create_graph=True)
        seconds.append(torch.autograd.grad(first.pow(2).sum(), by)[0])
    assert torch.allclose(*seconds, rtol=1e-3, atol=seconds[1].abs().max().item() * 1e-5)


def small(hidden: Tensor, weight: Tensor) -> Tensor:
    return products.linear(hidden[:1], weight)


def double(hidden: Tensor, weight: Tensor) -> Tensor:
    return products.linear(hidden.double(), weight.double())


def half(hidden: Tensor, weight: Tensor) -> Tensor:
    return products.linear(hidden.bfloat16(), weight.bfloat16())


def autocast(hidden: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return products.linear(hidden, weight)


@pytest.mark.parametrize("case", [small, double, half, autocast])
def test_other_products_stay_torchs_own(taken: list, case: Callable[..., Tensor]):
    hidden, weight, _ = inputs(ROWS)
    found = case(hidden, weight)
    plain = {small: hidden[:1] @ weight.T, double: hidden.double() @ weight.double().T}.get(
        case, hidden.bfloat16() @ weight.bfloat16().T
    )
    assert not taken and found.dtype == plain.dtype and torch.allclose(found, plain, rtol=1e-5, atol=1e-4)


def test_subclasses_of_tensors_keep_their_own_way(taken: list):
    class Marked(Tensor):
        pass

    hidden, weight, _ = inputs(ROWS)
    assert type(products.linear(hidden, weight.detach().as_subclass(Marked))) is Marked
    assert not taken


@pytest.mark.parametrize("dtype", products.packable())
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_a_packed_product_is_the_own(dtype: torch.dtype, rows: int):
    hidden, weight, bias = (tensor.detach() for tensor in inputs(2, rows, dtype=dtype))
    packed = products.Packed(weight, bias)
    expected = F.linear(hidden, weight, bias)
    found = packed(hidden)
    assert found.dtype == dtype and found.shape == expected.shape
    close = 1e-5 if dtype == torch.float32 else 1e-2
    assert (found - expected).abs().max() <= close * expected.abs().max()


def test_outer_is_the_gradient_by_the_weight(taken: list):
    grad, hidden = torch.randn(ROWS, OUTPUTS), torch.randn(ROWS, INPUTS)
    exact = torch.einsum("nv,nh->vh", grad.double(), hidden.double())
    assert torch.allclose(products.outer(grad, hidden).double(), exact, atol=1e-3) and len(taken) == 1
    few = products.outer(grad[:, :8], hidden[:, :8])
    assert torch.allclose(few.double(), exact[:8, :8], atol=1e-3) and len(taken) == 1


def test_a_way_wins_by_being_faster_and_right():
    own = torch.ones(4)

    def slow() -> Tensor:
        time.sleep(0.002)
        return own

    def hindered() -> Tensor:
        time.sleep(0.01 if next(calls) < 10 else 0)
        return own

    calls = itertools.count()
    wins: Any = products._wins
    assert wins(lambda: own, slow, 5)
    assert not wins(slow, slow, 9) and not wins(slow, lambda: own, 9)
    assert not wins(lambda: own + 0.01, slow, 9)  # faster, but something else
    assert wins(hindered, slow, 20)  # faster, once the machine is free


def test_a_machine_without_onednn_keeps_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "_has_onednn", lambda: False)
    for probe in (products.onednn_wins, lambda: products.packing_pays(torch.float32)):
        products.onednn_wins.cache_clear()
        products.packing_pays.cache_clear()
        assert not probe()
    products.onednn_wins.cache_clear()
    products.packing_pays.cache_clear()


def test_a_dtype_that_the_processor_cannot_pack_does_not_pay(monkeypatch: pytest.MonkeyPatch):
    """Processors with AVX2 alone have no bf16 for oneDNN: the probe says so, and does not try it."""
    monkeypatch.setattr(products, "_has_bf16", lambda: False)
    products.packing_pays.cache_clear()
    monkeypatch.setattr(products, "Packed", None)
    assert products.packable() == (torch.float32,) and not products.packing_pays(torch.bfloat16)
    products.packing_pays.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_into_given_memory(taken: list, dtype: torch.dtype):
    """More rows than go at once, by oneDNN and by torch's own way."""
    outputs = products.HEAD_BLOCK + 40
    hidden, weight = torch.randn(ROWS, INPUTS).to(dtype), torch.randn(outputs, INPUTS).to(dtype)
    out = torch.full((ROWS, outputs), torch.nan, dtype=dtype)
    given = products.linear_into(out, hidden, weight)
    exact = hidden.double() @ weight.double().T
    assert given.data_ptr() == out.data_ptr() and (out - exact).abs().max() <= exact.abs().max() * (
        4e-3 if dtype == torch.bfloat16 else 1e-6
    )
    assert len(taken) == (9 if dtype == torch.float32 else 0)
    back = products.back(out, weight)
    assert torch.allclose(back, out @ weight, rtol=1e-2, atol=1e-3 * float(back.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outer_into_adds_or_replaces(taken: list, dtype: torch.dtype):
    """A gradient in float32, of products in both dtypes, with more rows than go at once."""
    outputs = products.HEAD_BLOCK + 40
    grad, hidden = torch.randn(8, outputs).to(dtype), torch.randn(8, 64).to(dtype)
    exact = grad.double().T @ hidden.double()
    total = torch.full((outputs, 64), torch.nan)
    products.outer_into(total, grad, hidden, add=False)
    close = exact.abs().max() * (8e-3 if dtype == torch.bfloat16 else 1e-6)
    assert (total - exact).abs().max() <= close
    products.outer_into(total, grad, hidden, add=True)
    assert (total - 2 * exact).abs().max() <= 2 * close
    assert bool(taken) == (dtype == torch.float32)


@pytest.mark.parametrize("add", [False, True])
def test_outer_into_by_torchs_own_way(add: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "onednn_wins", lambda: False)
    grad, hidden, total = torch.randn(ROWS, OUTPUTS), torch.randn(ROWS, INPUTS), torch.ones(OUTPUTS, INPUTS)
    products.outer_into(total, grad, hidden, add=add)
    assert torch.allclose(total, grad.T @ hidden + add, atol=1e-3)
