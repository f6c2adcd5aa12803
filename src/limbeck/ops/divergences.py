"""Divergences between a teacher P and a student Q, per token, in nats.

Every function takes log-probabilities `student_logprobs_NV` and `teacher_logprobs_NV` (the last axis is the vocabulary,
-inf is probability zero) and returns one value a token, differentiable in both.

Zeros: a token that is zero in both contributes 0 and no gradient. One-sided support is +inf for the Kullback-Leibler
divergences, as in `scipy.special.rel_entr`, and finite for the others. Nothing is clamped. A probability that
underflows to 0 in the inputs' dtype counts as zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def forward_kl(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
    """KL(P || Q): the student must cover everything that the teacher says (Hinton et al. 2015, arXiv:1503.02531)."""
    return kl(teacher_logprobs_NV, student_logprobs_NV)


def reverse_kl(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
    """KL(Q || P): the student must say nothing that the teacher would not (MiniLLM, arXiv:2306.08543)."""
    return kl(student_logprobs_NV, teacher_logprobs_NV)


def jeffreys(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
    """KL(P || Q) + KL(Q || P) (Jeffreys 1946)."""
    return kl(teacher_logprobs_NV, student_logprobs_NV) + kl(student_logprobs_NV, teacher_logprobs_NV)


def total_variation(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
    """1/2 sum |P - Q|, between 0 and 1: one minus the acceptance probability of speculative decoding."""
    return 0.5 * (teacher_logprobs_NV.exp() - student_logprobs_NV.exp()).abs().sum(-1)


def skew_forward_kl(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor, *, skew: float = 0.1) -> Tensor:
    """KL(P || skew P + (1 - skew) Q), at most -log(skew) (DistiLLM, arXiv:2402.03898).

    Raises ValueError unless 0 <= skew < 1.
    """
    check_skew(skew)
    return kl(teacher_logprobs_NV, _log_mixture(skew, teacher_logprobs_NV, student_logprobs_NV))


def skew_reverse_kl(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor, *, skew: float = 0.1) -> Tensor:
    """KL(Q || (1 - skew) P + skew Q), at most -log(skew) (DistiLLM, arXiv:2402.03898).

    Raises ValueError unless 0 <= skew < 1.
    """
    check_skew(skew)
    return kl(student_logprobs_NV, _log_mixture(skew, student_logprobs_NV, teacher_logprobs_NV))


def jsd(
    student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor, *, beta: float = 0.5, normalize: bool = False
) -> Tensor:
    """beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q (GKD, arXiv:2306.13649, eq. 1).

    As beta goes to 0 (or 1) its *direction* goes to forward (reverse) KL and its *size* to zero. `normalize` divides by
    beta (1 - beta), so that the limits are KL(P || Q) and KL(Q || P) themselves. Raises ValueError unless 0 < beta < 1.
    """
    check_beta(beta)
    mixture_NV = _log_mixture(beta, teacher_logprobs_NV, student_logprobs_NV)
    value_N = beta * kl(teacher_logprobs_NV, mixture_NV) + (1 - beta) * kl(student_logprobs_NV, mixture_NV)
    return value_N / (beta * (1 - beta)) if normalize else value_N


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jeffreys": jeffreys,
    "total_variation": total_variation,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "jsd": jsd,
}


def kl(logprobs_NV: Tensor, other_logprobs_NV: Tensor) -> Tensor:
    """sum p (log p - log q), of any two. Where p is 0 the difference is replaced before the product, because 0 * inf is
    NaN, and so is its gradient."""
    probs_NV = logprobs_NV.exp()
    difference_NV = (logprobs_NV - other_logprobs_NV).masked_fill_(probs_NV == 0, 0.0)
    return (probs_NV * difference_NV).sum(-1)


def _log_mixture(share: float, logprobs_NV: Tensor, other_logprobs_NV: Tensor) -> Tensor:
    """log(share p + (1 - share) q). Where both are zero it is the lowest finite number, which `kl` never reads:
    logaddexp(-inf, -inf) has a NaN gradient."""
    if share == 0:
        return other_logprobs_NV
    lowest = torch.finfo(other_logprobs_NV.dtype).min
    return torch.logaddexp(logprobs_NV + math.log(share), other_logprobs_NV.clamp(min=lowest) + math.log1p(-share))


def check_beta(beta: float) -> None:
    if not 0 < beta < 1:
        raise ValueError(
            f"jsd expects 0 < beta < 1, found {beta}: it vanishes at the ends; "
            "use forward_kl (its direction at beta = 0) or reverse_kl (at beta = 1)"
        )


def check_skew(skew: float) -> None:
    if not 0 <= skew < 1:
        raise ValueError(f"a skew divergence expects 0 <= skew < 1, found {skew}: at 1 it vanishes; 0.1 is usual")
