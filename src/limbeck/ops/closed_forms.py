"""Divergences with their derivatives in closed form, for the fast path of `linear_terms`.

`divergences.py` says what each is and stays the oracle. A closed form returns the value (N,) and the *slope* (N, V),
dD / d log q_v as if every log q_v were free, up to a multiple of q (which a softmax ignores). The gradient by the
logits is then slope - q sum(slope). They hold where every log-probability is finite; a probability that has underflowed
to zero is one that counts as zero, and does. Anything else shows as a value that is not finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.ops import divergences


class Point(NamedTuple):
    """Student Q and teacher P at some tokens, in log space and out of it."""

    log_q_NV: Tensor
    log_p_NV: Tensor
    q_NV: Tensor
    p_NV: Tensor


ClosedForm = Callable[..., tuple[Tensor, Tensor]]


def forward_kl(at: Point) -> tuple[Tensor, Tensor]:
    """D = sum p log(p/q); slope = -p."""
    return (at.p_NV * (at.log_p_NV - at.log_q_NV)).sum(-1), -at.p_NV


def reverse_kl(at: Point) -> tuple[Tensor, Tensor]:
    """D = sum q log(q/p); slope = q log(q/p)."""
    slope_NV = at.q_NV * (at.log_q_NV - at.log_p_NV)
    return slope_NV.sum(-1), slope_NV


def jeffreys(at: Point) -> tuple[Tensor, Tensor]:
    """D = sum (q - p) log(q/p); slope = q log(q/p) - p."""
    ratio_NV = at.log_q_NV - at.log_p_NV
    return ((at.q_NV - at.p_NV) * ratio_NV).sum(-1), at.q_NV * ratio_NV - at.p_NV


def total_variation(at: Point) -> tuple[Tensor, Tensor]:
    """D = 1/2 sum |q - p|; slope = 1/2 q sign(q - p)."""
    difference_NV = at.q_NV - at.p_NV
    return 0.5 * difference_NV.abs().sum(-1), 0.5 * at.q_NV * difference_NV.sign()


def skew_forward_kl(at: Point, *, skew: float = 0.1) -> tuple[Tensor, Tensor]:
    """D = sum p log(p/m), m = skew p + (1 - skew) q; slope = -(1 - skew) p q / m."""
    divergences.check_skew(skew)
    if skew == 0:
        return forward_kl(at)
    mixture_NV = _mixture(at.q_NV, at.p_NV, skew)
    value_N = (at.p_NV * (at.log_p_NV - mixture_NV.log())).sum(-1)
    return value_N, (skew - 1) * at.p_NV * at.q_NV / mixture_NV


def skew_reverse_kl(at: Point, *, skew: float = 0.1) -> tuple[Tensor, Tensor]:
    """D = sum q log(q/m), m = (1 - skew) p + skew q; slope = q (log(q/m) - skew q / m)."""
    divergences.check_skew(skew)
    if skew == 0:
        return reverse_kl(at)
    mixture_NV = _mixture(at.p_NV, at.q_NV, skew)
    entries_NV = at.q_NV * (at.log_q_NV - mixture_NV.log())
    return entries_NV.sum(-1), entries_NV - skew * at.q_NV * at.q_NV / mixture_NV


def jsd(at: Point, *, beta: float = 0.5, normalize: bool = False) -> tuple[Tensor, Tensor]:
    """D = beta sum p log(p/m) + (1 - beta) sum q log(q/m), m = beta p + (1 - beta) q; slope = (1 - beta) q log(q/m)."""
    divergences.check_beta(beta)
    log_mixture_NV = _mixture(at.q_NV, at.p_NV, beta).log()
    entries_NV = at.q_NV * (at.log_q_NV - log_mixture_NV)
    of_teacher_N = (at.p_NV * (at.log_p_NV - log_mixture_NV)).sum(-1)
    size = 1 / (beta * (1 - beta)) if normalize else 1.0
    value_N = beta * of_teacher_N + (1 - beta) * entries_NV.sum(-1)
    return size * value_N, size * (1 - beta) * entries_NV


CLOSED_FORMS: dict[Any, ClosedForm] = {
    divergences.forward_kl: forward_kl,
    divergences.reverse_kl: reverse_kl,
    divergences.jeffreys: jeffreys,
    divergences.total_variation: total_variation,
    divergences.skew_forward_kl: skew_forward_kl,
    divergences.skew_reverse_kl: skew_reverse_kl,
    divergences.jsd: jsd,
}
"""By the function that each stands for: another function under the same name has none."""


def _mixture(first_NV: Tensor, second_NV: Tensor, share: float) -> Tensor:
    """(1 - share) first + share second, not quite zero where both have underflowed, so that 0 log 0 is 0."""
    return torch.lerp(first_NV, second_NV, share).clamp(min=torch.finfo(first_NV.dtype).tiny)
