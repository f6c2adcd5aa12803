"""Products by oneDNN are torch's own products: values, gradients, and where they are left alone."""

from __future__ import annotations

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


def test_a_second_derivative_is_right(taken: list):
    hidden, weight, _ = inputs(ROWS)
    seconds = []
    for product in (products.linear, F.linear):
        (first,) = torch.autograd.grad(product(hidden, weight).pow(2).sum(), hidden, create_graph=True)
        seconds.append(torch.autograd.grad(first.pow(2).sum(), weight)[0])
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


@pytest.mark.parametrize("dtype", products.PACKABLE)
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

    wins: Any = products._wins
    assert wins(lambda: own, slow)
    assert not wins(slow, slow) and not wins(slow, lambda: own)
    assert not wins(lambda: own + 0.01, slow)  # faster, but something else


def test_a_machine_without_onednn_keeps_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "_has_onednn", lambda: False)
    for probe in (products.onednn_wins, lambda: products.packing_pays(torch.float32)):
        products.onednn_wins.cache_clear()
        products.packing_pays.cache_clear()
        assert not probe()
    products.onednn_wins.cache_clear()
    products.packing_pays.cache_clear()
