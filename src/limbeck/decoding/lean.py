"""The forward of llama-like models (Llama, Mistral, Qwen2, Qwen3, SmolLM2) for a few tokens, without what a general
implementation costs: at one token a step that is as much as reading the weights of a small model.

Reads and writes the same cache as the model's own forward, so that prompts can go one way and steps the other. Products
that share their input are one product where the weights are packed; keys and values are attended to without being
repeated for each query head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.decoding.packed import FEW_ROWS, packed
from limbeck.decoding.ragged_cache import RaggedCache
from limbeck.models.linear import is_linear

Product = Callable[[Tensor], Tensor]

LEAN_ROWS = {**FEW_ROWS, "own": 128}
"""Tokens of a pass up to which `Lean` is used on a CPU, by how the weights are kept: with more the model's own forward
costs no more. Milliseconds of a 0.5 B model's 24 layers in bf16 over 290 tokens, two threads, rows x tokens:
1 x 64 79, own forward 98; 1 x 256 300, 320; 6 x 6 58, 80; 16 x 6 129, 172; 32 x 2 119, 185; but 64 x 1 141, 117."""

_SINGLE_ROWS = 32
"""Rows that it attends to one after the other when each reads one token; so many tokens in all on other devices."""

_MODULES = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_HEAD_NORMS = ("q_norm", "k_norm")
_STATIC_ROTATIONS = ("default", "linear", "llama3", "yarn")


def is_lean(body: Any) -> bool:
    """Whether `Lean` knows every part of a model's body. That it gives the same is tried besides, by `Reader`."""
    config = getattr(body, "config", None)
    if not all(hasattr(body, name) for name in ("layers", "norm", "rotary_emb", "embed_tokens")):
        return False
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    types = getattr(config, "layer_types", None) or ["full_attention"]
    windowed = getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None) is not None
    if rotation not in _STATIC_ROTATIONS or windowed or set(types) != {"full_attention"}:
        return False
    return _is_lean_norm(body.norm) and all(_is_lean_layer(layer) for layer in body.layers)


def _is_lean_layer(layer: Any) -> bool:
    if {name for name, _ in layer.named_children()} != set(_MODULES):
        return False
    attention, mlp = dict(layer.self_attn.named_children()), dict(layer.mlp.named_children())
    head_norms = [attention.pop(name) for name in _HEAD_NORMS if name in attention]
    linears = [*attention.values(), *(mlp.get(name) for name in ("gate_proj", "up_proj", "down_proj"))]
    return (
        set(attention) == {"q_proj", "k_proj", "v_proj", "o_proj"}
        and set(mlp) == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and all(is_linear(linear) for linear in linears)
        and all(map(_is_lean_norm, [layer.input_layernorm, layer.post_attention_layernorm, *head_norms]))
        and bool(getattr(layer.self_attn, "use_rope", True))  # SmolLM3 turns nothing in every fourth layer
    )


def _is_lean_norm(norm: Any) -> bool:
    """Gemma's norm adds one to its weight and has no `variance_epsilon`, that of OLMo 1 has no weight."""
    return hasattr(norm, "weight") and hasattr(norm, "variance_epsilon")


class _Layer:
    """One decoder layer: its products, norms and shapes."""

    def __init__(self, layer: Any, weights: str, new: Callable[[Any], Any]) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.module = layer
        self.qkv = _joined([attention.q_proj, attention.k_proj, attention.v_proj], weights, new)
        self.out = _joined([attention.o_proj], weights, new)
        self.gate_up = _joined([mlp.gate_proj, mlp.up_proj], weights, new)
        self.down = _joined([mlp.down_proj], weights, new)
        self.activation = mlp.act_fn
        self.norms = [layer.input_layernorm, layer.post_attention_layernorm]
        self.head_norms = [getattr(attention, name, None) for name in _HEAD_NORMS]
        self.width = attention.head_dim
        self.scale = attention.scaling


def _joined(layers: list[Any], weights: str, new: Callable[[Any], Any]) -> Product:
    """One product for linear layers with the same input, their outputs side by side."""
    weight = torch.cat([new(layer.weight).detach() for layer in layers])
    biases = [weight.new_zeros(layer.out_features) if layer.bias is None else new(layer.bias) for layer in layers]
    some = any(layer.bias is not None for layer in layers)
    product = packed(weight, torch.cat([bias.detach() for bias in biases]) if some else None, weights)
    if product is not None:
        return product
    if len(layers) == 1:
        return layers[0]
    return lambda hidden: torch.cat([layer(hidden) for layer in layers], -1)


