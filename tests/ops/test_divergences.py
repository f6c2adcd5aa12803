"""The divergences against closed forms, scipy, their limits, symmetries and bounds, and numerical gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from torch import Tensor

from limbeck.ops.divergences import DIVERGENCES

STUDENT = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
TEACHER = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).log()

CASES = [(name, {}) for name in DIVERGENCES]
CASES += [("jsd", {"beta": 0.1}), ("jsd", {"beta": 0.9, "normalize": True}), ("skew_forward_kl", {"skew": 0.6})]
cases = pytest.mark.parametrize(("name", "params"), CASES, ids=str)
FINITE = ["total_variation", "skew_forward_kl", "skew_reverse_kl", "jsd"]


def oracle(name: str, student: np.ndarray, teacher: np.ndarray, params: dict[str, float]) -> np.ndarray:
    """The definitions, on probabilities, with scipy's relative entropy (inf on one-sided support)."""

    def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return rel_entr(a, b).sum(-1)

    skew, beta = params.get("skew", 0.1), params.get("beta", 0.5)
    middle = beta * teacher + (1 - beta) * student
    scale = 1 / (beta * (1 - beta)) if params.get("normalize") else 1.0
    return {
        "forward_kl": lambda: kl(teacher, student),
        "reverse_kl": lambda: kl(student, teacher),
        "jeffreys": lambda: kl(teacher, student) + kl(student, teacher),
        "total_variation": lambda: 1 - np.minimum(teacher, student).sum(-1),
        "skew_forward_kl": lambda: kl(teacher, skew * teacher + (1 - skew) * student),
        "skew_reverse_kl": lambda: kl(student, skew * student + (1 - skew) * teacher),
        "jsd": lambda: scale * (beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)),
    }[name]()


def random_logprobs(*shape: int) -> Tensor:
    return torch.log_softmax(2 * torch.randn(*shape, dtype=torch.float64), dim=-1)


def with_zeros(logprobs: Tensor, columns: list[int]) -> Tensor:
    logprobs = logprobs.clone()
    logprobs[:, columns] = -math.inf
    return torch.log_softmax(logprobs, dim=-1)


def test_the_seven() -> None:
    assert set(DIVERGENCES) == {
        *("forward_kl", "reverse_kl", "jeffreys", "total_variation"),
        *("skew_forward_kl", "skew_reverse_kl", "jsd"),
    }


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("forward_kl", {}, 0.675806),
        ("reverse_kl", {}, 0.634897),
        ("jeffreys", {}, 0.675806 + 0.634897),
        ("total_variation", {}, 0.5),
        ("jsd", {"beta": 0.25}, 0.116929),
        ("jsd", {"beta": 0.5}, 0.151358),
        ("jsd", {"beta": 0.75}, 0.114120),
        ("jsd", {"beta": 0.25, "normalize": True}, 0.116929 / 0.1875),
        # .2 ln(.2/.65) + .3 ln(.3/.21) + .5 ln(.5/.14) and .7 ln(.7/.25) + .2 ln(.2/.29) + .1 ln(.1/.46)
        ("skew_forward_kl", {}, 0.507754),
        ("skew_reverse_kl", {}, 0.493815),
    ],
    ids=str,
)
def test_closed_forms(name: str, params: dict[str, float], expected: float) -> None:
    assert DIVERGENCES[name](STUDENT, TEACHER, **params).item() == pytest.approx(expected, abs=2e-6)


@cases
@pytest.mark.parametrize("zeros", [([], []), ([1], [1]), ([1, 2], [2]), ([2], [2, 5]), ([0], [3])], ids=str)
def test_agrees_with_scipy(name: str, params: dict[str, float], zeros: tuple[list[int], list[int]]) -> None:
    student = with_zeros(random_logprobs(5, 7), zeros[0])
    teacher = with_zeros(random_logprobs(5, 7), zeros[1])
    expected = oracle(name, student.exp().numpy(), teacher.exp().numpy(), params)
    np.testing.assert_allclose(DIVERGENCES[name](student, teacher, **params).numpy(), expected, rtol=1e-10, atol=1e-12)


@cases
def test_zero_in_both_is_as_if_the_token_did_not_exist(name: str, params: dict[str, float]) -> None:
    keep, gone = [0, 1, 3, 5], [2, 4]
    student = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    hole = torch.zeros(6, dtype=torch.float64)
    hole[gone] = -math.inf
    divergence = partial(DIVERGENCES[name], **params)

    whole = divergence(torch.log_softmax(student + hole, -1), torch.log_softmax(teacher + hole, -1))
    whole_grads = torch.autograd.grad(whole.sum(), (student, teacher))
    sliced = divergence(torch.log_softmax(student[:, keep], -1), torch.log_softmax(teacher[:, keep], -1))
    sliced_grads = torch.autograd.grad(sliced.sum(), (student, teacher))

    torch.testing.assert_close(whole, sliced)
    for grad, expected in zip(whole_grads, sliced_grads, strict=True):
        assert (grad[:, gone] == 0).all()
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("zero_in", ["student", "teacher"])
def test_one_sided_support(name: str, zero_in: str) -> None:
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64)
    (student if zero_in == "student" else teacher)[:, 1] = -math.inf
    student.requires_grad_()
    value = DIVERGENCES[name](torch.log_softmax(student, -1), torch.log_softmax(teacher, -1))
    infinite = {"student": ["forward_kl", "jeffreys"], "teacher": ["reverse_kl", "jeffreys"]}[zero_in]
    assert torch.isinf(value).all() if name in infinite else torch.isfinite(value).all()
    if name in FINITE:
        (grad,) = torch.autograd.grad(value.sum(), student)
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_probability_that_underflows_is_zero(name: str) -> None:
    student = torch.tensor([[0.0, 0.0, -300.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 0.5, -math.inf]])
    for pair in ((student, teacher), (teacher, student)):
        value = DIVERGENCES[name](*(torch.log_softmax(x, -1) for x in pair))
        (grad,) = torch.autograd.grad(value.sum(), student)
        assert torch.isfinite(value).all() and torch.isfinite(grad).all()


