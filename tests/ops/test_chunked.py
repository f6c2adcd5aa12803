"""`linear_terms` against a dense implementation with plain autograd, written here on probabilities, in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.ops import DIVERGENCES, chunked, head_logits, linear_divergence, linear_terms
from limbeck.types import Dense, Head, Hidden, Terms

N, V, H, G = 7, 11, 5, 6
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 1.5},
    "rows": {"rows": 9},
    "all": {"bias": True, "scale": 0.7, "softcap": 1.5, "rows": 9},
}
CASES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in DIVERGENCES]
CASES += [("jsd", {"beta": 0.2, "normalize": True}), ("skew_reverse_kl", {"skew": 0.4})]
STATS = ("forward_kl", "reverse_kl", "agreement", "entropy", "teacher_entropy")


def dense_logits(hidden: Tensor, head: Head) -> Tensor:
    weight, bias = head.weight_VH, head.bias_V
    if head.rows is not None:
        weight, bias = weight[: head.rows], None if bias is None else bias[: head.rows]
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = logits * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


def dense_divergence(name: str, q: Tensor, p: Tensor, skew: float = 0.1, beta: float = 0.5, normalize: bool = False):
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    middle = beta * p + (1 - beta) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jeffreys": lambda: kl(p, q) + kl(q, p),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
        "skew_forward_kl": lambda: kl(p, skew * p + (1 - skew) * q),
        "skew_reverse_kl": lambda: kl(q, (1 - skew) * p + skew * q),
        "jsd": lambda: (beta * kl(p, middle) + (1 - beta) * kl(q, middle)) / (beta - beta**2 if normalize else 1),
    }[name]()


def dense_terms(
    hidden: Tensor, head: Head, teacher: Hidden, tokens: Tensor, name: str, temperature: float, **params: Any
) -> tuple[Tensor, Tensor]:
    """Divergence and negative log-likelihood, each (N,)."""
    student_logits, teacher_logits = dense_logits(hidden, head), dense_logits(teacher.hidden_NH, teacher.head).detach()
    q, p = (torch.softmax(logits / temperature, -1) for logits in (student_logits, teacher_logits))
    likelihood = torch.softmax(student_logits, -1)[torch.arange(len(tokens)), tokens]
    return dense_divergence(name, q, p, **params), -likelihood.log()


def make_head(width: int, bias: bool = False, **options: Any) -> Head:
    weight = torch.randn(V, width, dtype=torch.float64, requires_grad=True)
    return Head(weight, torch.randn(V, dtype=torch.float64, requires_grad=True) if bias else None, **options)


def make(head: str = "plain", tokens: int = N) -> tuple[Tensor, Head, Hidden, Tensor]:
    hidden = torch.randn(tokens, H, dtype=torch.float64, requires_grad=True)
    student, teacher = make_head(H, **HEADS[head]), make_head(G, **HEADS[head])
    signal = Hidden(torch.randn(tokens, G, dtype=torch.float64, requires_grad=True), teacher)
    return hidden, student, signal, torch.randint(0, student.size, (tokens,))


def gradients(value: Tensor, hidden: Tensor, head: Head) -> list[Tensor]:
    inputs = [x for x in (hidden, head.weight_VH, head.bias_V) if x is not None]
    return list(torch.autograd.grad(value, inputs, retain_graph=True))


@pytest.mark.parametrize("head_name", HEADS)
@pytest.mark.parametrize(("name", "params"), CASES, ids=str)
def test_chunked_is_whole(name: str, params: dict[str, Any], head_name: str) -> None:
    hidden, head, signal, tokens = make(head_name)
    for temperature, chunk_tokens in [(1.0, 1), (1.0, 3), (1.0, None), (1.7, 4), (0.5, 50)]:
        terms = linear_terms(
            *(hidden, head, signal, tokens),
            divergence=name,
            temperature=temperature,
            weights=(0.7, 0.3),
            chunk_tokens=chunk_tokens,
            **params,
        )
        divergence, nll = dense_terms(hidden, head, signal, tokens, name, temperature, **params)
        expected = 0.7 * divergence + 0.3 * nll
        torch.testing.assert_close(terms.loss_N, expected)
        torch.testing.assert_close(terms.divergence_N, divergence)
        torch.testing.assert_close(terms.nll_N, nll)
        # loss_N alone with a constant upstream gradient: the gradients of the forward pass, scaled.
        found = gradients(terms.loss_N.sum() * 3 / N, hidden, head)
        for grad, right in zip(found, gradients(expected.sum() * 3 / N, hidden, head), strict=True):
            torch.testing.assert_close(grad, right)
        if head.rows is not None:
            assert all((grad[head.rows :] == 0).all() for grad in found[1:])


@pytest.mark.parametrize("upstreams", list(itertools.product([False, True], repeat=3))[1:], ids=str)
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 0.0), (0.0, 1.0), None, "function"], ids=str)
def test_any_upstream_gradient(upstreams: tuple[bool, ...], weights: Any) -> None:
    hidden, head, signal, tokens = make("all")
    w_divergence, w_nll = torch.rand(2, N, dtype=torch.float64)
    if weights == "function":
        function = lambda chunk, *_: (w_divergence[chunk], w_nll[chunk])  # noqa: E731
    else:
        function = weights
        w_divergence, w_nll = (1.0, 0.0) if weights is None else weights
    terms = linear_terms(hidden, head, signal, tokens, divergence="jsd", weights=function, chunk_tokens=3)
    divergence, nll = dense_terms(hidden, head, signal, tokens, "jsd", 1.0)
    outputs = [terms.loss_N, terms.divergence_N, terms.nll_N]
    expected = [w_divergence * divergence + w_nll * nll, divergence, nll]
    factors = [torch.randn(N, dtype=torch.float64) if asked else torch.tensor(0.0) for asked in upstreams]
    used = [i for i, asked in enumerate(upstreams) if asked]
    found = gradients(sum((factors[i] * outputs[i]).sum() for i in used), hidden, head)  # type: ignore[arg-type]
    right = gradients(sum((factors[i] * expected[i]).sum() for i in used), hidden, head)  # type: ignore[arg-type]
    for grad, want in zip(found, right, strict=True):
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("output", ["divergence_N", "nll_N"])
def test_a_constant_upstream_gradient_of_one_term(output: str) -> None:
    hidden, head, signal, tokens = make()
    terms = linear_terms(hidden, head, signal, tokens, divergence="jsd", weights=(0.7, 0.3), chunk_tokens=2)
    divergence, nll = dense_terms(hidden, head, signal, tokens, "jsd", 1.0)
    expected = divergence if output == "divergence_N" else nll
    found = gradients(getattr(terms, output).sum(), hidden, head)
    torch.testing.assert_close(found, gradients(expected.sum(), hidden, head))


def test_backward_twice_and_never_into_anothers_gradient() -> None:
    hidden, head, signal, _ = make()
    loss = linear_terms(hidden, head, signal, divergence="jsd", chunk_tokens=3).loss_N.sum()
    loss.backward(retain_graph=True)
    once = head.weight_VH.grad
    assert once is not None
    once = once.clone()
    (2 * loss).backward(retain_graph=True)
    torch.testing.assert_close(head.weight_VH.grad, 3 * once)
    loss.backward()
    torch.testing.assert_close(head.weight_VH.grad, 4 * once)


def test_second_derivatives_are_refused() -> None:
    hidden, head, signal, _ = make()
    loss = linear_terms(hidden, head, signal, divergence="jsd").loss_N
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss.sum(), hidden, create_graph=True)


def test_numerical_gradients() -> None:
    _, head, signal, tokens = make("all", tokens=3)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        student = replace(head, weight_VH=weight, bias_V=bias)
        terms = linear_terms(hidden, student, signal, tokens, divergence="jsd", weights=(0.7, 0.3), chunk_tokens=2)
        assert terms.divergence_N is not None and terms.nll_N is not None
        return terms.loss_N, terms.divergence_N, terms.nll_N

    assert head.bias_V is not None
    hidden = torch.randn(3, H, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (hidden, head.weight_VH, head.bias_V))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk_tokens", [1, 3, None])
def test_statistics(temperature: float, chunk_tokens: int | None) -> None:
    hidden, head, signal, tokens = make("all")
    options: dict[str, Any] = {"stats": STATS, "temperature": temperature, "chunk_tokens": chunk_tokens}
    terms = linear_terms(hidden, head, signal, tokens, divergence="jsd", **options)
    q = torch.softmax(dense_logits(hidden, head), -1).detach()
    p = torch.softmax(dense_logits(signal.hidden_NH, signal.head), -1).detach()
    expected = {
        "forward_kl": dense_divergence("forward_kl", q, p),
        "reverse_kl": dense_divergence("reverse_kl", q, p),
        "agreement": torch.tensor([float(a == b) for a, b in zip(q.argmax(-1), p.argmax(-1), strict=True)]).double(),
        "entropy": torch.distributions.Categorical(q).entropy(),
        "teacher_entropy": torch.distributions.Categorical(p).entropy(),
    }
    assert terms.stats.keys() == expected.keys() and not any(x.requires_grad for x in terms.stats.values())
    torch.testing.assert_close(terms.stats, expected)
    # They change nothing else, and cross-entropy takes them too.
    without = linear_terms(hidden, head, signal, tokens, divergence="jsd", temperature=temperature)
    torch.testing.assert_close(terms.loss_N, without.loss_N)
    alone = linear_terms(hidden, head, None, tokens, stats=("entropy",))
    torch.testing.assert_close(alone.stats["entropy"], expected["entropy"])


def test_cross_entropy_alone() -> None:
    hidden, head, _, tokens = make("all")
    terms = linear_terms(hidden, head, None, tokens, chunk_tokens=2)
    expected = torch.nn.functional.cross_entropy(dense_logits(hidden, head), tokens, reduction="none")
    torch.testing.assert_close(terms.loss_N, expected)
    torch.testing.assert_close(terms.nll_N, expected)
    assert terms.divergence_N is None
    found = gradients(terms.loss_N.mean(), hidden, head)
    torch.testing.assert_close(found, gradients(expected.mean(), hidden, head))


def test_default_weights() -> None:
    hidden, head, signal, tokens = make()
    terms = linear_terms(hidden, head, signal, tokens, divergence="reverse_kl")
    torch.testing.assert_close(terms.loss_N, terms.divergence_N)
    assert linear_terms(hidden, head, signal, divergence="reverse_kl").nll_N is None


@pytest.mark.parametrize("rows", [None, 9])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_dense_signal_is_the_hidden_one(rows: int | None, temperature: float) -> None:
    hidden, head, signal, tokens = make()
    head, teacher = replace(head, rows=rows), replace(signal.head, rows=rows)
    logprobs = torch.log_softmax(dense_logits(signal.hidden_NH, teacher), -1)
    found = []
    for given in (Hidden(signal.hidden_NH, teacher), Dense(logprobs)):
        terms = linear_terms(
            *(hidden, head, given, tokens % head.size),
            divergence="jsd",
            temperature=temperature,
            chunk_tokens=3,
            stats=STATS,
        )
        found.append((terms, gradients(terms.loss_N.sum(), hidden, head)))
    torch.testing.assert_close(found[0][0].loss_N, found[1][0].loss_N)
    torch.testing.assert_close(found[0][0].stats, found[1][0].stats)
    torch.testing.assert_close(found[0][1], found[1][1])


def test_dense_signal_with_zeros() -> None:
    """A teacher that rules tokens out: reverse KL is infinite, the others are finite and so are their gradients."""
    hidden, head, signal, _ = make()
    logits = dense_logits(signal.hidden_NH, signal.head).detach()
    logits[:, 3] = -torch.inf
    teacher = Dense(torch.log_softmax(logits, -1))
    for name in DIVERGENCES:
        loss = linear_terms(hidden, head, teacher, divergence=name, chunk_tokens=3).loss_N
        if name in ("reverse_kl", "jeffreys"):
            assert torch.isposinf(loss).all()
        else:
            assert torch.isfinite(loss).all()
            assert all(torch.isfinite(grad).all() for grad in gradients(loss.sum(), hidden, head))


def test_weights_function() -> None:
    """A policy gradient's weights: importance ratio of the drawn tokens, without a gradient, at temperature 1."""
    hidden, head, signal, tokens = make("all")
    chunks: list[slice] = []

    def weights(chunk: slice, student_n: Tensor, teacher_n: Tensor) -> tuple[float, Tensor]:
        assert not student_n.requires_grad and not teacher_n.requires_grad
        chunks.append(chunk)
        return 0.5, (teacher_n - student_n).exp()

    options: dict[str, Any] = {"divergence": "forward_kl", "temperature": 2.0}
    terms = linear_terms(hidden, head, signal, tokens, weights=weights, chunk_tokens=3, **options)  # type: ignore[arg-type]
    divergence, nll = dense_terms(hidden, head, signal, tokens, "forward_kl", 2.0)
    teacher_nll = torch.nn.functional.cross_entropy(
        dense_logits(signal.hidden_NH, signal.head).detach(), tokens, reduction="none"
    )
    expected = 0.5 * divergence + (nll - teacher_nll).exp().detach() * nll
    torch.testing.assert_close(terms.loss_N, expected)
    for factor in (torch.ones(N), torch.randn(N)):
        found = gradients((factor * terms.loss_N).sum(), hidden, head)
        torch.testing.assert_close(found, gradients((factor * expected).sum(), hidden, head))
    assert [(c.start, c.stop) for c in chunks] == [(0, 3), (3, 6), (6, 7)]  # once a chunk, not in the recomputation


