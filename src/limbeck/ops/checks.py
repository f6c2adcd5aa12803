"""What `linear_terms` refuses, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from limbeck.errors import PreflightError, RecipeError, did_you_mean
from limbeck.ops.divergences import DIVERGENCES
from limbeck.ops.sparse import SPARSE_STATS
from limbeck.ops.statistics import STATS
from limbeck.types import Dense, Head, Hidden, Signal, Sparse


def find_divergence(divergence: str | Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function of that name, or the function itself. Raises RecipeError for an unknown name."""
    if not isinstance(divergence, str):
        return divergence
    check_name("divergence", divergence, DIVERGENCES)
    return DIVERGENCES[divergence]


def check_name(kind: str, name: str, table: Mapping[str, object]) -> None:
    """Raises RecipeError, with the nearest name, unless `name` is in `table`."""
    if name in table:
        return
    hint = did_you_mean(name, table) or "; use one of these"
    raise RecipeError(f"expected a {kind} out of {', '.join(table)}; found {name!r}{hint}")


def check_request(
    signal: Signal | None,
    tokens_N: Tensor | None,
    divergence: object | None,
    weights: tuple[float, float] | None,
    stats: Sequence[str],
    params: Mapping[str, Any],
) -> None:
    """Raises RecipeError for terms and statistics that lack what they are computed from."""
    for name in stats:
        check_name("statistic", name, STATS)
    of_teacher = [name for name in stats if name != "entropy"]
    if signal is None and (divergence is not None or of_teacher):
        asked = "a divergence" if divergence is not None else f"statistics {', '.join(of_teacher)}"
        raise RecipeError(f"expected a teacher signal for {asked}, found None: give the teacher's Hidden or Dense")
    if isinstance(signal, Sparse):
        beyond = [name for name in stats if name not in SPARSE_STATS]
        if beyond:
            raise RecipeError(
                f"expected statistics that a teacher's top-k allows ({', '.join(SPARSE_STATS)}), found {beyond[0]}: "
                "leave it out, or give the whole distribution"
            )
    if divergence is None and params:
        raise RecipeError(f"expected a divergence to take {', '.join(params)}, found None: name one, or drop them")
    if divergence is None and tokens_N is None:
        raise RecipeError("expected a divergence or tokens_N, found neither: there is nothing to minimise")
    if weights is not None:
        for weight, term, missing in zip(weights, ("divergence", "tokens_N"), (divergence, tokens_N), strict=True):
            if weight != 0 and missing is None:
                raise RecipeError(f"expected {term} for its weight of {weight}, found None: give it, or weigh it 0")


def check_shapes(
    hidden_NH: Tensor,
    head: Head,
    signal: Signal | None,
    tokens_N: Tensor | None,
    temperature: float,
    chunk_tokens: int | None,
) -> None:
    """Raises PreflightError for vocabularies that differ in size, ValueError for other shapes and numbers."""
    if isinstance(signal, Sparse) and temperature != 1:
        raise RecipeError(
            f"expected a divergence temperature of 1 for a teacher's top-k + tail, found {temperature}: the tail's "
            "mass at another temperature is not known; use 1, or the whole distribution"
        )
    if signal is not None:
        values, size = _length_and_vocabulary(signal)
        if size is not None and size != head.size:
            raise PreflightError(
                f"expected one vocabulary, found {head.size} tokens in the student's head and {size} in the teacher's "
                "signal: set Head.rows of both to the tokens that they share (padding rows left out)"
            )
        if values.shape[0] != hidden_NH.shape[0]:
            raise ValueError(
                f"expected the teacher at the student's {hidden_NH.shape[0]} tokens, found {values.shape[0]}: "
                "keep the same positions of both"
            )
    if tokens_N is not None and tokens_N.shape != hidden_NH.shape[:1]:
        raise ValueError(
            f"expected tokens_N of shape {tuple(hidden_NH.shape[:1])}, found {tuple(tokens_N.shape)}: one a state"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"expected a divergence temperature above 0, found {temperature}: 1 leaves the models as are")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"expected chunk_tokens of at least 1, found {chunk_tokens}: None chooses it")


def _length_and_vocabulary(signal: Signal) -> tuple[Tensor, int | None]:
    """A tensor with a row for every token, and how many tokens the teacher scores (None: not known)."""
    if isinstance(signal, Hidden):
        return signal.hidden_NH, signal.head.size
    if isinstance(signal, Dense):
        return signal.logprobs_NV, signal.logprobs_NV.shape[1]
    return signal.logprobs_NK, None
