"""How far the student is from held-out text and, on that text, from its teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from limbeck.data import collate, dataset_rollout
from limbeck.decoding import modes
from limbeck.errors import DataError
from limbeck.evaluation.statistics import Interval, mean_interval
from limbeck.models import completion_hidden
from limbeck.models.teaching import teacher_hidden
from limbeck.ops.chunked import linear_terms
from limbeck.types import Example, Hidden, Rollout

BUCKETS = 32
STATS = ("forward_kl", "reverse_kl", "agreement")
HELD_OUT = ("loss", *STATS)
"""Means over tokens, by which `per_example` is weighted."""


def held_out(
    student: Any, teacher: Any, examples: Sequence[Example], pad_id: int, *, batch_tokens: int = 16_384
) -> dict[str, Any]:
    """Means over the learnt tokens of `examples`: `loss` (negative log-likelihood, nats) and, with a teacher,
    `forward_kl` and `reverse_kl` (nats, temperature 1) and `agreement` (how often both find the same token likeliest).

    Beside them `tokens` (their number), `per_example` {name: [one mean an example], "tokens": [...]} for paired
    intervals weighted by tokens, and with a teacher `divergence_by_position` (see `by_position`).

    `teacher` is a model, ADAPTERS (the student with its LoRA adapters off, also where the teacher is that same LoRA
    model) or None. A batch holds at most `batch_tokens` tokens, padding included (one row at least); both models run in
    eval mode under the caller's autocast. Raises DataError where nothing is learnt.
    """
    if teacher is student and hasattr(student, "disable_adapter"):
        teacher = "adapters"
    return held_out_together([student], teacher, examples, pad_id, batch_tokens=batch_tokens)[0]


@torch.no_grad()
def held_out_together(
    students: Sequence[Any], teacher: Any, examples: Sequence[Example], pad_id: int, *, batch_tokens: int = 16_384
) -> list[dict[str, Any]]:
    """What `held_out` finds of each of `students`, who share a vocabulary, for one forward of a teacher that is a model
    or None."""
    rollouts = [dataset_rollout(example) for example in examples]
    tokens_P = np.array([rollout.learnt for rollout in rollouts])
    if tokens_P.sum() == 0:
        raise DataError(
            f"expected completions in the held-out data, found none in {len(rollouts)} rows: add completions"
        )
    names = ("loss", *(STATS if teacher is not None else ()))
    sums = [{name: np.zeros(len(rollouts)) for name in names} for _ in students]
    positions: list[np.ndarray] = []
    divergences: list[list[np.ndarray]] = [[] for _ in students]
    with evaluating(*students, teacher):
        for places, batch in device_batches(students[0], rollouts, pad_id, batch_tokens):
            signal = None if teacher is None else teacher_hidden(teacher, students[0], batch)
            if teacher is not None:
                learnt_BS = batch["learnt"][:, 1:].bool().cpu().numpy()
                positions.append((learnt_BS.cumsum(1) - 1)[learnt_BS])
            for student, of_student, divergence in zip(students, sums, divergences, strict=True):
                columns = _columns(student, signal, batch)
                for name, values_N in columns.items():
                    of_student[name][places] = row_sums(batch, values_N)
                if teacher is not None:
                    divergence.append(columns["forward_kl"])
    return [_summary(each, tokens_P, positions, kl) for each, kl in zip(sums, divergences, strict=True)]


def held_out_intervals(held: dict[str, Any]) -> dict[str, Interval]:
    """Of each of HELD_OUT that `held_out` found, weighted by tokens."""
    weights_P = np.array(held["per_example"]["tokens"])
    return {
        name: mean_interval(np.array(held["per_example"][name])[None], seeds="evaluation", weights=weights_P)
        for name in HELD_OUT
        if name in held
    }


def row_sums(batch: dict[str, torch.Tensor], values_N: np.ndarray) -> np.ndarray:
    """[rows of `batch`]: the sum of a row's learnt tokens."""
    row_N = batch["learnt"][:, 1:].nonzero(as_tuple=True)[0].cpu().numpy()
    return np.bincount(row_N, values_N, minlength=len(batch["learnt"]))


def _columns(student: Any, signal: Hidden | None, batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Per learnt token, row by row, in float64: loss and, with a teacher's signal, STATS."""
    hidden_NH, tokens_N, head = completion_hidden(student, batch)
    terms = linear_terms(hidden_NH, head, signal, tokens_N, stats=STATS if signal is not None else ())
    return {name: values_N.double().cpu().numpy() for name, values_N in {"loss": terms.loss_N, **terms.stats}.items()}


def _summary(
    sums: dict[str, np.ndarray], tokens_P: np.ndarray, positions: list[np.ndarray], divergences: list[np.ndarray]
) -> dict[str, Any]:
    kept_P = tokens_P > 0
    summary: dict[str, Any] = {name: float(sums_P.sum() / tokens_P.sum()) for name, sums_P in sums.items()}
    summary["tokens"] = int(tokens_P.sum())
    summary["per_example"] = {name: (sums_P[kept_P] / tokens_P[kept_P]).tolist() for name, sums_P in sums.items()}
    summary["per_example"]["tokens"] = tokens_P[kept_P].tolist()
    if positions:
        summary["divergence_by_position"] = by_position(np.concatenate(positions), np.concatenate(divergences))
    return summary


def by_position(positions_N: np.ndarray, divergences_N: np.ndarray) -> list[dict[str, float]]:
    """Mean forward KL by place among the learnt tokens of a row, counted from 0: at most BUCKETS stretches of equal
    length, each with its first `position` and its number of `tokens`."""
    width = int(positions_N.max()) // BUCKETS + 1
    buckets_N = positions_N // width
    tokens = np.bincount(buckets_N)
    sums = np.bincount(buckets_N, divergences_N)
    return [
        {"position": bucket * width, "forward_kl": float(sums[bucket] / count), "tokens": int(count)}
        for bucket, count in enumerate(tokens)
    ]


def device_batches(
    model: Any, rollouts: Sequence[Rollout], pad_id: int, batch_tokens: int
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """(places, batch of them) as in `batches`, on the model's device."""
    device = next(model.parameters()).device
    for places in batches(rollouts, batch_tokens):
        batch = collate([rollouts[place] for place in places], pad_id)
        yield places, {name: values.to(device) for name, values in batch.items()}


def batches(rollouts: Sequence[Rollout], batch_tokens: int) -> Iterator[list[int]]:
    """Places of `rollouts`, longest first: at most `batch_tokens` tokens a batch, with padding (one row at least)."""
    order = sorted(range(len(rollouts)), key=lambda place: -len(rollouts[place].tokens))
    while order:
        count = max(1, batch_tokens // len(rollouts[order[0]].tokens))
        yield order[:count]
        order = order[count:]


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Eval mode for what is a model among `models`; each module's mode is as before afterwards."""
    with ExitStack() as stack:
        for model in models:
            if isinstance(model, torch.nn.Module):
                stack.enter_context(modes.evaluating(tuple(model.modules())))
        yield
