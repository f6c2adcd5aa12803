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
from typing import Any, NamedTuple, cast

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


class Tile(NamedTuple):
    """Some rows. `teacher_nV` is a product or log-probabilities; with `top_tokens_nK` those of `bucketed`. The weights
    are (n,), None for a term that takes no part in the loss."""

    student_nV: Tensor
    student_bias_V: Tensor | None = None
    teacher_nV: Tensor | None = None
    teacher_bias_V: Tensor | None = None
    tokens_n: Tensor | None = None
    top_tokens_nK: Tensor | None = None
    divergence_weight_n: Tensor | None = None
    nll_weight_n: Tensor | None = None

    def rows(self, chosen_n: Tensor) -> Tile:
        """The chosen rows, copied; the biases are of all rows."""
        of_rows = {name: value for name, value in self._asdict().items() if value is not None and name[-2:] != "_V"}
        return self._replace(**{name: value[chosen_n] for name, value in of_rows.items()})


Values = dict[str, Tensor]
"""Per-token values (n,) by name: `divergence`, `nll`, statistics."""


def tile_terms(request: Request, tile: Tile) -> tuple[Values, Tensor | None]:
    """Values of a tile, with autograd off. Where there is a weight, the gradient of sum(w_divergence divergence +
    w_nll nll) by the student's product takes that product's place, and its sum over rows is returned if the head has a
    bias."""
    if tile.top_tokens_nK is not None or request.divergence not in (None, *CLOSED_FORMS):
        return _put(careful, request, tile)[:2]
    function = _compiled(request) if _worth_compiling(tile.student_nV) else functools.partial(_put, fast, request)
    values, bias_grad_V, finite_n = function(tile)
    if not bool(finite_n.all()):
        rest = tile.rows(~finite_n)
        exact, more_V, _ = _put(careful, request, rest)
        tile.student_nV[~finite_n] = rest.student_nV
        for name, value_n in exact.items():
            values[name][~finite_n] = value_n
        bias_grad_V = None if bias_grad_V is None or more_V is None else bias_grad_V + more_V
    return values, bias_grad_V


def tile_logprobs(finish: Finish, product_nV: Tensor, bias_V: Tensor | None, tokens_n: Tensor) -> Tensor:
    """Log-probability (n,) of each row's token at temperature 1, from the product with the head."""
    function = _compiled_logprobs(finish) if _worth_compiling(product_nV) else functools.partial(_logprobs, finish)
    return function(product_nV, bias_V, tokens_n)


