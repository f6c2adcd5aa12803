"""What a local teacher says about a batch, in one place for training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from limbeck.models.adapters import adapters_off
from limbeck.models.causal import completion_hidden
from limbeck.types import Hidden

ADAPTERS = "adapters"
"""In the place of a teacher: the student itself with its LoRA adapters off, one copy of the weights."""


@torch.no_grad()
def teacher_hidden(teacher: Any, student: Any, batch: Mapping[str, torch.Tensor]) -> Hidden:
    """The teacher's hidden states at the learnt tokens of `batch` (see `completion_hidden`) and its head."""
    with adapters_off(student) if teacher == ADAPTERS else nullcontext(teacher) as model:
        hidden_NH, _, head = completion_hidden(model, batch)
    return Hidden(hidden_NH, head)
