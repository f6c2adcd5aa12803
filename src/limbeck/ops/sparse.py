"""Top-k + tail: a teacher's distribution as its k likeliest tokens and one bucket for all others.

A divergence between bucketed distributions is at most the one between the whole ones (data processing), and equal to
it where the student spreads the tail as the teacher does. Nothing is renormalised: the tail is a bucket like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.ops.statistics import STATS
from limbeck.types import Sparse

SPARSE_STATS = ("forward_kl", "reverse_kl", "agreement", "entropy")
"""Statistics that such a teacher allows; the divergences among them are between buckets."""


def top_k(logprobs_NV: Tensor, k: int) -> Sparse:
    """The k likeliest tokens of each row and the log mass outside them. Raises ValueError unless 1 <= k <= V."""
    vocabulary = logprobs_NV.shape[-1]
    if not 1 <= k <= vocabulary:
        raise ValueError(f"top_k expects 1 to {vocabulary} tokens, found {k}")
    top_NK, tokens_NK = logprobs_NV.topk(k)
    return Sparse(tokens_NK, top_NK, _outside(logprobs_NV, tokens_NK))


def bucketed(logprobs_NV: Tensor, tokens_NK: Tensor) -> Tensor:
    """Log-probabilities (N, K + 1) of the given tokens and, last, of all others together. Differentiable."""
    return torch.cat([logprobs_NV.gather(-1, tokens_NK), _outside(logprobs_NV, tokens_NK)[:, None]], dim=-1)


def buckets_of(signal: Sparse) -> Tensor:
    """The teacher's side of `bucketed`: (N, K + 1)."""
    return torch.cat([signal.logprobs_NK, signal.tail_logprob_N[:, None]], dim=-1)


def sparse_stat(name: str, student_logprobs_NV: Tensor, tokens_NK: Tensor, teacher_buckets_NB: Tensor) -> Tensor:
    """A statistic of SPARSE_STATS (N,). Entropy and the likeliest token are those of the student's whole
    distribution."""
    if name == "entropy":
        return STATS[name](student_logprobs_NV)
    if name == "agreement":
        likeliest_N = tokens_NK.gather(-1, teacher_buckets_NB[:, :-1].argmax(-1, keepdim=True))[:, 0]
        return (student_logprobs_NV.argmax(-1) == likeliest_N).to(student_logprobs_NV.dtype)
    return STATS[name](bucketed(student_logprobs_NV, tokens_NK), teacher_buckets_NB)


def _outside(logprobs_NV: Tensor, tokens_NK: Tensor) -> Tensor:
    """Log mass (N,) of all other tokens: summed, not 1 - mass of these, which float32 rounds to 0 or below."""
    if tokens_NK.shape[-1] == logprobs_NV.shape[-1]:
        return logprobs_NV.new_full(logprobs_NV.shape[:1], -torch.inf)
    return logprobs_NV.scatter(-1, tokens_NK, -torch.inf).logsumexp(-1)