def token_logprobs(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Log-probability (N,) of each row's token at temperature 1."""
    return _chosen(logits_NV, tokens_N) - logits_NV.logsumexp(-1)


def tile_rows(vocabulary: int, rows: int, device: torch.device) -> int:
    """Rows of one tile: what a core's cache holds, one for each thread at least; all of them on a GPU."""
    if device.type != "cpu":
        return rows
    return max(torch.get_num_threads(), TILE_ENTRIES // vocabulary)


def fast(request: Request, tile: Tile) -> tuple[Values, Tensor | None]:
    """Values and gradient (n, V) by closed forms. Where a logit is -inf, some value of the row is not finite."""
    logits_nV, student = _student(request, tile, tile.student_nV)
    teacher = _teacher(request, tile)
    values: Values = {}
    gradients: list[Tensor] = []
    if request.divergence is not None:
        log_q_nV, log_p_nV = student[request.temperature], teacher[request.temperature]
        at = Point(log_q_nV, log_p_nV, log_q_nV.exp(), log_p_nV.exp())
        values["divergence"], slope_nV = CLOSED_FORMS[request.divergence](at, **dict(request.params))
        if tile.divergence_weight_n is not None:
            gradient_nV = slope_nV - at.q_NV * slope_nV.sum(-1, keepdim=True)
            gradients.append(gradient_nV * (tile.divergence_weight_n / request.temperature)[:, None])
    if tile.tokens_n is not None:
        values["nll"] = -_chosen(student[1.0], tile.tokens_n)
        if tile.nll_weight_n is not None:
            gradient_nV = student[1.0].exp() * tile.nll_weight_n[:, None]
            gradients.append(gradient_nV.scatter_add(-1, tile.tokens_n[:, None], -tile.nll_weight_n[:, None]))
    values |= {name: STATS[name](student[1.0], teacher.get(1.0)) for name in request.stats}
    if not gradients:
        return values, None
    total_nV = gradients[0] if len(gradients) == 1 else gradients[0] + gradients[1]
    return values, request.student.product_grad(total_nV, logits_nV)


def careful(request: Request, tile: Tile) -> tuple[Values, Tensor | None]:
    """Values and gradient (n, V) by autograd over the definitions: any divergence, zeros included."""
    weights = {"divergence": tile.divergence_weight_n, "nll": tile.nll_weight_n}
    weighted = {name: weight_n for name, weight_n in weights.items() if weight_n is not None}
    top_tokens_nK = tile.top_tokens_nK
    product_nV = tile.student_nV.detach().to(at_least_float32(tile.student_nV.dtype)).requires_grad_(bool(weighted))
    teacher = _teacher(request, tile)
    terms: dict[str, Tensor] = {}
    with torch.set_grad_enabled(bool(weighted)):
        _, student = _student(request, tile, product_nV)
        if request.divergence is not None:
            log_q_nV, log_p_nV = student[request.temperature], teacher[request.temperature]
            if top_tokens_nK is not None:
                log_q_nV = bucketed(log_q_nV, top_tokens_nK)
            terms["divergence"] = request.divergence(log_q_nV, log_p_nV, **dict(request.params))
        if tile.tokens_n is not None:
            terms["nll"] = -_chosen(student[1.0], tile.tokens_n)
    values = {name: term.detach() for name, term in terms.items()}
    for name in request.stats:
        if top_tokens_nK is not None:
            values[name] = sparse_stat(name, student[1.0].detach(), top_tokens_nK, teacher[1.0])
        else:
            values[name] = STATS[name](student[1.0].detach(), teacher.get(1.0))
    if not weighted:
        return values, None
    upstream = [weight_n.to(terms[name].dtype) for name, weight_n in weighted.items()]
    return values, torch.autograd.grad([terms[name] for name in weighted], product_nV, upstream)[0]


def _student(request: Request, tile: Tile, product_nV: Tensor) -> tuple[Tensor, dict[float, Tensor]]:
    """Logits (n, V), and log-probabilities at every temperature that is asked for."""
    logits_nV = request.student.logits(product_nV, tile.student_bias_V)
    plain = tile.tokens_n is not None or bool(request.stats)
    return logits_nV, _log_softmaxes(logits_nV, request.temperatures(plain))


def _teacher(request: Request, tile: Tile) -> dict[float, Tensor]:
    """The teacher's log-probabilities at every temperature that is asked for: those of buckets are as they come."""
    if tile.teacher_nV is None or request.teacher is None:
        return {}
    if tile.top_tokens_nK is not None:
        return {1.0: tile.teacher_nV.to(at_least_float32(tile.teacher_nV.dtype))}
    logits_nV = request.teacher.logits(tile.teacher_nV, tile.teacher_bias_V)
    return _log_softmaxes(logits_nV, request.temperatures(bool(request.stats)))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _put(
    function: Callable[[Request, Tile], tuple[Values, Tensor | None]], request: Request, tile: Tile
) -> tuple[Values, Tensor | None, Tensor]:
    """`function`'s values, the gradient by the bias if there is one, and which rows (n,) are settled: in those, the
    gradient has taken the place of the product. `careful` settles all."""
    values, gradient_nV = function(request, tile)
    settled_n = torch.stack(list(values.values())).isfinite().all(0)
    if function is careful:
        settled_n = torch.ones_like(settled_n)
    if gradient_nV is None:
        return values, None, settled_n
    settled = settled_n[:, None]
    tile.student_nV.copy_(torch.where(settled, gradient_nV, tile.student_nV))
    bias_grad_V = None if tile.student_bias_V is None else torch.where(settled, gradient_nV, 0.0).sum(0)
    return values, bias_grad_V, settled_n


def _log_softmaxes(logits_NV: Tensor, temperatures: set[float]) -> dict[float, Tensor]:
    return {temperature: _log_softmax(logits_NV, temperature) for temperature in temperatures}


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits_NV if temperature == 1 else logits_NV / temperature, dim=-1)


def _chosen(logprobs_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Log-probability (N,) of each row's token."""
    return logprobs_NV.gather(-1, tokens_N[:, None]).squeeze(-1)


def _logprobs(finish: Finish, product_nV: Tensor, bias_V: Tensor | None, tokens_n: Tensor) -> Tensor:
    return token_logprobs(finish.logits(product_nV, bias_V), tokens_n)


def _worth_compiling(student_nV: Tensor) -> bool:
    return student_nV.shape[-1] >= COMPILE_FROM and _compiler_at_hand()


@functools.cache
def _compiler_at_hand() -> bool:
    """Whether torch can compile for this machine: it writes C++ for a CPU and needs a host compiler for a GPU too."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


@functools.cache
def _compiled(request: Request) -> Callable[[Tile], tuple[Values, Tensor | None, Tensor]]:
    compiler = cast(Any, torch).compile  # its stubs do not know `isolate_recompiles`: a request counts its own variants
    return compiler(functools.partial(_put, fast, request), isolate_recompiles=True)


@functools.cache
def _compiled_logprobs(finish: Finish) -> Callable[..., Tensor]:
    return cast(Any, torch).compile(functools.partial(_logprobs, finish), isolate_recompiles=True)
