"""Under torchrun every rank trains and evaluates, and one writes files."""

from __future__ import annotations

import os

import torch

from limbeck.errors import RecipeError


def count() -> int:
    """Processes that torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Whether this process writes the run's files."""
    return int(os.environ.get("RANK", "0")) == 0


def one_process(what: str) -> None:
    """Raises RecipeError under torchrun, for what trains several models into folders that ranks would share."""
    if count() > 1:
        raise RecipeError(
            f"{what}: expected one process, found {count()} of torchrun: start `limbeck` by itself for it"
        )


def wait() -> None:
    """Until every rank is here: what one of them has written is there for all."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