class Lean:
    """The body of a model, from token ids to the last hidden states, for rows that each read `Q` tokens.

    weights: see `decoding.packed`. new: weights (of the model, by parameter) that take the place of its own.
    """

    def __init__(self, body: Any, cache: RaggedCache, weights: str, new: Mapping[Any, Tensor] | None = None) -> None:
        self.body = body
        self.cache = cache
        self.most = LEAN_ROWS[weights] if body.embed_tokens.weight.device.type == "cpu" else _SINGLE_ROWS
        replaced = new or {}
        self.layers = [_Layer(layer, weights, lambda own: replaced.get(own, own)) for layer in body.layers]
        self.heads = body.config.num_attention_heads, body.config.num_key_value_heads
        self.cos_TD = self.sin_TD = torch.zeros(0)

    def pays(self, rows: int, width: int) -> bool:
        """Whether it reads so many rows of so many tokens faster than the model's own forward."""
        return rows * width <= self.most and (width > 1 or rows <= _SINGLE_ROWS)

    def read(self, input_ids_BQ: Tensor, taps: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """As `Reader.read`, after `RaggedCache.place`."""
        rows, width = input_ids_BQ.shape
        view = self.cache.view
        picked = list(range(view.rows.start, view.rows.stop)) if view.picked_B is None else view.picked_B.tolist()
        starts = [view.column] * rows if view.positions_BQ is None else view.positions_BQ[:, 0].tolist()
        hidden_NH = self.body.embed_tokens(input_ids_BQ.reshape(-1))
        self._rotations(view.end, hidden_NH)
        spans = [slice(start, start + width) for start in starts]
        cos_N1D = torch.cat([self.cos_TD[span] for span in spans])[:, None]
        sin_N1D = torch.cat([self.sin_TD[span] for span in spans])[:, None]
        masks = [self._mask(start, width) for start in starts]
        kept: dict[int, Tensor] = {}
        wanted = {tap % (len(self.layers) + 1) for tap in taps}
        for index, layer in enumerate(self.layers):
            if index in wanted:
                kept[index] = hidden_NH
            keys, values = self._buffers(index)
            qkv_NAD = self._qkv(layer, hidden_NH, cos_N1D, sin_N1D)
            attended = [
                self._attend(layer, qkv_NAD[row * width : (row + 1) * width], keys[slot], values[slot], span, mask)
                for row, (slot, span, mask) in enumerate(zip(picked, spans, masks, strict=True))
            ]
            hidden_NH = hidden_NH + layer.out(attended[0] if rows == 1 else torch.cat(attended))
            gates_NF, ups_NF = layer.gate_up(_norm(layer.norms[1], hidden_NH)).chunk(2, -1)
            hidden_NH = hidden_NH + layer.down(layer.activation(gates_NF).mul_(ups_NF))
        hidden_NH = _norm(self.body.norm, hidden_NH)
        kept[len(self.layers)] = hidden_NH
        hidden_BQH = hidden_NH.unflatten(0, (rows, width))
        if not taps:
            return hidden_BQH, None
        tapped_NF = torch.cat([kept[tap % (len(self.layers) + 1)] for tap in taps], -1)
        return hidden_BQH, tapped_NF.unflatten(0, (rows, width))

    def _qkv(self, layer: _Layer, hidden_NH: Tensor, cos_N1D: Tensor, sin_N1D: Tensor) -> Tensor:
        """Queries, keys and values (N, heads, D), the first two rotated to their positions."""
        queries, keys = self.heads
        qkv_NAD = layer.qkv(_norm(layer.norms[0], hidden_NH)).unflatten(-1, (-1, layer.width))
        turned_NAD = qkv_NAD[:, : queries + keys]
        if layer.head_norms[0] is not None:
            parts = (turned_NAD[:, :queries], turned_NAD[:, queries:])
            turned_NAD = torch.cat([_norm(norm, part) for norm, part in zip(layer.head_norms, parts, strict=True)], 1)
        # rotate_half(x) is x rolled by half its width, the first half negated: the sign is in the sines.
        rolled_NAD = turned_NAD.roll(layer.width // 2, -1)
        turned_NAD = torch.addcmul(turned_NAD * cos_N1D, rolled_NAD, sin_N1D)
        return torch.cat((turned_NAD, qkv_NAD[:, queries + keys :]), 1)

    def _attend(
        self, layer: _Layer, qkv_QAD: Tensor, keys: Tensor, values: Tensor, span: slice, mask: Tensor | None
    ) -> Tensor:
        """(Q, heads * D). Writes this row's keys and values; the query heads of a key head are more queries to it."""
        queries, heads = self.heads
        width = qkv_QAD.shape[0]
        keys[:, span] = qkv_QAD[:, queries : queries + heads].transpose(0, 1)
        values[:, span] = qkv_QAD[:, queries + heads :].transpose(0, 1)
        # (key heads, Q * query heads of each, D), a query's heads side by side
        asked = qkv_QAD[:, :queries].unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)
        found = F.scaled_dot_product_attention(
            asked[None], keys[None, :, : span.stop], values[None, :, : span.stop], attn_mask=mask, scale=layer.scale
        )[0]
        return found.unflatten(1, (width, -1)).transpose(0, 1).flatten(1)

    def _mask(self, start: int, width: int) -> Tensor | None:
        """(Q * query heads of a key head, T): a query sees the columns up to its own."""
        if width == 1:
            return None
        own_Q1 = torch.arange(start, start + width)[:, None]
        seen_QT = torch.arange(start + width) <= own_Q1
        return seen_QT.repeat_interleave(self.heads[0] // self.heads[1], 0).to(self.body.embed_tokens.weight.device)

    def _buffers(self, index: int) -> tuple[Tensor, Tensor]:
        layer: Any = self.cache.cache.layers[index]
        return layer.keys, layer.values

    def _rotations(self, end: int, like: Tensor) -> None:
        """Cosines and signed sines of the positions up to `end` at least."""
        if end <= self.cos_TD.shape[0]:
            return
        positions_1T = torch.arange(2 * end, device=like.device)[None]
        cos_1TD, sin_1TD = self.body.rotary_emb(like, positions_1T)
        half = sin_1TD.shape[-1] // 2
        self.cos_TD = cos_1TD[0]
        self.sin_TD = torch.cat((-sin_1TD[0, :, :half], sin_1TD[0, :, half:]), -1)


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    """The root mean square norm of llama-like models."""
    return F.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)
