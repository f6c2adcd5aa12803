"""Divergence, cross-entropy and statistics straight from hidden states and output heads, a chunk of tokens at a time.

The logits of a whole batch, [N, V], are never built: each chunk's values and gradients are computed in the same forward
pass and only the gradients of the hidden states [N, H] and of the head [V, H] are kept. The gradient in hand is the one
of `loss_N.sum()`; `backward` scales it where the upstream gradient is one constant (every usual reduction), and
otherwise sweeps the chunks again with the right weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.ops.checks import check_request, check_shapes, find_divergence
from limbeck.ops.statistics import STATS
from limbeck.types import Head, Hidden, Signal, Terms

TILE_BYTES = 36 << 20
"""Size of one [chunk, V] tile in float32, of which about a dozen live at once. Over 32 MiB glibc gives a freed tile's
memory back at once; at 16 to 32 MiB its heap kept up to twice as much, and smaller chunks read the head more often."""

Divergence = Callable[..., Tensor]
Weight = Tensor | float
WeightFunction = Callable[[slice, Tensor | None, Tensor | None], tuple[Weight, Weight]]
"""weights(chunk, student_logprob_n, teacher_logprob_n) -> (w_divergence_n, w_nll_n): the log-probabilities of the
chunk's tokens at temperature 1, detached; None without tokens or without a teacher.
Must be stateless. The weight of a term that is not computed is not read."""


def head_logits(hidden_NH: Tensor, head: Head) -> Tensor:
    """Logits (N, rows) in float32 (float64 stays): the one place that turns hidden states into logits.

    The product is taken in the weight's dtype (autocast's where that is on); bias, scale and soft-cap in float32.
    """
    weight_VH = head.weight_VH[: head.rows]
    return _finish_logits(F.linear(hidden_NH.to(weight_VH.dtype), weight_VH), head)


def linear_divergence(
    student_hidden_NH: Tensor,
    student_weight_VH: Tensor,
    teacher_hidden_NG: Tensor,
    teacher_weight_VG: Tensor,
    divergence: str | Divergence = "jsd",
    *,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_tokens: int | None = None,
    **params: Any,
) -> Tensor:
    """Divergence (N,) in nats between student and teacher, differentiable in the student: `linear_terms`, fixed."""
    student = Head(student_weight_VH, student_bias, softcap=student_softcap)
    teacher = Hidden(teacher_hidden_NG, Head(teacher_weight_VG, teacher_bias, softcap=teacher_softcap))
    return linear_terms(
        student_hidden_NH,
        student,
        teacher,
        divergence=divergence,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        **params,
    ).loss_N


def linear_terms(
    student_hidden_NH: Tensor,
    head: Head,
    signal: Signal | None,
    tokens_N: Tensor | None = None,
    *,
    divergence: str | Divergence | None = None,
    temperature: float = 1.0,
    weights: tuple[float, float] | WeightFunction | None = None,
    stats: Sequence[str] = (),
    chunk_tokens: int | None = None,
    **params: Any,
) -> Terms:
    """Per-token divergence from the teacher, negative log-likelihood of `tokens_N`, their weighted sum, and statistics.

    The student's hidden states, weight and bias get gradients where they ask for them; the teacher gets none.
    `divergence` is a key of `DIVERGENCES` or a function like its entries, given `params`; both models' logits are
    divided by `temperature` for it (no hidden factor of T^2). The likelihood, the weights' arguments and `stats` (keys
    of `STATS`) are at temperature 1. `weights` = (w_divergence, w_nll), by default (1, 0), or (0, 1) without a
    divergence, or a function called once a chunk. `chunk_tokens` trades memory for speed and changes no result.

    Raises RecipeError for unknown names and terms that lack their teacher, PreflightError where the vocabularies differ
    in size, ValueError for shapes and numbers out of range.
    """
    if weights is None:
        weights = (0.0, 1.0) if divergence is None else (1.0, 0.0)
    check_request(signal, tokens_N, divergence, None if callable(weights) else weights, stats, params)
    check_shapes(student_hidden_NH, head, signal, tokens_N, temperature, chunk_tokens)
    dtype = _product_dtype(head.weight_VH)
    plan = _Plan(
        signal=signal,
        tokens_N=tokens_N,
        divergence=None if divergence is None else partial(find_divergence(divergence), **params),
        temperature=temperature,
        weights=weights,
        stats=tuple(stats),
        chunk_tokens=chunk_tokens or min(1024, max(16, TILE_BYTES // (4 * head.size))),
        student_dtype=dtype,
        teacher_dtype=_product_dtype(signal.head.weight_VH) if isinstance(signal, Hidden) else dtype,
    )
    inputs = (student_hidden_NH, head.weight_VH, head.bias_V)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        loss_N, divergence_N, nll_N, *values = cast(Any, _LinearTerms).apply(*inputs, head, plan)
        return Terms(loss_N, divergence_N, nll_N, dict(zip(plan.stats, values, strict=True)))
    with torch.no_grad():
        columns = _sweep(plan, student_hidden_NH, head)
    return Terms(
        columns["loss"], columns.get("divergence"), columns.get("nll"), {name: columns[name] for name in plan.stats}
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to compute, apart from the tensors that get a gradient."""

    signal: Signal | None
    tokens_N: Tensor | None
    divergence: Divergence | None
    temperature: float
    weights: tuple[float, float] | WeightFunction
    stats: tuple[str, ...]
    chunk_tokens: int
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the per-token values that a sweep returns."""
        terms = {"divergence": self.divergence is not None, "nll": self.tokens_N is not None}
        terms |= dict.fromkeys(("weight_divergence", "weight_nll"), callable(self.weights))
        return ("loss", *(name for name, asked in terms.items() if asked), *self.stats)

    def temperatures(self, plain: bool) -> set[float]:
        """Temperatures at which log-probabilities are needed: the divergence's, and 1 if `plain`."""
        asked = [self.temperature] if self.divergence is not None else []
        return {*asked, 1.0} if plain else set(asked)