def test_weights_function_without_tokens_or_teacher() -> None:
    hidden, head, signal, tokens = make()
    seen: list[tuple[bool, bool]] = []

    def weights(chunk: slice, student_n: Tensor | None, teacher_n: Tensor | None) -> tuple[float, float]:
        seen.append((student_n is None, teacher_n is None))
        return 2.0, 3.0

    with_teacher = linear_terms(hidden, head, signal, divergence="jsd", weights=weights)
    torch.testing.assert_close(with_teacher.loss_N, 2 * with_teacher.divergence_N)  # type: ignore[operator]
    with_tokens = linear_terms(hidden, head, None, tokens, weights=weights)
    torch.testing.assert_close(with_tokens.loss_N, 3 * with_tokens.nll_N)  # type: ignore[operator]
    assert seen == [(True, True), (False, True)]


def test_masked_is_sliced() -> None:
    hidden, head, signal, tokens = make()
    keep = torch.tensor([True, False, True, True, False, False, True])
    whole = linear_terms(hidden, head, signal, tokens, divergence="jsd", chunk_tokens=2)
    part = Hidden(signal.hidden_NH[keep], signal.head)
    sliced = linear_terms(hidden[keep], head, part, tokens[keep], divergence="jsd", chunk_tokens=2)
    torch.testing.assert_close(whole.loss_N[keep], sliced.loss_N)
    found = gradients((whole.loss_N * keep).sum(), hidden, head)
    torch.testing.assert_close(found, gradients(sliced.loss_N.sum(), hidden, head))


