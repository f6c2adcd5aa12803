"""Cross-entropy: the student learns the tokens that stand there, whoever wrote them (SFT, SeqKD)."""

from __future__ import annotations

import torch

from limbeck.ops.chunked import linear_terms
from limbeck.types import Context, Head, Signal, Terms


def cross_entropy(
    student_hidden_NH: torch.Tensor,
    head: Head,
    signal: Signal | None,
    tokens_N: torch.Tensor,
    *,
    context: Context | None = None,
    stats: tuple[str, ...] = (),
) -> Terms:
    """loss_N = -log q(tokens_N), nats. A `signal` is not needed; where it is given it serves the statistics alone."""
    return linear_terms(student_hidden_NH, head, signal, tokens_N, weights=(0.0, 1.0), stats=stats)
