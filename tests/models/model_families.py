"""Tiny random models of many families of transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GEMMA: dict[str, Any] = {**_LLAMA, "head_dim": 8, "sliding_window": 4}
_WINDOWS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
_OPT: dict[str, Any] = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

# family: (model_type, configuration)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT2),
    "opt": ("opt", {**_OPT, "word_embed_proj_dim": 32}),
    "opt_projected": ("opt", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "llama": ("llama", _LLAMA),
    "qwen2": ("qwen2", {**_LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 8}),
    "gemma2": ("gemma2", {**_GEMMA, "final_logit_softcapping": 0.5, "layer_types": _WINDOWS}),
    "gemma3": ("gemma3_text", {**_GEMMA, "layer_types": _WINDOWS}),
    "phi": ("phi", {**_LLAMA, "num_key_value_heads": 4}),
    "mixtral": ("mixtral", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("cohere", {**_LLAMA, "logit_scale": 0.25}),
    "granite": ("granite", {**_LLAMA, "logits_scaling": 4.0, "embedding_multiplier": 2.0}),
    "gpt_neox": ("gpt_neox", {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}),
}


def tiny(family: str, vocab: int = 96, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model with weights large enough that its logits differ well from token to token, in eval mode."""
    kind, values = FAMILIES[family]
    config = AutoConfig.for_model(
        kind, **{"vocab_size": vocab, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **values, **changes}
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()
