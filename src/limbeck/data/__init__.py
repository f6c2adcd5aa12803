"""Read files, render and tokenise rows, collate rollouts."""

from __future__ import annotations

from limbeck.data.collate import (
    at_learnt,
    collate,
    completion_text,
    dataset_rollout,
    micro_batches,
    plain_text,
    written_rollout,
)
from limbeck.data.read import mixture_counts, read
from limbeck.data.render import Summary, describe, render

__all__ = [
    "Summary",
    "at_learnt",
    "collate",
    "completion_text",
    "dataset_rollout",
    "describe",
    "micro_batches",
    "mixture_counts",
    "plain_text",
    "read",
    "render",
    "written_rollout",
]
