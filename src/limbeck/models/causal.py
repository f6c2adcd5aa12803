"""Decoder-only models: hidden states, the output head, and the one shift by which a hidden state meets its token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck.errors import ModelError
from limbeck.ops.chunked import head_logits
from limbeck.types import Head

# Names under which families of transformers keep what they do to logits after the output matrix. A family with another
# name fails `check_head`, before training, and gets a line here.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The bare transformers model under DDP, FSDP, `torch.compile` and peft, in whatever order they were put on."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):  # peft
            inner = inner.get_base_model()
        elif hasattr(inner, "_orig_mod"):  # torch.compile
            inner = inner._orig_mod
        elif hasattr(inner, "module"):  # DDP, FSDP
            inner = inner.module
        else:
            raise ModelError(
                f"expected a transformers model, bare or wrapped by DDP, FSDP, torch.compile or peft; found "
                f"{type(inner).__name__}; load it with limbeck.models.load_model"
            )
    return inner


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 keeps a part of the model's parameters on each rank."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def vocabulary_rows(model: nn.Module) -> int | None:
    """How many rows of the output head are tokens (`config.limbeck_rows`), or None where it was not set."""
    return getattr(unwrap(model).config, "limbeck_rows", None)


def set_vocabulary(model: nn.Module, rows: int) -> None:
    """Declare that rows of the output head from `rows` on are padding. Kept in the config, so saved and loaded with it.

    Raises ModelError when the head has fewer rows.
    """
    inner = unwrap(model)
    size = _output_layer(inner).weight.shape[0]
    if not 0 < rows <= size:
        raise ModelError(f"expected 1 to {size} vocabulary rows (the size of the output head), found {rows}")
    inner.config.limbeck_rows = rows


def output_head(model: nn.Module) -> Head:
    """The output head of a model: matrix (V, H), bias, logit scale, soft-cap and `rows`. Live tensors, not copies.

    Raises ModelError for a model without an output matrix and for one whose output matrix carries a LoRA adapter.
    """
    inner = unwrap(model)
    layer = _output_layer(inner)
    config = inner.config.get_text_config()
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= _number(config, name, 1.0)
    for name in _DIVISORS:
        scale /= _number(config, name, 1.0)
    softcap = next((float(cap) for name in _SOFTCAPS if (cap := getattr(config, name, None)) is not None), None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap, vocabulary_rows(inner))


def context_length(model: nn.Module) -> int | None:
    """How many tokens the model reads at most; None where its config names no limit."""
    return getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)


def hidden_and_head(
    model: nn.Module, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor | None = None
) -> tuple[torch.Tensor, Head]:
    """Last hidden states (B, T, H), after the final norm, and the output head: logits = head_logits(hidden, head).

    The one place that runs a model for training or scoring. The forward goes through `model` as given (DDP, FSDP and
    peft included), with the output matrix applied to one position only, so that every parameter takes part and no
    (B, T, V) tensor is made. Only the last hidden state is kept, whether or not gradients are on.
    """
    output: Any = model(
        input_ids=input_ids_BT,
        attention_mask=attention_mask_BT,
        output_hidden_states=-1,
        # An index, not a count: the slice that a count takes makes torch copy the whole output matrix once a row.
        logits_to_keep=torch.zeros(1, dtype=torch.long, device=input_ids_BT.device),
        use_cache=False,
    )
    return output.hidden_states[-1], output_head(model)


def completion_hidden(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, Head]:
    """THE SHIFT: for every learnt token, row by row, the hidden state one place before it, which predicts it.

    `batch` holds `input_ids`, `attention_mask` and `learnt` (each (B, T), padded on the right; other keys are left
    alone). Returns hidden (N, H), tokens (N,) and the head. The first token of a row has nothing before it and is never
    returned.
    """
    input_ids_BT = batch["input_ids"]
    hidden_BTH, head = hidden_and_head(model, input_ids_BT, batch["attention_mask"])
    learnt_BS = batch["learnt"][:, 1:].bool()
    return hidden_BTH[:, :-1][learnt_BS], input_ids_BT[:, 1:][learnt_BS], head


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """One short forward: the head applied to the hidden states must give the model's own logits, else ModelError.

    Finds families that do something to their logits which `output_head` does not know.
    """
    inner = unwrap(model)
    training = inner.training
    inner.eval()
    try:
        rows = output_head(inner).size
        # Spread over the vocabulary, so that no special token alone decides.
        input_ids_BT = torch.arange(1, 9, device=inner.device)[None] * (rows // 9 or 1) % rows
        hidden_BTH, head = hidden_and_head(inner, input_ids_BT)
        found_NV = head_logits(hidden_BTH[0], head)
        expected_NV = inner(input_ids=input_ids_BT, use_cache=False).logits[0, :, : head.size].float()
    finally:
        inner.train(training)
    # Half precision rounds the model's own logits to 8 (bf16) or 11 bits.
    tolerance = 1e-4 if hidden_BTH.dtype == torch.float32 else 2e-2
    error = ((found_NV - expected_NV).abs().max() / expected_NV.abs().max().clamp_min(1e-6)).item()
    if not error <= tolerance:
        raise ModelError(
            f"{type(inner).__name__}: expected the output head on the last hidden states to give the model's logits, "
            f"found a relative difference of {error:.1e}; this family does something to its logits that "
            f"limbeck.models.causal does not know: add its name there, or use another model"
        )


def eos_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a completion, sorted: the tokenizer's EOS, those of the model's generation config (a chat
    model lists several), and the end of turn of the chat template."""
    inner = unwrap(model)
    found: list[Any] = [tokenizer.eos_token_id, end_of_turn(tokenizer)]
    listed = inner.generation_config.eos_token_id if inner.generation_config is not None else None
    found.extend(listed if isinstance(listed, list | tuple) else [listed])
    size = output_head(inner).size  # a configuration's default EOS may lie beyond a small vocabulary
    return tuple(sorted({token for token in found if token is not None and token < size}))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template ends the assistant's turn, or None (no template or none there)."""
    if not tokenizer.chat_template:
        return None
    marker = "limbeck"
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": marker}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # whatever the template raises
        raise ModelError(
            f"expected a chat template that renders a user's and an assistant's turn, found one that fails "
            f"({str(error).splitlines()[0]}); correct chat_template in the tokenizer's folder"
        ) from error
    tail = tokenizer(text[text.rfind(marker) + len(marker) :], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in tail if token in special), None)


def _output_layer(inner: PreTrainedModel) -> Any:
    layer = inner.get_output_embeddings()
    if layer is None or not hasattr(layer, "weight"):
        raise ModelError(
            f"expected a causal language model with an output matrix, found {type(inner).__name__} without one; "
            f"use a model that AutoModelForCausalLM loads"
        )
    if hasattr(layer, "base_layer") or hasattr(layer, "modules_to_save"):
        raise ModelError(
            "expected a plain output matrix, found one under a LoRA adapter; leave it (lm_head) out of target_modules "
            "and modules_to_save"
        )
    return layer


def _number(config: Any, name: str, default: float) -> float:
    value = getattr(config, name, None)
    return default if value is None else float(value)
