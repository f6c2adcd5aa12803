"""Writing completions: `generate` is the rollout engine, `Sampling` says how tokens are drawn."""

from limbeck.decoding.generate import Completion, Prompt, generate
from limbeck.decoding.sampler import Sampling

__all__ = ["Completion", "Prompt", "Sampling", "generate"]
