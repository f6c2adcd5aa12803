"""Exposure bias: how much faster errors gather on a student's own text than on its teacher's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from limbeck.data import written_rollout
from limbeck.decoding import Sampling, generate
from limbeck.errors import DataError
from limbeck.evaluation.held_out import device_batches, evaluating
from limbeck.evaluation.statistics import LEVEL
from limbeck.models import ADAPTERS, adapters_off, completion_hidden, context_length, teacher_hidden
from limbeck.ops.chunked import linear_terms
from limbeck.types import Example, Rollout, Writer

EX_ACC_ERR = "ex_acc_err"
"""The name of the curve's end among metrics."""

SAMPLES = 10  # completions a prompt and writer, as in MiniLLM's figure
RESAMPLES = 1000
LEAST_SHARE = 0.25  # of the prompts: where fewer go on, the curve ends
ROUNDING = 1e-6  # nats a token: what is left of a divergence of zero


@dataclass(frozen=True, slots=True)
class Exposure:
    """ExAccErr over the length l = 1, 2, ... in tokens, one entry a length.

    `percent` = (R - l eps) / (l eps) x 100 with a 95 % interval `low`, `high` (None for one prompt); `on_student` = R
    and `on_teacher` = l eps in nats; `prompts` that still go on.
    """

    percent: list[float]
    low: list[float] | None
    high: list[float] | None
    on_student: list[float]
    on_teacher: list[float]
    prompts: list[int]

    @property
    def end(self) -> dict[str, float | None]:
        """`mean`, `low` and `high` at the curve's last length."""
        sides = {"mean": self.percent, "low": self.low, "high": self.high}
        return {name: values[-1] if values else None for name, values in sides.items()}


def exposure(
    student: Any,
    teacher: Any,
    examples: Sequence[Example],
    *,
    max_tokens: int,
    stop_tokens: tuple[int, ...],
    pad_id: int,
    samples: int = SAMPLES,
    seed: int = 0,
    batch_size: int | None = None,
    batch_tokens: int = 16_384,
) -> Exposure:
    """ExAccErr (Arora et al. 2022, arXiv 2204.01171; MiniLLM, arXiv 2306.08543, eq. 30 to 32) over the examples'
    prompts, with teacher p and student q:

        R(l)     = sum_{t <= l} E_{y_<t ~ q} KL(p(. | y_<t) || q(. | y_<t))
        l eps(l) = the same with y_<t ~ p
        ExAccErr(l) = (R(l) - l eps(l)) / (l eps(l)) x 100

    in nats at temperature 1, each expectation over `samples` completions a prompt (both writers draw by the same random
    numbers). A completion that has ended has no next token: at step t the mean is over those of a prompt that go on,
    then over the prompts where some of both writers do; the curve ends where fewer than LEAST_SHARE of them are left.
    Zero where the two agree to rounding. The interval resamples prompts.

    `teacher` is a model or ADAPTERS (the student with its LoRA adapters off). Raises DataError without examples,
    RolloutError as `generate` does.
    """
    if not examples:
        raise DataError("expected at least one example to measure exposure on, found none")
    sampling = Sampling(max_tokens=max_tokens, stop_tokens=stop_tokens, n=samples, seed=seed)
    prompts = [example.prompt for example in examples]
    limits = [context_length(model) for model in (student, teacher) if model is not ADAPTERS]
    limit = min((limit for limit in limits if limit is not None), default=sys.maxsize)
    writers: dict[Writer, Any] = {
        "student": nullcontext(student),
        "teacher": adapters_off(student) if teacher is ADAPTERS else nullcontext(teacher),
    }
    errors: dict[str, np.ndarray] = {}
    for writer, write in writers.items():
        with write as model:
            written = generate(model, prompts, sampling, batch_size=batch_size)
        rollouts = [
            # What the writer's context holds, the other's may not.
            written_rollout(example, c.tokens[: limit - example.prompt_tokens], c.finish_reason, writer)
            for example, of_prompt in zip(examples, _groups(written, samples), strict=True)
            for c in of_prompt
        ]
        errors[writer] = _errors(student, teacher, rollouts, samples, max_tokens, pad_id, batch_tokens)
    return curve(errors["student"], errors["teacher"])


