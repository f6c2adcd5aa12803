"""Low precision: bf16 heads and autocast stay close to float32, softmax and sums are taken in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.ops import head_logits, linear_terms
from limbeck.types import Head, Hidden, Terms

N, V, H, G = 24, 200, 32, 48
bf16 = torch.bfloat16


def make() -> tuple[Tensor, Head, Hidden, Tensor]:
    """Numbers that bf16 holds exactly, in float32."""
    hidden = torch.randn(N, H).to(bf16).float().requires_grad_()
    head = Head((torch.randn(V, H) / 4).to(bf16).float().requires_grad_(), torch.randn(V).requires_grad_())
    teacher = Hidden(torch.randn(N, G).to(bf16).float(), Head((torch.randn(V, G) / 5).to(bf16).float()))
    return hidden, head, teacher, torch.randint(0, V, (N,))


def run(hidden: Tensor, head: Head, teacher: Hidden, tokens: Tensor) -> tuple[Terms, list[Tensor]]:
    options: dict[str, Any] = {"divergence": "jsd", "weights": (1.0, 0.5), "chunk_tokens": 5, "stats": ("forward_kl",)}
    terms = linear_terms(hidden, head, teacher, tokens, **options)
    inputs = [x for x in (hidden, head.weight_VH, head.bias_V) if x is not None]
    return terms, list(torch.autograd.grad(terms.loss_N.sum(), inputs, retain_graph=True))


def error(found: Tensor, right: Tensor) -> float:
    return ((found.double() - right.double()).norm() / right.double().norm()).item()


def test_bf16_is_close_to_float32() -> None:
    hidden, head, teacher, tokens = make()
    right, right_grads = run(hidden, head, teacher, tokens)
    low_hidden = hidden.detach().to(bf16).requires_grad_()
    low_head = replace(head, weight_VH=head.weight_VH.detach().to(bf16).requires_grad_())
    low_teacher = Hidden(teacher.hidden_NH.to(bf16), replace(teacher.head, weight_VH=teacher.head.weight_VH.to(bf16)))
    terms, grads = run(low_hidden, low_head, low_teacher, tokens)
    assert terms.loss_N.dtype == terms.stats["forward_kl"].dtype == torch.float32
    assert [grad.dtype for grad in grads] == [bf16, bf16, torch.float32]
    assert error(terms.loss_N, right.loss_N) < 0.01
    assert all(error(grad, want) < 0.02 for grad, want in zip(grads, right_grads, strict=True))


def test_the_heads_gradient_is_summed_in_float32() -> None:
    """1024 equal tokens one a chunk: a sum in bf16 stops growing at 256 to 512 of them."""
    _, head, teacher, _ = make()
    weight = head.weight_VH.detach().to(bf16).requires_grad_()
    hidden = torch.randn(1, H).to(bf16)
    grads: list[Tensor] = []
    for tokens in (1, 1024):
        signal = Hidden(teacher.hidden_NH[:1].expand(tokens, G), teacher.head)
        loss = linear_terms(hidden.expand(tokens, H), Head(weight), signal, divergence="jsd", chunk_tokens=1).loss_N
        grads.append(torch.autograd.grad(loss.mean(), weight)[0])
    assert error(grads[1], grads[0]) < 0.01


def test_autocast_casts_the_product_alone() -> None:
    hidden, head, teacher, tokens = make()
    hidden = (hidden + torch.randn(N, H) / 100).detach().requires_grad_()  # no longer exact in bf16
    full, full_grads = run(hidden, head, teacher, tokens)
    with torch.autocast("cpu", dtype=bf16):
        terms, grads = run(hidden, head, teacher, tokens)
        logits = head_logits(hidden, head)
    assert logits.dtype == terms.loss_N.dtype == torch.float32
    assert all(grad.dtype == torch.float32 for grad in grads)
    # What autocast does to a linear layer, and float32 from there on.
    assert head.bias_V is not None
    expected = (hidden.to(bf16) @ head.weight_VH.to(bf16).T).float() + head.bias_V
    torch.testing.assert_close(logits, expected)
    nll = torch.nn.functional.cross_entropy(expected, tokens, reduction="none")
    torch.testing.assert_close(terms.nll_N, nll)
    assert 1e-4 < error(terms.nll_N, full.nll_N) < 0.01  # type: ignore[arg-type]
    assert all(error(grad, want) < 0.02 for grad, want in zip(grads, full_grads, strict=True))


def test_recomputation_outside_autocast_keeps_its_dtype() -> None:
    """`backward` usually runs after the autocast block."""
    hidden, head, teacher, tokens = make()
    hidden = (hidden + torch.randn(N, H) / 100).detach().requires_grad_()
    with torch.autocast("cpu", dtype=bf16):
        terms, kept = run(hidden, head, teacher, tokens)
    factors = torch.ones(N)
    factors[0] = 1 + 1e-6  # not constant: sweeps again
    again = torch.autograd.grad((terms.loss_N * factors).sum(), [hidden, head.weight_VH])
    for grad, want in zip(again, kept, strict=False):
        assert error(grad, want) < 1e-4


def test_autocast_leaves_float64_alone() -> None:
    hidden, head, teacher, tokens = make()
    double = replace(head, weight_VH=head.weight_VH.double(), bias_V=None)
    signal = Hidden(teacher.hidden_NH.double(), replace(teacher.head, weight_VH=teacher.head.weight_VH.double()))
    right = linear_terms(hidden.double(), double, signal, tokens, divergence="jsd")
    with torch.autocast("cpu", dtype=bf16):
        found = linear_terms(hidden.double(), double, signal, tokens, divergence="jsd")
    assert found.loss_N.dtype == torch.float64
    torch.testing.assert_close(found.loss_N, right.loss_N, rtol=0, atol=0)


@pytest.mark.parametrize("dtypes", [(bf16, torch.float32), (torch.float32, bf16)], ids=str)
def test_hidden_states_take_the_heads_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Hidden states kept in bf16 to save memory, or a final norm that computes in float32."""
    hidden, head, teacher, tokens = make()
    given = hidden.detach().to(dtypes[0]).requires_grad_()
    mixed = replace(head, weight_VH=head.weight_VH.detach().to(dtypes[1]).requires_grad_())
    terms, grads = run(given, mixed, teacher, tokens)
    assert [grad.dtype for grad in grads[:2]] == list(dtypes)
    assert error(terms.loss_N, run(hidden, head, teacher, tokens)[0].loss_N) < 0.01
