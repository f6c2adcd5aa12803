"""Counted coins: the same seed, purpose and count give the same number, in any thread and process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from limbeck.decoding.sampler import stream_key, uniforms


def coin(seed: int, purpose: str, count: int) -> float:
    """A number in [0, 1), uniform over counts."""
    key, gamma = stream_key(seed, tuple(purpose.encode()), 0)
    return float(uniforms(torch.tensor([key]), torch.tensor([gamma]), torch.tensor([count])))


@dataclass(frozen=True)
class HeldOut:
    """Which requests keep all their verified positions and are not trained on at first: a `share`, and `hungry` of them
    while a draft's gate holds too few to decide. The coin is tossed on the prompt: its repetitions and further samples
    fall on the same side."""

    share: float = 0.05
    hungry: float = 0.5

    def keeps(self, seed: int, prompt: Sequence[int], *, hungry: bool) -> bool:
        digest = hashlib.blake2b(np.asarray(prompt, np.int64).tobytes(), digest_size=7).digest()
        return coin(seed, "keep", int.from_bytes(digest)) < (max(self.hungry, self.share) if hungry else self.share)


def held_out_of(positions: str) -> HeldOut:
    """For a buffer that keeps these positions. Where it keeps `all` of every request, to hold one out costs no more
    than that it is trained on later, and gate and stop are as recent as they hold many: a quarter."""
    return HeldOut(share=0.25) if positions == "all" else HeldOut()
