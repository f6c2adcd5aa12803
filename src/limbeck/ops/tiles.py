"""Between the head's products: terms, statistics and the gradient by the logits for a tile of rows (tokens).

`fast` uses closed forms and never autograd: a handful of elementwise passes, compiled into one where the vocabulary is
large and a compiler is at hand. `careful` uses autograd over the divergence's own definition: for divergences without a
closed form, for a teacher's top-k + tail, and for rows with zero probabilities (logits of -inf), where the closed forms
give NaN.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.ops.closed_forms import CLOSED_FORMS, Point
from limbeck.ops.sparse import bucketed, sparse_stat
from limbeck.ops.statistics import STATS
from limbeck.types import Head

Divergence = Callable[..., Tensor]

COMPILE_FROM = 16_384
"""Vocabulary from which compiling (5 to 30 s, once a process and request) is worth it."""

TILE_ENTRIES = 1 << 17
"""Entries of a tile: its float32 temporaries, half a MiB each, stay in a core's cache."""


@dataclass(frozen=True)
class Finish:
    """From the product hidden @ weight.T to logits: softcap(scale * (product + bias))."""

    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(head: Head) -> Finish:
        return Finish(head.scale, head.softcap)

    def logits(self, product_NV: Tensor, bias_V: Tensor | None) -> Tensor:
        """In float32 at least."""
        logits_NV = product_NV.to(at_least_float32(product_NV.dtype))
        if bias_V is not None:
            logits_NV = logits_NV + bias_V[: logits_NV.shape[-1]]
        if self.scale != 1:
            logits_NV = logits_NV * self.scale
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)

    def product_grad(self, logits_grad_NV: Tensor, logits_NV: Tensor) -> Tensor:
        """The gradient by the product (and, summed over rows, by the bias) from that by the logits."""
        if self.softcap is not None:
            logits_grad_NV = logits_grad_NV * (1 - (logits_NV / self.softcap) ** 2)
        return logits_grad_NV if self.scale == 1 else logits_grad_NV * self.scale


@dataclass(frozen=True)
class Request:
    """What to compute for each row, apart from tensors. `params` are the divergence's, as pairs."""

    divergence: Divergence | None
    params: tuple[tuple[str, Any], ...]
    temperature: float
    stats: tuple[str, ...]
    student: Finish
    teacher: Finish | None

    def temperatures(self, plain: bool) -> set[float]:
        """Temperatures at which log-probabilities are needed: the divergence's, and 1 if `plain`."""
        asked = [self.temperature] if self.divergence is not None else []
        return {*asked, 1.0} if plain else set(asked)


@dataclass(frozen=True)
class Tile:
    """Some rows. `teacher_nV` is a product or log-probabilities; with `top_tokens_nK` those of `bucketed`."""

    student_nV: Tensor
    student_bias_V: Tensor | None
    teacher_nV: Tensor | None
    teacher_bias_V: Tensor | None
    tokens_n: Tensor | None
    top_tokens_nK: Tensor | None = None

    def others(self) -> tuple[Tensor | None, ...]:
        """All but the student's product."""
        return self.student_bias_V, self.teacher_nV, self.teacher_bias_V, self.tokens_n, self.top_tokens_nK


Weight = Tensor | None
Values = dict[str, Tensor]
"""Per-token values (n,) by name: `divergence`, `nll`, statistics."""