@cases
def test_gradients(name: str, params: dict[str, float]) -> None:
    student, teacher = (random_logprobs(2, 5).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(partial(DIVERGENCES[name], **params), (student, teacher))


@cases
def test_positive_and_zero_only_for_equals(name: str, params: dict[str, float]) -> None:
    student, teacher = random_logprobs(20, 6), random_logprobs(20, 6)
    assert (DIVERGENCES[name](student, teacher, **params) > 1e-4).all()
    torch.testing.assert_close(DIVERGENCES[name](student, student, **params), torch.zeros(20, dtype=torch.float64))


def test_symmetries() -> None:
    student, teacher = random_logprobs(4, 6), random_logprobs(4, 6)
    mirrored: list[tuple[Callable[..., Tensor], Callable[..., Tensor]]] = [
        (DIVERGENCES["forward_kl"], DIVERGENCES["reverse_kl"]),
        (DIVERGENCES["jeffreys"], DIVERGENCES["jeffreys"]),
        (DIVERGENCES["total_variation"], DIVERGENCES["total_variation"]),
        (DIVERGENCES["skew_forward_kl"], DIVERGENCES["skew_reverse_kl"]),
        (partial(DIVERGENCES["jsd"], beta=0.2), partial(DIVERGENCES["jsd"], beta=0.8)),
    ]
    for there, back in mirrored:
        torch.testing.assert_close(there(student, teacher), back(teacher, student))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_skew_goes_to_the_kl(direction: str) -> None:
    student, teacher = random_logprobs(4, 6), random_logprobs(4, 6)
    limit = DIVERGENCES[f"{direction}_kl"](student, teacher)
    skewed = DIVERGENCES[f"skew_{direction}_kl"]
    torch.testing.assert_close(skewed(student, teacher, skew=0.0), limit, rtol=0, atol=0)
    torch.testing.assert_close(skewed(student, teacher, skew=1e-9), limit, rtol=1e-6, atol=0)
    assert (skewed(student, teacher, skew=0.1) < limit).all()


@pytest.mark.parametrize(("beta", "limit"), [(1e-7, "forward_kl"), (1 - 1e-7, "reverse_kl")])
def test_normalised_jsd_goes_to_the_kl(beta: float, limit: str) -> None:
    student, teacher = random_logprobs(4, 6).requires_grad_(), random_logprobs(4, 6)
    normalised = DIVERGENCES["jsd"](student.log_softmax(-1), teacher, beta=beta, normalize=True)
    expected = DIVERGENCES[limit](student.log_softmax(-1), teacher)
    torch.testing.assert_close(normalised, expected, rtol=1e-4, atol=0)
    grads = [torch.autograd.grad(value.sum(), student)[0] for value in (normalised, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)
    assert (DIVERGENCES["jsd"](student, teacher, beta=beta) < 1e-5).all()  # what vanishes without `normalize`


def test_bounds_are_reached_by_disjoint_supports() -> None:
    student = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64).log()
    for name, params, bound in [
        ("total_variation", {}, 1.0),
        ("jsd", {}, math.log(2)),
        ("jsd", {"beta": 0.25}, -0.25 * math.log(0.25) - 0.75 * math.log(0.75)),
        ("skew_forward_kl", {"skew": 0.2}, -math.log(0.2)),
        ("skew_reverse_kl", {"skew": 0.2}, -math.log(0.2)),
    ]:
        assert DIVERGENCES[name](student, teacher, **params).item() == pytest.approx(bound)


@pytest.mark.parametrize(
    ("name", "params", "fix"),
    [
        ("jsd", {"beta": 0.0}, "use forward_kl"),
        ("jsd", {"beta": 1.0}, "reverse_kl"),
        ("jsd", {"beta": -0.1}, "found -0.1"),
        ("jsd", {"beta": math.nan}, "found nan"),
        ("skew_forward_kl", {"skew": 1.0}, "found 1.0"),
        ("skew_forward_kl", {"skew": -0.1}, "expects 0 <= skew < 1"),
        ("skew_reverse_kl", {"skew": 1.5}, "found 1.5"),
    ],
    ids=str,
)
def test_parameters_out_of_range(name: str, params: dict[str, float], fix: str) -> None:
    with pytest.raises(ValueError, match=fix):
        DIVERGENCES[name](STUDENT, TEACHER, **params)
