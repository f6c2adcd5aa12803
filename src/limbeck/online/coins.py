"""Counted coins: the same seed, purpose and count give the same number, in any thread and process."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from limbeck.decoding.sampler import stream_key, uniforms


def coin(seed: int, purpose: str, count: int) -> float:
    """A number in [0, 1), uniform over counts."""
    key, gamma = stream_key(seed, tuple(purpose.encode()), 0)
    return float(uniforms(torch.tensor([key]), torch.tensor([gamma]), torch.tensor([count])))


@dataclass(frozen=True)
class HeldOut:
    """Which requests keep all their verified positions and are not trained on at first: `warm_share` of the first
    `warm_requests`, since nothing can be judged without some, then `share`."""

    share: float = 0.05
    warm_share: float = 0.5
    warm_requests: int = 32

    def keeps(self, seed: int, number: int) -> bool:
        """Of the request of this number, from 1 on."""
        return coin(seed, "keep", number) < (self.warm_share if number <= self.warm_requests else self.share)