def tile_terms(
    request: Request, tile: Tile, divergence_weight_n: Weight, nll_weight_n: Weight
) -> tuple[Values, Tensor | None]:
    """Values of a tile, with autograd off. Where there is a weight, the gradient of sum(w_divergence divergence +
    w_nll nll) by the student's product takes that product's place, and its sum over rows is returned if the head has a
    bias."""
    student_nV, others = tile.student_nV, (*tile.others(), divergence_weight_n, nll_weight_n)
    if tile.top_tokens_nK is not None or request.divergence not in (None, *CLOSED_FORMS):
        return _put(careful, request, student_nV, *others)[:2]
    function = _compiled(request) if _worth_compiling(student_nV) else functools.partial(_put, fast, request)
    values, bias_grad_V, finite_n = function(student_nV, *others)
    if not bool(finite_n.all()):
        rest_n = ~finite_n
        by_row = (None, tile.teacher_nV, None, tile.tokens_n, None, divergence_weight_n, nll_weight_n)
        rest = [given if x is None else x[rest_n] for x, given in zip(by_row, others, strict=True)]
        student_rest_nV = student_nV[rest_n]
        exact, more_V, _ = _put(careful, request, student_rest_nV, *rest)
        student_nV[rest_n] = student_rest_nV
        for name, value_n in exact.items():
            values[name][rest_n] = value_n
        bias_grad_V = None if bias_grad_V is None or more_V is None else bias_grad_V + more_V
    return values, bias_grad_V