def test_only_what_asks_gets_a_gradient() -> None:
    hidden, head, signal, tokens = make("all")
    frozen = replace(head, weight_VH=head.weight_VH.detach(), bias_V=head.bias_V.detach())  # type: ignore[union-attr]
    full = linear_terms(hidden, head, signal, tokens, divergence="jsd", weights=(1.0, 1.0))
    full.loss_N.sum().backward(retain_graph=True)
    assert signal.hidden_NH.grad is None and signal.head.weight_VH.grad is None and signal.head.bias_V is not None
    assert signal.head.bias_V.grad is None
    for factor in (torch.ones(N), torch.randn(N)):  # scaled and recomputed
        adapters = linear_terms(hidden, frozen, signal, tokens, divergence="jsd", weights=(1.0, 1.0))
        (grad,) = torch.autograd.grad((adapters.loss_N * factor).sum(), hidden)
        right = gradients((full.loss_N * factor).sum(), hidden, head)
        torch.testing.assert_close(grad, right[0])
        only_head = linear_terms(hidden.detach(), head, signal, tokens, divergence="jsd", weights=(1.0, 1.0))
        grads = torch.autograd.grad((only_head.loss_N * factor).sum(), (head.weight_VH, head.bias_V))  # type: ignore[arg-type]
        torch.testing.assert_close(list(grads), right[1:])


