"""The processes that torchrun has started: every one trains and evaluates, and one writes files."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch

from limbeck.errors import RecipeError

Value = TypeVar("Value")


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


def from_all(value: Value) -> list[Value]:
    """Every rank's `value`, in the order of ranks; on one process its own. Every rank has to call it."""
    if not torch.distributed.is_initialized():
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)  # pyright: ignore[reportUnknownMemberType]
    return found


def wait() -> None:
    """Until every rank is here: what one of them has written is there for all."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
