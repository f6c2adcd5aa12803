"""Writing completions: `generate` is the rollout engine, `Sampling` says how tokens are drawn, `Mix` joins two
models into one writer."""

from limbeck.decoding.generate import generate
from limbeck.decoding.int8 import int8_weights
from limbeck.decoding.records import Completion, Mix, Prompt
from limbeck.decoding.sampler import Sampling

__all__ = ["Completion", "Mix", "Prompt", "Sampling", "generate", "int8_weights"]
