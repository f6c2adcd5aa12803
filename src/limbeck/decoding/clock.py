"""Seconds that say something on every device."""

from __future__ import annotations

from time import perf_counter

import torch


def now(device: torch.device) -> float:
    """The clock, once the device has done what it was asked to: a GPU is still at work when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()
