"""What a draft minimises on traces, and how its acceptance is counted on them.

Both go through `linear_terms` with the target's top-k + tail as it was stored, never renormalised: where the draft
knows a part D of the vocabulary alone, p keeps its mass outside D, so that sum_v min(p, q) is at most p(D). (A Dense
signal over D would be renormalised by its softmax: the trap that inflates acceptance.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import ModelError
from limbeck.ops.checks import find_divergence
from limbeck.ops.chunked import linear_terms
from limbeck.ops.divergences import forward_kl, total_variation
from limbeck.ops.tiles import Divergence
from limbeck.types import Head, Sparse, Terms

BLEND_RATE = 3.0
_NEVER = -1e4  # a logit, far below any


def blend(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
    """w KL(P || Q) + (1 - w) TV with w = exp(-3 alpha), alpha = sum min(p, q) of the token, detached: forward KL where
    the draft is far off (its gradient reaches tokens that it does not know), total variation, which is 1 - alpha, where
    it is near. P may have less mass than 1."""
    variation_N = total_variation(student_logprobs_NV, teacher_logprobs_NV)
    with torch.no_grad():
        weight_N = torch.exp(-BLEND_RATE * _overlap(variation_N, teacher_logprobs_NV.exp().sum(-1)))
    return weight_N * forward_kl(student_logprobs_NV, teacher_logprobs_NV) + (1 - weight_N) * variation_N


def find_objective(name: str) -> str | Divergence:
    """`blend`, or a divergence of `ops.divergences`. RecipeError for an unknown name."""
    if name == "blend":
        return blend
    find_divergence(name)
    return name


def _overlap(variation_N: Tensor, mass_N: Tensor) -> Tensor:
    """sum min(p, q) = (sum p + sum q) / 2 - 1/2 sum |p - q|, with sum q = 1."""
    return (1 + mass_N) / 2 - variation_N


def restricted(head: Head, signal: Sparse, ids_D: Tensor | None) -> tuple[Head, Sparse]:
    """The head's rows of the tokens `ids_D` (None: all) and the signal by these rows. The target's tokens outside D go
    to rows that have no probability with either model: they add nothing to a divergence, nor to a gradient. One more
    row, which never has any either, keeps the draft's tail finite where the target's top tokens are all of D.

    ModelError for a soft-capped head, which gives every row some probability.
    """
    if ids_D is None:
        return head, signal
    if head.softcap is not None:
        raise ModelError("expected a head without soft-cap under a reduced vocabulary, found one: train all its rows")
    width = signal.tokens_NK.shape[1]
    place_V = torch.full((head.size,), -1, dtype=torch.long, device=ids_D.device)
    place_V[ids_D] = torch.arange(len(ids_D), device=ids_D.device)
    place_NK = place_V[signal.tokens_NK]
    nowhere_K = len(ids_D) + torch.arange(width, device=ids_D.device)
    known_NK = place_NK >= 0
    weight_EH = torch.cat([head.weight_VH[ids_D], head.weight_VH.new_zeros(width + 1, head.weight_VH.shape[1])])
    bias_D = head.bias_V[ids_D] if head.bias_V is not None else head.weight_VH.new_zeros(len(ids_D))
    bias_E = torch.cat([bias_D, bias_D.new_full((width,), -torch.inf), bias_D.new_full((1,), _NEVER)])
    whole_N = known_NK.sum(-1) == len(ids_D)
    return Head(weight_EH, bias_E, head.scale), Sparse(
        torch.where(known_NK, place_NK, nowhere_K),
        signal.logprobs_NK.masked_fill(~known_NK, -torch.inf),
        signal.tail_logprob_N.masked_fill(whole_N, -torch.inf),
    )


def terms(hidden_NH: Tensor, head: Head, signal: Sparse, ids_D: Tensor | None, objective: str | Divergence) -> Terms:
    """The objective at each position, differentiable."""
    head, signal = restricted(head, signal, ids_D)
    return linear_terms(hidden_NH, head, signal, divergence=objective)


@torch.no_grad()
def acceptance(hidden_NH: Tensor, head: Head, signal: Sparse, ids_D: Tensor | None) -> Tensor:
    """alpha_raw (N,): sum_v min(p, q) with p as the target has it, p(V) = 1. The tail counts as one token, so that it
    is too high by at most the tail's mass."""
    head, signal = restricted(head, signal, ids_D)
    variation_N = linear_terms(hidden_NH, head, signal, divergence="total_variation").loss_N
    mass_N = signal.logprobs_NK.exp().sum(-1) + signal.tail_logprob_N.exp()
    return _overlap(variation_N, mass_N.to(variation_N.dtype)).clamp(0, 1)


def known_mass(signal: Sparse, ids_D: Tensor | None) -> Tensor:
    """p(D) (N,), at least: without the tail."""
    if ids_D is None:
        return torch.ones_like(signal.tail_logprob_N)
    return (signal.logprobs_NK.exp() * torch.isin(signal.tokens_NK, ids_D)).sum(-1)