def tile_rows(vocabulary: int, rows: int, device: torch.device) -> int:
    """Rows of one tile: what a core's cache holds, one for each thread at least; all of them on a GPU."""
    if device.type != "cpu":
        return rows
    return max(torch.get_num_threads(), TILE_ENTRIES // vocabulary)


def token_logprobs(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Log-probability (N,) of each row's token at temperature 1."""
    return _chosen(_log_softmax(logits_NV, 1.0), tokens_N)


def fast(
    request: Request,
    student_nV: Tensor,
    student_bias_V: Tensor | None,
    teacher_nV: Tensor | None,
    teacher_bias_V: Tensor | None,
    tokens_n: Tensor | None,
    top_tokens_nK: Tensor | None,
    divergence_weight_n: Weight,
    nll_weight_n: Weight,
) -> tuple[Values, Tensor | None]:
    """Values and gradient (n, V) by closed forms. Where a logit is -inf, some value of the row is not finite."""
    logits_nV = request.student.logits(student_nV, student_bias_V)
    student = _log_softmaxes(logits_nV, request.temperatures(tokens_n is not None or bool(request.stats)))
    teacher: dict[float, Tensor] = {}
    if teacher_nV is not None and request.teacher is not None:
        teacher_logits_nV = request.teacher.logits(teacher_nV, teacher_bias_V)
        teacher = _log_softmaxes(teacher_logits_nV, request.temperatures(bool(request.stats)))
    values: dict[str, Tensor] = {}
    gradients: list[Tensor] = []
    if request.divergence is not None:
        log_q_nV, log_p_nV = student[request.temperature], teacher[request.temperature]
        at = Point(log_q_nV, log_p_nV, log_q_nV.exp(), log_p_nV.exp())
        values["divergence"], slope_nV = CLOSED_FORMS[request.divergence](at, **dict(request.params))
        if divergence_weight_n is not None:
            gradient_nV = slope_nV - at.q_NV * slope_nV.sum(-1, keepdim=True)
            gradients.append(gradient_nV * (divergence_weight_n / request.temperature)[:, None])
    if tokens_n is not None:
        values["nll"] = -_chosen(student[1.0], tokens_n)
        if nll_weight_n is not None:
            gradient_nV = student[1.0].exp() * nll_weight_n[:, None]
            gradients.append(gradient_nV.scatter_add(-1, tokens_n[:, None], -nll_weight_n[:, None]))
    values |= {name: STATS[name](student[1.0], teacher.get(1.0)) for name in request.stats}
    if not gradients:
        return values, None
    total_nV = gradients[0] if len(gradients) == 1 else gradients[0] + gradients[1]
    return values, request.student.product_grad(total_nV, logits_nV)


def careful(
    request: Request,
    student_nV: Tensor,
    student_bias_V: Tensor | None,
    teacher_nV: Tensor | None,
    teacher_bias_V: Tensor | None,
    tokens_n: Tensor | None,
    top_tokens_nK: Tensor | None,
    divergence_weight_n: Weight,
    nll_weight_n: Weight,
) -> tuple[Values, Tensor | None]:
    """Values and gradient (n, V) by autograd over the definitions: any divergence, zeros included."""
    weights = {"divergence": divergence_weight_n, "nll": nll_weight_n}
    learn = any(weight is not None for weight in weights.values())
    product_nV = student_nV.detach().to(at_least_float32(student_nV.dtype)).requires_grad_(learn)
    teacher: dict[float, Tensor] = {}
    if teacher_nV is not None and top_tokens_nK is not None:
        teacher = {1.0: teacher_nV.to(product_nV.dtype)}
    elif teacher_nV is not None and request.teacher is not None:
        teacher_logits_nV = request.teacher.logits(teacher_nV, teacher_bias_V)
        teacher = _log_softmaxes(teacher_logits_nV, request.temperatures(bool(request.stats)))
    terms: dict[str, Tensor] = {}
    with torch.set_grad_enabled(learn):
        logits_nV = request.student.logits(product_nV, student_bias_V)
        student = _log_softmaxes(logits_nV, request.temperatures(tokens_n is not None or bool(request.stats)))
        if request.divergence is not None:
            log_q_nV, log_p_nV = student[request.temperature], teacher[request.temperature]
            if top_tokens_nK is not None:
                log_q_nV = bucketed(log_q_nV, top_tokens_nK)
            terms["divergence"] = request.divergence(log_q_nV, log_p_nV, **dict(request.params))
        if tokens_n is not None:
            terms["nll"] = -_chosen(student[1.0], tokens_n)
    values = {name: term.detach() for name, term in terms.items()}
    for name in request.stats:
        if top_tokens_nK is not None:
            values[name] = sparse_stat(name, student[1.0].detach(), top_tokens_nK, teacher[1.0])
        else:
            values[name] = STATS[name](student[1.0].detach(), teacher.get(1.0))
    if not learn:
        return values, None
    weighted = {name: weight for name, weight in weights.items() if weight is not None}
    upstream = [weight.to(terms[name].dtype) for name, weight in weighted.items()]
    return values, torch.autograd.grad([terms[name] for name in weighted], product_nV, upstream)[0]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _put(
    function: Callable[..., tuple[Values, Tensor | None]], request: Request, student_nV: Tensor, *others: Tensor | None
) -> tuple[Values, Tensor | None, Tensor]:
    """`function`'s values, the gradient by the bias if there is one, and which rows (n,) are finite: in those, the
    gradient has taken the place of the product."""
    values, gradient_nV = function(request, student_nV, *others)
    finite_n = torch.stack(list(values.values())).isfinite().all(0)
    if function is careful:
        finite_n = torch.ones_like(finite_n)
    if gradient_nV is None:
        return values, None, finite_n
    settled = finite_n[:, None]
    student_nV.copy_(torch.where(settled, gradient_nV, student_nV))
    bias_grad_V = None if others[0] is None else torch.where(settled, gradient_nV, 0.0).sum(0)
    return values, bias_grad_V, finite_n


def _log_softmaxes(logits_NV: Tensor, temperatures: set[float]) -> dict[float, Tensor]:
    return {temperature: _log_softmax(logits_NV, temperature) for temperature in temperatures}


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits_NV if temperature == 1 else logits_NV / temperature, dim=-1)


def _chosen(logprobs_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Log-probability (N,) of each row's token."""
    return logprobs_NV.gather(-1, tokens_N[:, None]).squeeze(-1)


def _worth_compiling(student_nV: Tensor) -> bool:
    return student_nV.shape[-1] >= COMPILE_FROM and _compiler_at_hand()


@functools.cache
def _compiler_at_hand() -> bool:
    """Whether torch can compile for this machine: it writes C++ for a CPU and needs a host compiler for a GPU too."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


@functools.cache
def _compiled(request: Request) -> Callable[..., tuple[Values, Tensor | None, Tensor]]:
    compiler = cast(Any, torch).compile  # its stubs do not know `isolate_recompiles`: a request counts its own variants
    return compiler(functools.partial(_put, fast, request), isolate_recompiles=True)
