"""A divergence at every token, and a policy gradient with the credit that rollouts bring (MiniLLM, GKD's reward)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from limbeck.errors import PreflightError
from limbeck.ops.chunked import Weight, linear_terms
from limbeck.ops.policy import surrogate, surrogate_weight
from limbeck.ops.tiles import at_least_float32
from limbeck.types import Context, Head, Signal, Sparse, Terms

GRADIENT_NORMS = "gradient_norms"
"""Among `stats`: the norms of both terms' gradients by the last hidden state, a token. Costs one more pass a term."""


def policy(
    student_hidden_NH: torch.Tensor,
    head: Head,
    signal: Signal | None,
    tokens_N: torch.Tensor,
    *,
    context: Context,
    name: str | Callable[..., torch.Tensor] = "reverse_kl",
    temperature: float = 1.0,
    divergence_weight: float = 1.0,
    policy_weight: float = 1.0,
    per_sequence: bool = False,
    clip: float | None = None,
    cross_entropy_weight: float = 0.0,
    stats: tuple[str, ...] = (),
    **params: Any,
) -> Terms:
    """loss_N = divergence_weight c_N D_N - policy_weight s surrogate(ratio_N, A_N) + cross_entropy_weight nll_N, nats.

    A_N is the column `advantage`, ratio_N = q(y) / exp(`behaviour_logprobs`) (1 without that column), c_N the column
    `divergence_weight` (1 without it). `per_sequence`: s = context.tokens / context.sequences, so that the trainer's
    division by tokens becomes one by sequences; else s = 1. Tokens whose rollout has no advantage get none.

    MiniLLM: Gu et al., ICLR 2024, arXiv 2306.08543, eqs. 6 to 9. GKD with a reward: Agarwal et al., ICLR 2024,
    arXiv 2306.13649, eq. 5. Raises PreflightError for a teacher that gives its top tokens alone: a policy gradient
    against it would reward what its tail hides.
    """
    if isinstance(signal, Sparse):
        raise PreflightError(
            "policy gradient: expected a teacher's full distribution, found its top tokens alone; "
            "use a local teacher, or method kd or gkd without a reward"
        )
    columns = {
        name: values_N.to(at_least_float32(student_hidden_NH.dtype)) for name, values_N in context.columns.items()
    }
    factor = policy_weight * (context.tokens / max(context.sequences, 1) if per_sequence else 1.0)
    credit_N = _column(columns.get("advantage"), tokens_N, 0.0)
    share_N = _column(columns.get("divergence_weight"), tokens_N, 1.0) * divergence_weight
    advantage_N, behaviour_N = factor * credit_N, columns.get("behaviour_logprobs")

    def ratios(place: slice, student_logprob_n: torch.Tensor | None) -> torch.Tensor:
        if behaviour_N is None or student_logprob_n is None:
            return torch.ones_like(advantage_N[place])
        return (student_logprob_n - behaviour_N[place]).exp()

    def weights(place: slice, student_logprob_n: torch.Tensor | None, _: torch.Tensor | None) -> tuple[Weight, Weight]:
        gain_n = surrogate_weight(ratios(place, student_logprob_n), advantage_N[place], clip)
        return share_N[place], gain_n + cross_entropy_weight

    options: dict[str, Any] = {"divergence": name, "temperature": temperature, "weights": weights, **params}
    options["weights_see"] = () if behaviour_N is None else ("student",)
    options["stats"] = tuple(stat for stat in stats if stat != GRADIENT_NORMS)
    terms = linear_terms(student_hidden_NH, head, signal, tokens_N, **options)
    assert terms.nll_N is not None
    nll_N = terms.nll_N.detach()
    ratio_N = ratios(slice(0, len(nll_N)), -nll_N)
    gain_N, weight_N = surrogate(ratio_N, advantage_N, clip), surrogate_weight(ratio_N, advantage_N, clip)
    more = {"policy_gradient": -gain_N, "advantage": credit_N}
    if clip is not None:
        more |= {"importance": ratio_N, "clipped": ((weight_N == 0) & (advantage_N != 0)).to(ratio_N.dtype)}
    if GRADIENT_NORMS in stats and terms.loss_N.requires_grad:
        more |= _gradient_norms(terms, student_hidden_NH, share_N, weight_N)
    # The value is the loss's; its gradient is already that of the weighted terms.
    loss_N = terms.loss_N - (weight_N * nll_N + gain_N)
    return Terms(loss_N, terms.divergence_N, terms.nll_N, {**terms.stats, **more})


def _column(values_N: torch.Tensor | None, tokens_N: torch.Tensor, default: float) -> torch.Tensor:
    """The column; `default` where a rollout has none, or none has."""
    return (
        torch.full(tokens_N.shape, default, device=tokens_N.device)
        if values_N is None
        else values_N.nan_to_num(default)
    )


def _gradient_norms(
    terms: Terms, hidden_NH: torch.Tensor, share_N: torch.Tensor, weight_N: torch.Tensor
) -> dict[str, torch.Tensor]:
    """(N,) each: the length of a token's gradient by its own hidden state, of the divergence and of the surrogate."""
    assert terms.nll_N is not None and terms.divergence_N is not None
    found: dict[str, torch.Tensor] = {}
    asked = {"divergence_gradient": (terms.divergence_N, share_N), "policy_gradient_norm": (terms.nll_N, weight_N)}
    for name, (values_N, weights_N) in asked.items():
        gradients = torch.autograd.grad(values_N, hidden_NH, grad_outputs=weights_N, retain_graph=True)
        found[name] = gradients[0].square().sum(-1).sqrt()
    return found