class _Gradients:
    """Gradients of hidden states, weight and bias (None where not needed), filled chunk by chunk.

    The head's are summed in float32 at least, over all its rows: those of padding stay exactly zero.
    """

    def __init__(self, hidden_NH: Tensor, head: Head, needed: Sequence[bool]) -> None:
        def zeros(x: Tensor) -> Tensor:
            return torch.zeros_like(x, dtype=_at_least_float32(x.dtype))

        self.head = head
        self.hidden_NH = torch.zeros_like(hidden_NH) if needed[0] else None
        self.weight_VH = zeros(head.weight_VH) if needed[1] else None
        self.bias_V = zeros(head.bias_V) if needed[2] and head.bias_V is not None else None

    def add(self, chunk: slice, product_grad_nV: Tensor, hidden_nH: Tensor, weight_VH: Tensor) -> None:
        """One chunk: the gradient of hidden_nH @ weight_VH.T goes on to its two factors and to the bias."""
        rows = self.head.rows
        if self.bias_V is not None:
            self.bias_V[:rows] += product_grad_nV.sum(0)
        product_grad_nV = product_grad_nV.to(weight_VH.dtype)
        if self.hidden_NH is not None:
            self.hidden_NH[chunk] = product_grad_nV @ weight_VH
        if self.weight_VH is None:
            return
        if self.weight_VH.dtype == weight_VH.dtype:
            self.weight_VH[:rows].addmm_(product_grad_nV.T, hidden_nH)  # no second [V, H]
        else:
            self.weight_VH[:rows] += product_grad_nV.T @ hidden_nH

    def scale(self, constant_N: Tensor) -> None:
        """Multiplies all by the one number that `constant_N` holds N times (with N = 0 they are zero anyway)."""
        for gradient in (self.hidden_NH, self.weight_VH, self.bias_V):
            if gradient is not None and constant_N.numel():
                gradient.mul_(constant_N[0])

    def results(self) -> tuple[Tensor | None, ...]:
        """Hidden, weight and bias gradients in the dtypes of what they belong to; None for `head` and `plan`."""
        weight_VH, bias_V = self.weight_VH, self.bias_V
        if weight_VH is not None:
            weight_VH = weight_VH.to(self.head.weight_VH.dtype)
        if bias_V is not None and self.head.bias_V is not None:
            bias_V = bias_V.to(self.head.bias_V.dtype)
        return self.hidden_NH, weight_VH, bias_V, None, None


