"""Per-token statistics of student and teacher that are logged beside a loss."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from limbeck.ops.divergences import forward_kl, kl, reverse_kl


def agreement(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
    """1 where both find the same token likeliest, else 0."""
    return (student_logprobs_NV.argmax(-1) == teacher_logprobs_NV.argmax(-1)).to(student_logprobs_NV.dtype)


def entropy(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor | None = None) -> Tensor:
    """-sum q log q, nats, of the student alone."""
    return -kl(student_logprobs_NV, student_logprobs_NV.new_zeros(()))


def teacher_entropy(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
    """-sum p log p, nats, of the teacher alone."""
    return entropy(teacher_logprobs_NV)


STATS: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "agreement": agreement,
    "entropy": entropy,
    "teacher_entropy": teacher_entropy,
}
"""name -> fn(student_logprobs_NV, teacher_logprobs_NV) -> (N,). Only `entropy` does without a teacher (None)."""
