"""The rule that makes drafting lossless (Leviathan et al., ICML 2023, arXiv 2211.17192; Chen et al., arXiv 2302.01318).

A token x drawn from q is kept with probability min(1, p(x) / q(x)); else another is drawn from the residual
max(0, p - q), normalised. Then x has the distribution p exactly: q min(1, p / q) + max(0, p - q) = p. The draft may
know a part D of the vocabulary alone: q is 0 outside it, and p is never renormalised over it.

p is (N, V); q is (N, D) with the tokens `ids_D` (None: all), or a point mass on the drafted token (None).
"""

from __future__ import annotations

import torch
from torch import Tensor


def overlap(p_NV: Tensor, q_ND: Tensor, ids_D: Tensor | None) -> Tensor:
    """Acceptance probability (N,): sum_v min(p, q), which is at most p(D)."""
    return torch.minimum(p_NV if ids_D is None else p_NV[:, ids_D], q_ND).sum(-1)


def accepts(p_N: Tensor, q_N: Tensor | float, uniforms_N: Tensor) -> Tensor:
    """Whether each drafted token is kept, given its two probabilities: with probability min(1, p / q)."""
    return uniforms_N * q_N < p_N


def residual(p_NV: Tensor, q_ND: Tensor, ids_D: Tensor | None) -> Tensor:
    """Weights (N, V) that a rejected token's place is drawn from: max(0, p - q), not normalised. Where they are zero
    everywhere (p = q but for rounding) they are p, which the token there follows anyway."""
    if ids_D is None:
        rest_NV = (p_NV - q_ND).clamp(min=0)
    else:
        rest_NV = p_NV.clone()
        rest_NV[:, ids_D] = (rest_NV[:, ids_D] - q_ND).clamp(min=0)
    return torch.where(rest_NV.sum(-1, keepdim=True) > 0, rest_NV, p_NV)


def residual_of_point(p_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """`residual` where q is a point mass on `tokens_N`: p without that token."""
    rest_NV = p_NV.scatter(1, tokens_N[:, None], 0.0)
    return torch.where(rest_NV.sum(-1, keepdim=True) > 0, rest_NV, p_NV)


def leading(kept_BG: Tensor, counts: list[int]) -> list[int]:
    """How many of the first `counts[b]` flags of each row are true before the first false one."""
    return [(flags[:count] + [False]).index(False) for flags, count in zip(kept_BG.tolist(), counts, strict=True)]
