"""Divergence, cross-entropy and statistics straight from hidden states and output heads, a chunk of tokens at a time.

The logits of a whole batch, [N, V], are never built: each chunk's values and gradients are computed in the same forward
pass and only the gradients of the hidden states [N, H] and of the head [V, H] are kept. A chunk is large, for the sake
of the products with the head, and lives in two buffers that all chunks share; between the products it is worked on in
tiles of a few rows (`tiles.py`), and the gradient by the logits takes their place in the buffer. The gradient in hand
is the one of `loss_N.sum()`; `backward` scales it where the upstream gradient is one constant (every usual reduction),
and otherwise sweeps the chunks again with the right weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from limbeck.ops.checks import check_request, check_shapes, find_divergence
from limbeck.ops.pages import keep_pages
from limbeck.ops.products import back, linear, linear_into, onednn_wins, outer_into
from limbeck.ops.sparse import buckets_of
from limbeck.ops.tiles import Divergence, Finish, Request, Tile, at_least_float32, tile_logprobs, tile_rows, tile_terms
from limbeck.types import Dense, Head, Hidden, Signal, Sparse, Terms

BUFFER_BYTES = 160 << 20
"""Most bytes of one chunk's logits; student and teacher have such a buffer each. With 151 936 tokens in float32: 276
rows, which took no longer than 400 (AVX2)."""

CHUNK_TOKENS = 512
"""Tokens of a chunk, where `BUFFER_BYTES` allows: from there on the products with the head run at nearly full speed."""

ONEDNN_TOKENS = 256
"""The same where `ops.products` takes them to oneDNN: half the memory, and no slower."""

Weight = Tensor | float
WeightFunction = Callable[[slice, Tensor | None, Tensor | None], tuple[Weight, Weight]]
"""weights(chunk, student_logprob_n, teacher_logprob_n) -> (w_divergence_n, w_nll_n), called for a tile of a chunk's
rows at a time, `chunk` being those rows among all: the log-probabilities of the
chunk's tokens at temperature 1, detached; None without tokens or without a teacher's whole distribution.
Must be stateless. The weight of a term that is not computed is not read."""


def head_logits(hidden_NH: Tensor, head: Head, product: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Logits (N, rows) in float32 (float64 stays): the one place that turns hidden states into logits.

    The product is taken in the weight's dtype (autocast's where that is on); bias, scale and soft-cap in float32.
    `product`: hidden @ weight.T of these rows, where somebody keeps the weight ready for it.
    """
    weight_VH = head.weight_VH[: head.rows]
    hidden_NH = hidden_NH.to(weight_VH.dtype)
    return Finish.of(head).logits(product(hidden_NH) if product else linear(hidden_NH, weight_VH), head.bias_V)


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
    weights_see: Sequence[str] = ("student", "teacher"),
    stats: Sequence[str] = (),
    chunk_tokens: int | None = None,
    **params: Any,
) -> Terms:
    """Per-token divergence from the teacher, negative log-likelihood of `tokens_N`, their weighted sum, and statistics.

    The student's hidden states, weight and bias get gradients where they ask for them; the teacher gets none.
    `divergence` is a key of `DIVERGENCES` or a function like its entries, given `params`; both models' logits are
    divided by `temperature` for it (no hidden factor of T^2). The likelihood, the weights' arguments and `stats` (keys
    of `STATS`) are at temperature 1. `weights` = (w_divergence, w_nll), by default (1, 0), or (0, 1) without a
    divergence, or a function called once a tile of rows; `weights_see` says whose log-probabilities it is given (each
    costs a pass over the logits), None for the other. `chunk_tokens` trades memory for speed and changes no result.

    Raises RecipeError for unknown names and terms that lack their teacher, PreflightError where the vocabularies differ
    in size, ValueError for shapes and numbers out of range.
    """
    if weights is None:
        weights = (0.0, 1.0) if divergence is None else (1.0, 0.0)
    check_request(signal, tokens_N, divergence, None if callable(weights) else weights, stats, params)
    check_shapes(student_hidden_NH, head, signal, tokens_N, temperature, chunk_tokens)
    dtype = _product_dtype(head.weight_VH)
    plan = _Plan(
        request=Request(
            divergence=None if divergence is None else find_divergence(divergence),
            params=tuple(params.items()),
            temperature=temperature,
            stats=tuple(stats),
            student=Finish.of(head),
            teacher=Finish.of(signal.head) if isinstance(signal, Hidden) else None if signal is None else Finish(),
        ),
        signal=signal,
        tokens_N=tokens_N,
        weights=weights,
        weights_see=tuple(weights_see),
        chunk_tokens=chunk_tokens or _chunk_tokens(head.size, dtype, head.weight_VH.device),
        student_dtype=dtype,
        teacher_dtype=_product_dtype(signal.head.weight_VH) if isinstance(signal, Hidden) else dtype,
    )
    inputs = (student_hidden_NH, head.weight_VH, head.bias_V)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        loss_N, divergence_N, nll_N, *values = cast(Any, _LinearTerms).apply(*inputs, head, plan)
        return Terms(loss_N, divergence_N, nll_N, dict(zip(plan.request.stats, values, strict=True)))
    with torch.no_grad():
        columns = _sweep(plan, student_hidden_NH, head)
    return Terms(
        columns["loss"], columns.get("divergence"), columns.get("nll"), {name: columns[name] for name in stats}
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to compute, apart from the tensors that get a gradient."""

    request: Request
    signal: Signal | None
    tokens_N: Tensor | None
    weights: tuple[float, float] | WeightFunction
    weights_see: tuple[str, ...]
    chunk_tokens: int
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the per-token values that a sweep returns."""
        terms = {"divergence": self.request.divergence is not None, "nll": self.tokens_N is not None}
        terms |= dict.fromkeys(("weight_divergence", "weight_nll"), callable(self.weights))
        return ("loss", *(name for name, asked in terms.items() if asked), *self.request.stats)


class _Gradients:
    """Gradients of hidden states, weight and bias (None where not needed), filled chunk by chunk.

    The head's are summed in float32 at least, over all its rows: those of padding stay exactly zero.
    """

    def __init__(self, hidden_NH: Tensor, head: Head, needed: Sequence[bool]) -> None:
        self.head = head
        self.needs_weight = needed[1]
        self.hidden_NH = torch.zeros_like(hidden_NH) if needed[0] else None
        self.weight_VH: Tensor | None = None
        self.bias_V: Tensor | None = None
        if needed[2] and head.bias_V is not None:
            self.bias_V = torch.zeros_like(head.bias_V, dtype=at_least_float32(head.bias_V.dtype))

    def add(self, chunk: slice, product_grad_nV: Tensor, hidden_nH: Tensor, weight_VH: Tensor) -> None:
        """One chunk: the gradient of hidden_nH @ weight_VH.T goes on to its two factors."""
        if self.hidden_NH is not None:
            self.hidden_NH[chunk] = back(product_grad_nV, weight_VH)
        if self.needs_weight:
            first = self.weight_VH is None
            outer_into(self._weight_sum(), product_grad_nV, hidden_nH, add=not first)

    def _weight_sum(self) -> Tensor:
        """The real rows of the head's gradient. Not filled with zeros before: the first chunk writes them."""
        if self.weight_VH is None:
            dtype = at_least_float32(self.head.weight_VH.dtype)
            self.weight_VH = torch.empty_like(self.head.weight_VH, dtype=dtype)
            self.weight_VH[self.head.size :] = 0
        return self.weight_VH[: self.head.size]

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
        elif self.needs_weight:
            weight_VH = torch.zeros_like(self.head.weight_VH)  # no tokens, or no weight on any
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
        stats = [columns[name] for name in plan.request.stats]
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
        request = replace(ctx.plan.request, stats=())
        _sweep(replace(ctx.plan, request=request, weights=weights, weights_see=()), hidden_NH, head, again)
        return again.results()


def _sweep(plan: _Plan, hidden_NH: Tensor, head: Head, gradients: _Gradients | None = None) -> dict[str, Tensor]:
    """One pass over the chunks, with autograd off: the per-token values (N,) by name; `gradients` are filled."""
    tokens = hidden_NH.shape[0]
    columns = {name: hidden_NH.new_zeros(tokens, dtype=at_least_float32(plan.student_dtype)) for name in plan.columns}
    keep_pages()
    with torch.autocast(hidden_NH.device.type, enabled=False):
        head = replace(head, weight_VH=head.weight_VH[: head.rows].to(plan.student_dtype))
        signal = _cast_signal(plan)
        size = min(plan.chunk_tokens, tokens)
        student_buffer_nV = hidden_NH.new_empty(size, head.size, dtype=plan.student_dtype)
        teacher_buffer_nV = None
        if isinstance(signal, Hidden):
            teacher_buffer_nV = hidden_NH.new_empty(size, head.size, dtype=plan.teacher_dtype)
        for start in range(0, tokens, plan.chunk_tokens):
            chunk = slice(start, min(start + plan.chunk_tokens, tokens))
            hidden_nH = hidden_NH[chunk].to(plan.student_dtype)
            student_nV = linear_into(student_buffer_nV[: len(hidden_nH)], hidden_nH, head.weight_VH)
            teacher_nV = _teacher_chunk(signal, chunk, teacher_buffer_nV)
            if _work_chunk(plan, chunk, student_nV, teacher_nV, head, signal, gradients, columns):
                assert gradients is not None
                gradients.add(chunk, student_nV, hidden_nH, head.weight_VH)
    return columns


def _work_chunk(
    plan: _Plan,
    chunk: slice,
    student_nV: Tensor,
    teacher_nV: Tensor | None,
    head: Head,
    signal: Signal | None,
    gradients: _Gradients | None,
    columns: dict[str, Tensor],
) -> bool:
    """Fills the columns of one chunk, tile by tile, and puts the gradient by the product in the place of `student_nV`.
    Returns whether there is one."""
    learnt = False
    count = len(student_nV)
    size = tile_rows(head.size, count, student_nV.device)
    teacher_bias_V = signal.head.bias_V if isinstance(signal, Hidden) else None
    for begin in range(0, count, size):
        rows = slice(begin, min(begin + size, count))
        place = slice(chunk.start + rows.start, chunk.start + rows.stop)
        tile = Tile(
            student_nV[rows],
            head.bias_V,
            None if teacher_nV is None else teacher_nV[rows],
            teacher_bias_V,
            None if plan.tokens_N is None else plan.tokens_N[place],
            signal.tokens_NK[place] if isinstance(signal, Sparse) else None,
        )
        divergence_weight, nll_weight = _weights(plan, place, tile)
        if callable(plan.weights):
            columns["weight_divergence"][place], columns["weight_nll"][place] = divergence_weight, nll_weight
        asked = {"divergence": divergence_weight, "nll": nll_weight}
        weights = {name: _column(weight, columns["loss"][place]) for name, weight in asked.items() if name in columns}
        kept = weights if gradients is not None else {}
        tile = tile._replace(divergence_weight_n=kept.get("divergence"), nll_weight_n=kept.get("nll"))
        values, bias_grad_V = tile_terms(plan.request, tile)
        for name, value_n in values.items():
            columns[name][place] = value_n
        for name, weight_n in weights.items():
            if weight_n is not None:
                columns["loss"][place] += weight_n * values[name]
        learnt |= any(weight_n is not None for weight_n in kept.values())
        if gradients is not None and gradients.bias_V is not None and bias_grad_V is not None:
            gradients.bias_V[: head.size] += bias_grad_V
    return learnt


def _weights(plan: _Plan, place: slice, tile: Tile) -> tuple[Weight, Weight]:
    """(w_divergence, w_nll) of a tile's rows: as given, or what the function says."""
    if not callable(plan.weights):
        return plan.weights
    student_n = teacher_n = None
    if tile.tokens_n is not None:
        if "student" in plan.weights_see:
            student_n = tile_logprobs(plan.request.student, tile.student_nV, tile.student_bias_V, tile.tokens_n)
        full = tile.teacher_nV is not None and plan.request.teacher is not None and tile.top_tokens_nK is None
        if "teacher" in plan.weights_see and full:
            assert tile.teacher_nV is not None and plan.request.teacher is not None
            teacher_n = tile_logprobs(plan.request.teacher, tile.teacher_nV, tile.teacher_bias_V, tile.tokens_n)
    return plan.weights(place, student_n, teacher_n)


def _teacher_chunk(signal: Signal | None, chunk: slice, buffer_nV: Tensor | None) -> Tensor | None:
    """The teacher's products with its head, or its log-probabilities, for the tokens of a chunk."""
    if signal is None:
        return None
    if isinstance(signal, Sparse):
        return buckets_of(signal)[chunk]
    if isinstance(signal, Dense):
        return signal.logprobs_NV[chunk]
    weight_VH = signal.head.weight_VH[: signal.head.rows]
    hidden_nG = signal.hidden_NH[chunk].to(weight_VH.dtype)
    assert buffer_nV is not None
    return linear_into(buffer_nV[: len(hidden_nG)], hidden_nG, weight_VH)


def _cast_signal(plan: _Plan) -> Signal | None:
    """The signal with its head in the dtype of the product."""
    if not isinstance(plan.signal, Hidden):
        return plan.signal
    head = plan.signal.head
    return replace(plan.signal, head=replace(head, weight_VH=head.weight_VH.to(plan.teacher_dtype)))


def _chunk_tokens(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """`CHUNK_TOKENS` or `ONEDNN_TOKENS`; fewer where their logits would pass `BUFFER_BYTES`, more where the vocabulary
    is small."""
    most = max(16, BUFFER_BYTES // (dtype.itemsize * vocabulary))
    usual = ONEDNN_TOKENS if device.type == "cpu" and dtype == torch.float32 and onednn_wins() else CHUNK_TOKENS
    return min(most, max(usual, (1 << 20) // vocabulary))


def _column(weight: Weight, like_n: Tensor) -> Tensor | None:
    """A weight (n,) in the columns' dtype; None for a term that is left out."""
    return None if _is_zero(weight) else torch.as_tensor(weight).to(like_n).expand_as(like_n)


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


def _product_dtype(weight_VH: Tensor) -> torch.dtype:
    """Dtype of hidden @ weight.T: the weight's, or autocast's (which leaves float64 alone)."""
    device = weight_VH.device.type
    if weight_VH.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return weight_VH.dtype
    return torch.get_autocast_dtype(device)
