"""Every family of transformers writes what its own `generate` and its own full forward say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from limbeck.decoding import Sampling, generate

VOCABULARY = 61
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
WINDOWS: dict[str, Any] = {
    "head_dim": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "opt": (
        "opt",
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}
        | {"max_position_embeddings": 64},
    ),
    "llama": ("llama", LLAMA),
    "qwen2": ("qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 8}),
    "gemma2": ("gemma2", {**LLAMA, **WINDOWS}),
    "gemma3": ("gemma3_text", {**LLAMA, **WINDOWS}),
    "gemma": ("gemma", {**LLAMA, "head_dim": 8}),
    "olmo": ("olmo", LLAMA),
    "smollm3": ("smollm3", {**LLAMA, "num_hidden_layers": 4}),  # the last without rotation
    "phi": ("phi", {**LLAMA, "num_key_value_heads": 4}),
    "mistral": ("mistral", {**LLAMA, "sliding_window": 4}),
    "mixtral": ("mixtral", {**LLAMA, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # Positions from the mask alone, keys and values of different widths, attention in chunks, learnt sinks.
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "deepseek": (
        "deepseek_v3",
        {**LLAMA, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1}
        | {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 16}
        | {"q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6},
    ),
    "llama4": (
        "llama4_text",
        {**LLAMA, "head_dim": 8, "attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
    ),
    "gpt_oss": ("gpt_oss", {**LLAMA, **WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
# The longest is beyond every window; the shortest is one token.
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [3, 4], [30, 31, 32, 33, 34, 35, 36]]


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    """A random model, whose logits differ well from token to token."""
    kind, values = FAMILIES[family]
    special = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **{**special, **values, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config.eos_token_id = None
    return model.eval()


@torch.no_grad()
def full_logprobs(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Log-probabilities of a completion by one forward without cache, batch or padding."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].float()
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_family_writes_what_transformers_writes(family: str):
    model: Any = tiny(family)
    greedy = generate(model, PROMPTS, Sampling(12, temperature=0), batch_size=3)
    for prompt, completion in zip(PROMPTS, greedy, strict=True):
        inputs = torch.tensor([prompt])
        alone = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=12, do_sample=False)
        assert completion.tokens == alone[0, len(prompt) :].tolist()

    # Rows leave and join at all times, so that the batch's columns begin anywhere.
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    stops = tuple(range(0, VOCABULARY, 6))
    sampled = generate(model, prompts, Sampling(30, temperature=2, stop_tokens=stops), batch_size=4)
    assert len({token for completion in sampled for token in completion.tokens}) > 12
    assert len({len(completion.tokens) for completion in sampled}) > 4
    for prompt, completion in zip(prompts, sampled, strict=True):
        expected = full_logprobs(model, prompt, completion.tokens)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


def test_eager_attention_writes_the_same():
    prompts = PROMPTS * 2
    sdpa, eager = (tiny("mistral", attn_implementation=kind) for kind in ("sdpa", "eager"))
    assert eager.config._attn_implementation == "eager"
    assert generate(sdpa, prompts, Sampling(12), batch_size=4) != []
    for one, other in zip(
        generate(sdpa, prompts, Sampling(12), batch_size=4),
        generate(eager, prompts, Sampling(12), batch_size=4),
        strict=True,
    ):
        assert one.tokens == other.tokens
