"""Plain text beside a policy gradient, so that the student keeps its language."""

from __future__ import annotations

import torch

from limbeck.ops.chunked import linear_terms
from limbeck.types import Context, Head, Signal, Terms


def language_modelling(
    student_hidden_NH: torch.Tensor,
    head: Head,
    signal: Signal | None,
    tokens_N: torch.Tensor,
    *,
    context: Context | None = None,
    teacher_share: float = 0.0,
    stats: tuple[str, ...] = (),
) -> Terms:
    """loss_N = (1 - teacher_share) * -log q(tokens_N) + teacher_share * KL(p || q), nats.

    MiniLLM's L_PT (arXiv 2306.08543, eq. 10) has teacher_share 0; its authors' code .5.
    """
    divergence = "forward_kl" if teacher_share > 0 else None
    weights = (teacher_share, 1.0 - teacher_share)
    return linear_terms(student_hidden_NH, head, signal, tokens_N, divergence=divergence, weights=weights, stats=stats)