def test_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, signal, tokens = make("all")
    learnt = linear_terms(hidden, head, signal, tokens, divergence="jsd", stats=STATS)
    monkeypatch.delattr(chunked, "_Gradients")  # nothing is made to be thrown away
    with torch.no_grad():
        quiet = linear_terms(hidden, head, signal, tokens, divergence="jsd", stats=STATS)
    with torch.inference_mode():
        inferred = linear_terms(hidden, head, signal, tokens, divergence="jsd", stats=STATS)
    for terms in (quiet, inferred):
        assert not terms.loss_N.requires_grad
        torch.testing.assert_close(terms.loss_N, learnt.loss_N.detach())
        torch.testing.assert_close(terms.stats, learnt.stats)


def test_teacher_from_inference_mode() -> None:
    hidden, head, signal, _ = make()
    with torch.inference_mode():
        states = signal.hidden_NH * 1
        logprobs = torch.log_softmax(dense_logits(states, signal.head), -1)
    expected = linear_terms(hidden, head, signal, divergence="jsd").loss_N
    for given in (Hidden(states, signal.head), Dense(logprobs)):
        loss = linear_terms(hidden, head, given, divergence="jsd").loss_N
        torch.testing.assert_close(loss, expected)
        found = gradients(loss.square().sum(), hidden, head)
        torch.testing.assert_close(found, gradients(expected.square().sum(), hidden, head))


