"""Models: load them, build students, run them for hidden states and output heads, check that two fit each other."""

from limbeck.models.adapters import adapters_off, one_copy, save_student
from limbeck.models.causal import (
    check_head,
    completion_hidden,
    context_length,
    end_of_turn,
    eos_tokens,
    hidden_and_head,
    is_sharded,
    output_head,
    set_vocabulary,
    unwrap,
    vocabulary_rows,
)
from limbeck.models.layers import cut_layers
from limbeck.models.linear import fast_linears
from limbeck.models.load import cast, load_model, load_tokenizer
from limbeck.models.preflight import preflight
from limbeck.models.probe import autocast_to, fingerprint, model_size, probe_autocast
from limbeck.models.student import build_student
from limbeck.models.teaching import ADAPTERS, teacher_hidden

__all__ = [
    "ADAPTERS",
    "adapters_off",
    "autocast_to",
    "build_student",
    "cast",
    "check_head",
    "completion_hidden",
    "context_length",
    "cut_layers",
    "end_of_turn",
    "eos_tokens",
    "fast_linears",
    "fingerprint",
    "hidden_and_head",
    "is_sharded",
    "load_model",
    "load_tokenizer",
    "model_size",
    "one_copy",
    "output_head",
    "preflight",
    "probe_autocast",
    "save_student",
    "set_vocabulary",
    "teacher_hidden",
    "unwrap",
    "vocabulary_rows",
]