class _LinearTerms(torch.autograd.Function):
    """(hidden, weight, bias) -> loss_N, divergence_N, nll_N, *stats."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, head: Head, plan: _Plan
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V)
        ctx.head, ctx.plan = head, plan
        ctx.gradients = _Gradients(hidden_NH, head, ctx.needs_input_grad)
        columns = _sweep(plan, hidden_NH, head, ctx.gradients)
        ctx.weights = plan.weights
        if callable(plan.weights):
            ctx.weights = columns["weight_divergence"], columns["weight_nll"]
        stats = [columns[name] for name in plan.stats]
        ctx.mark_non_differentiable(*stats)
        return columns["loss"], columns.get("divergence"), columns.get("nll"), *stats

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("linear_terms has first derivatives only, found create_graph=True: use head_logits")
        loss_grad_N, divergence_grad_N, nll_grad_N = grad_outputs[:3]
        # Taken away, as what is returned may become somebody's `.grad`: a second backward sweeps again.
        gradients, ctx.gradients = cast("_Gradients | None", ctx.gradients), None
        only_loss = divergence_grad_N is None and nll_grad_N is None
        if gradients is not None and loss_grad_N is not None and only_loss and _is_constant(loss_grad_N):
            gradients.scale(loss_grad_N)
            return gradients.results()
        del gradients
        hidden_NH, weight_VH, bias_V = ctx.saved_tensors
        head = replace(ctx.head, weight_VH=weight_VH, bias_V=bias_V)
        divergence_weight = _effective_weight(loss_grad_N, ctx.weights[0], divergence_grad_N)
        nll_weight = _effective_weight(loss_grad_N, ctx.weights[1], nll_grad_N)

        def weights(chunk: slice, *_: object) -> tuple[Weight, Weight]:
            return _take(divergence_weight, chunk), _take(nll_weight, chunk)

        again = _Gradients(hidden_NH, head, ctx.needs_input_grad)
        _sweep(replace(ctx.plan, weights=weights, stats=()), hidden_NH, head, again)
        return again.results()


def _sweep(plan: _Plan, hidden_NH: Tensor, head: Head, gradients: _Gradients | None = None) -> dict[str, Tensor]:
    """One pass over the chunks: the per-token values (N,) by name; `gradients`, if given, are filled.

    Runs with autograd off; each chunk has its own small graph, from the product hidden @ weight.T on, freed at once.
    """
    tokens = hidden_NH.shape[0]
    dtype = _at_least_float32(plan.student_dtype)
    columns = {name: hidden_NH.new_zeros(tokens, dtype=dtype) for name in plan.columns}
    with torch.autocast(hidden_NH.device.type, enabled=False):
        cast_head = replace(head, weight_VH=head.weight_VH[: head.rows].to(plan.student_dtype))
        signal = _cast_signal(plan)
        for start in range(0, tokens, plan.chunk_tokens):
            chunk = slice(start, min(start + plan.chunk_tokens, tokens))
            values = _chunk_values(plan, chunk, hidden_NH[chunk].to(plan.student_dtype), cast_head, signal, gradients)
            for name, value in values.items():
                columns[name][chunk] = value
    return columns


def _chunk_values(
    plan: _Plan, chunk: slice, hidden_nH: Tensor, head: Head, signal: Signal | None, gradients: _Gradients | None
) -> dict[str, Weight]:
    """The values of one chunk by name; its gradients are added to `gradients`."""
    learn = gradients is not None
    tokens_n = None if plan.tokens_N is None else plan.tokens_N[chunk]
    teacher = _teacher_logprobs(plan, chunk, signal)
    product_nV = F.linear(hidden_nH, head.weight_VH)
    product_nV = product_nV.to(_at_least_float32(product_nV.dtype)).requires_grad_(learn)
    with torch.set_grad_enabled(learn):
        logits_nV = _finish_logits(product_nV, head)
        student = {t: _log_softmax(logits_nV, t) for t in plan.temperatures(tokens_n is not None or bool(plan.stats))}
        terms: dict[str, Tensor] = {}
        if plan.divergence is not None:
            terms["divergence"] = plan.divergence(student[plan.temperature], teacher[plan.temperature])
        if tokens_n is not None:
            terms["nll"] = -_chosen(student[1.0], tokens_n)
    values: dict[str, Weight] = {name: term.detach() for name, term in terms.items()}
    weights = plan.weights
    if callable(weights):
        student_n = None if tokens_n is None else _chosen(student[1.0].detach(), tokens_n)
        teacher_n = None if tokens_n is None or signal is None else _chosen(teacher[1.0], tokens_n)
        weights = weights(chunk, student_n, teacher_n)
        values["weight_divergence"], values["weight_nll"] = weights
    named = zip(("divergence", "nll"), weights, strict=True)
    weighted = {name: weight for name, weight in named if name in terms and not _is_zero(weight)}
    values["loss"] = sum((weight * values[name] for name, weight in weighted.items()), 0.0)
    if gradients is not None and weighted:
        upstream = [torch.as_tensor(w).to(terms[name]).expand_as(terms[name]) for name, w in weighted.items()]
        (product_grad_nV,) = torch.autograd.grad([terms[name] for name in weighted], product_nV, upstream)
        gradients.add(chunk, product_grad_nV, hidden_nH, head.weight_VH)
    for name in plan.stats:
        values[name] = STATS[name](student[1.0].detach(), teacher.get(1.0))
    return values


def _teacher_logprobs(plan: _Plan, chunk: slice, signal: Signal | None) -> dict[float, Tensor]:
    """The teacher's log-probabilities (n, V) at every temperature that is asked for, detached."""
    if signal is None:
        return {}
    if isinstance(signal, Hidden):
        logits_nV = head_logits(signal.hidden_NH[chunk], signal.head)
    else:
        logits_nV = signal.logprobs_NV[chunk]
        logits_nV = logits_nV.to(_at_least_float32(logits_nV.dtype))
    plain = callable(plan.weights) or bool(plan.stats)
    return {t: _log_softmax(logits_nV, t) for t in plan.temperatures(plain)}


