"""Maths on tensors. Imports torch and the shared records alone."""

from limbeck.ops.chunked import head_logits, linear_divergence, linear_terms
from limbeck.ops.divergences import DIVERGENCES

__all__ = ["DIVERGENCES", "head_logits", "linear_divergence", "linear_terms"]
