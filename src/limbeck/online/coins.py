"""Counted coins: the same seed, purpose and count give the same number, in any thread and process."""

from __future__ import annotations

import torch

from limbeck.decoding.sampler import stream_key, uniforms


def coin(seed: int, purpose: str, count: int) -> float:
    """A number in [0, 1), uniform over counts."""
    key, gamma = stream_key(seed, tuple(purpose.encode()), 0)
    return float(uniforms(torch.tensor([key]), torch.tensor([gamma]), torch.tensor([count])))