def _cast_signal(plan: _Plan) -> Signal | None:
    """The signal with its head in the dtype of the product."""
    if not isinstance(plan.signal, Hidden):
        return plan.signal
    head = plan.signal.head
    return replace(plan.signal, head=replace(head, weight_VH=head.weight_VH.to(plan.teacher_dtype)))


def _finish_logits(product_NV: Tensor, head: Head) -> Tensor:
    """softcap(scale * (product + bias)), in float32 at least."""
    logits_NV = product_NV.to(_at_least_float32(product_NV.dtype))
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V[: head.rows]
    if head.scale != 1:
        logits_NV = logits_NV * head.scale
    return logits_NV if head.softcap is None else head.softcap * torch.tanh(logits_NV / head.softcap)


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits_NV if temperature == 1 else logits_NV / temperature, dim=-1)


def _chosen(logprobs_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Log-probability (N,) of each row's token."""
    return logprobs_NV.gather(-1, tokens_N[:, None]).squeeze(-1)


def _is_constant(values_N: Tensor) -> bool:
    return bool((values_N == values_N[:1]).all())


def _is_zero(weight: Weight) -> bool:
    """Whether a term is left out: a zero that is known without looking at a tensor."""
    return not isinstance(weight, Tensor) and weight == 0


def _take(weight: Weight, chunk: slice) -> Weight:
    return weight[chunk] if isinstance(weight, Tensor) else weight


def _effective_weight(loss_grad_N: Tensor | None, weight: Weight, term_grad_N: Tensor | None) -> Weight:
    """Upstream gradient of one term: what comes through `loss_N` and what comes to the term itself."""
    through_loss = 0.0 if loss_grad_N is None or _is_zero(weight) else loss_grad_N * weight
    return through_loss if term_grad_N is None else through_loss + term_grad_N


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _product_dtype(weight_VH: Tensor) -> torch.dtype:
    """Dtype of hidden @ weight.T: the weight's, or autocast's (which leaves float64 alone)."""
    device = weight_VH.device.type
    if weight_VH.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return weight_VH.dtype
    return torch.get_autocast_dtype(device)
