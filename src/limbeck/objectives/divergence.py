"""A divergence between teacher and student at every token of the completion (KD, GKD)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from limbeck.ops.chunked import linear_terms
from limbeck.types import Context, Head, Signal, Terms


def divergence(
    student_hidden_NH: torch.Tensor,
    head: Head,
    signal: Signal | None,
    tokens_N: torch.Tensor,
    *,
    context: Context | None = None,
    name: str | Callable[..., torch.Tensor] = "forward_kl",
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
    stats: tuple[str, ...] = (),
    **params: Any,
) -> Terms:
    """loss_N = D(teacher, student) + cross_entropy_weight * -log q(tokens_N), nats.

    Both models' logits are divided by `temperature` inside D; no T^2 is multiplied in. GKD: Agarwal et al., ICLR 2024,
    arXiv 2306.13649, eq. 4 without its reward; KD: Hinton et al. 2015, arXiv 1503.02531, eq. 1.
    """
    return linear_terms(
        student_hidden_NH,
        head,
        signal,
        tokens_N,
        divergence=name,
        temperature=temperature,
        weights=(1.0, cross_entropy_weight),
        stats=stats,
        **params,
    )