@pytest.mark.parametrize("signal_kind", ["none", "hidden", "dense"])
def test_no_tokens(signal_kind: str) -> None:
    hidden, head, teacher, tokens = make("all", tokens=0)
    signal = {"none": None, "hidden": teacher, "dense": Dense(torch.zeros(0, head.size, dtype=torch.float64))}[
        signal_kind
    ]
    divergence = None if signal is None else "jsd"
    terms: Terms = linear_terms(hidden, head, signal, tokens, divergence=divergence, stats=("entropy",))
    assert terms.loss_N.shape == (0,) and terms.stats["entropy"].shape == (0,)
    terms.loss_N.sum().backward()
    for x in (hidden, head.weight_VH, head.bias_V):
        assert x is not None and x.grad is not None and x.grad.shape == x.shape and (x.grad == 0).all()


def test_a_new_divergence_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def hellinger(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor, *, power: float = 1.0) -> Tensor:
        gap = (student_logprobs_NV / 2).exp() - (teacher_logprobs_NV / 2).exp()
        return gap.square().sum(-1).pow(power) / 2

    hidden, head, signal, _ = make()
    monkeypatch.setitem(DIVERGENCES, "hellinger", hellinger)
    q, p = torch.softmax(dense_logits(hidden, head), -1), torch.softmax(dense_logits(signal.hidden_NH, signal.head), -1)
    expected = 1 - (q * p.detach()).sqrt().sum(-1)
    for divergence in ("hellinger", hellinger):
        loss = linear_terms(hidden, head, signal, divergence=divergence, chunk_tokens=3).loss_N
        torch.testing.assert_close(loss, expected)
        found = gradients(loss.sum(), hidden, head)
        torch.testing.assert_close(found, gradients(expected.sum(), hidden, head))
    squared = linear_terms(hidden, head, signal, divergence="hellinger", power=2.0).loss_N
    torch.testing.assert_close(squared, 2 * expected**2)


def test_linear_divergence_is_linear_terms() -> None:
    hidden, head, signal, tokens = make("all")
    head, teacher = replace(head, scale=1.0, rows=None), replace(signal.head, scale=1.0, rows=None, softcap=2.5)
    loss = linear_divergence(
        *(hidden, head.weight_VH, signal.hidden_NH, teacher.weight_VH, "jsd"),
        temperature=1.3,
        student_bias=head.bias_V,
        teacher_bias=teacher.bias_V,
        student_softcap=head.softcap,
        teacher_softcap=teacher.softcap,
        chunk_tokens=2,
        beta=0.3,
    )
    expected, _ = dense_terms(hidden, head, Hidden(signal.hidden_NH, teacher), tokens, "jsd", 1.3, beta=0.3)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss.sum(), hidden, head), gradients(expected.sum(), hidden, head))
    default = linear_divergence(hidden, head.weight_VH, signal.hidden_NH, teacher.weight_VH)
    bare = Hidden(signal.hidden_NH, Head(teacher.weight_VH))
    torch.testing.assert_close(default, dense_terms(hidden, Head(head.weight_VH), bare, tokens, "jsd", 1.0)[0])


@pytest.mark.parametrize("head_name", HEADS)
def test_head_logits(head_name: str) -> None:
    hidden, head, _, _ = make(head_name)
    logits, expected = head_logits(hidden, head), dense_logits(hidden, head)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(
        gradients(logits.square().sum(), hidden, head), gradients(expected.square().sum(), hidden, head)
    )
    low = replace(
        head, weight_VH=head.weight_VH.bfloat16(), bias_V=None if head.bias_V is None else head.bias_V.bfloat16()
    )
    assert head_logits(hidden.bfloat16(), low).dtype == torch.float32