def curve(student_PL: np.ndarray, teacher_PL: np.ndarray) -> Exposure:
    """From the mean divergences of each prompt at each step (nats; NaN where no completion goes on), on the student's
    and on the teacher's prefixes."""
    both_PL = np.isfinite(student_PL) & np.isfinite(teacher_PL)
    prompts_L = both_PL.sum(0)
    length = int((prompts_L >= max(1.0, LEAST_SHARE * len(both_PL))).cumprod().sum())
    both_PL = both_PL[:, :length]
    sides = [np.where(both_PL, values_PL[:, :length], 0.0) for values_PL in (student_PL, teacher_PL)]

    def accumulated(weights_BP: np.ndarray) -> list[np.ndarray]:
        """R and l eps; NaN from where a resample has no prompt."""
        counts_BL = weights_BP @ both_PL
        counts_BL[counts_BL == 0] = np.nan
        return [(weights_BP @ values_PL / counts_BL).cumsum(1) for values_PL in sides]

    on_student_1L, on_teacher_1L = accumulated(np.ones((1, len(both_PL))))
    low = high = None
    if len(both_PL) > 1:
        even_P = np.full(len(both_PL), 1 / len(both_PL))
        drawn_BP = np.random.default_rng(0).multinomial(len(both_PL), even_P, RESAMPLES).astype(float)
        ends = np.nanquantile(_percent(*accumulated(drawn_BP)), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        low, high = ends.tolist()
    return Exposure(
        _percent(on_student_1L, on_teacher_1L)[0].tolist(),
        low,
        high,
        on_student_1L[0].tolist(),
        on_teacher_1L[0].tolist(),
        prompts_L[:length].tolist(),
    )


def _percent(on_student_BL: np.ndarray, on_teacher_BL: np.ndarray) -> np.ndarray:
    rounding_L = ROUNDING * np.arange(1, on_student_BL.shape[1] + 1)
    excess_BL = (on_student_BL - on_teacher_BL) / np.maximum(on_teacher_BL, rounding_L) * 100
    return np.where(np.maximum(on_student_BL, on_teacher_BL) <= rounding_L, 0.0, excess_BL)


@torch.no_grad()
def _errors(
    student: Any, teacher: Any, rollouts: list[Rollout], samples: int, steps: int, pad_id: int, batch_tokens: int
) -> np.ndarray:
    """KL(p || q) [prompts, steps], the mean over a prompt's rollouts that go on; NaN where none does."""
    values_RL = np.full((len(rollouts), steps), np.nan)
    with evaluating(student, teacher):
        for places, batch in device_batches(student, rollouts, pad_id, batch_tokens):
            hidden_NH, tokens_N, head = completion_hidden(student, batch)
            signal = teacher_hidden(teacher, student, batch)
            divergences_N = linear_terms(hidden_NH, head, signal, tokens_N, stats=("forward_kl",)).stats["forward_kl"]
            row_N, column_N = batch["learnt"][:, 1:].nonzero(as_tuple=True)
            first_N = torch.tensor([rollouts[place].prompt_tokens for place in places], device=row_N.device)[row_N]
            place_N = np.array(places)[row_N.cpu().numpy()]
            values_RL[place_N, (column_N + 1 - first_N).cpu().numpy()] = divergences_N.double().cpu().numpy()
    values_PSL = values_RL.reshape(-1, samples, steps)
    going_PSL = np.isfinite(values_PSL)
    counts_PL = going_PSL.sum(1)
    sums_PL = np.where(going_PSL, values_PSL, 0.0).sum(1)
    return np.where(counts_PL > 0, sums_PL / np.maximum(counts_PL, 1), np.nan)


def _groups(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
