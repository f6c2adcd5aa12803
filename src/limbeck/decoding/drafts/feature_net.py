"""One decoder layer on the target's hidden states (EAGLE, Li et al., ICML 2024, arXiv 2401.15077; three layers of the
target and training through its own steps: EAGLE-3, arXiv 2503.01840).

At column t it reads what the target made of the tokens [0, t] and the token at t + 1, and its output predicts the token
at t + 2 through the target's own output head. Drafting further, its own output takes the place of the target's states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.models import unwrap


@dataclass(frozen=True)
class FeatureShape:
    """`taps`: which of the target's `hidden_states` are read, `width` numbers each."""

    taps: tuple[int, ...]
    width: int
    inner: int
    heads: int
    key_heads: int
    head_width: int
    theta: float = 10_000.0
    epsilon: float = 1e-6


def feature_shape(target: Any, taps: Sequence[int] | None = None, inner: int | None = None) -> FeatureShape:
    """As wide as the target's own layers; taps: one near its first layer, one in the middle, one near its last."""
    config = unwrap(target).config.get_text_config()
    layers, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    if taps is None:
        taps = sorted({min(2, layers), (layers + 1) // 2, max(layers - 2, 1)})
    rotation = getattr(config, "rope_parameters", None) or {}
    return FeatureShape(
        tuple(taps),
        width,
        inner or getattr(config, "intermediate_size", None) or 4 * width,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or width // heads,
        rotation.get("rope_theta") or 10_000.0,
    )


class FeatureNet(nn.Module):
    """The layer. Its embedding and output head are the target's, given where they are needed and not trained."""

    def __init__(self, shape: FeatureShape) -> None:
        super().__init__()
        self.shape = shape
        width, inner = shape.width, shape.inner
        queries, keys = shape.heads * shape.head_width, shape.key_heads * shape.head_width
        self.fuse = nn.Linear(len(shape.taps) * width, width, bias=False)
        self.token_norm = nn.RMSNorm(width, shape.epsilon)
        self.state_norm = nn.RMSNorm(width, shape.epsilon)
        self.q = nn.Linear(2 * width, queries, bias=False)
        self.k = nn.Linear(2 * width, keys, bias=False)
        self.v = nn.Linear(2 * width, keys, bias=False)
        self.o = nn.Linear(queries, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, shape.epsilon)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.norm = nn.RMSNorm(width, shape.epsilon)

    def attention_inputs(
        self, states_BQH: Tensor, embedded_BQH: Tensor, positions_BQ: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, Q, D), the first two rotated to their positions."""
        both_BQI = torch.cat((self.token_norm(embedded_BQH), self.state_norm(states_BQH)), -1)
        width = self.shape.head_width
        queries, keys, values = (
            product(both_BQI).unflatten(-1, (-1, width)).transpose(1, 2) for product in (self.q, self.k, self.v)
        )
        return self._rotate(queries, positions_BQ), self._rotate(keys, positions_BQ), values

    def output(self, states_BQH: Tensor, attended_BAQD: Tensor) -> Tensor:
        """The layer's output (B, Q, H), which is the next step's state."""
        states_BQH = states_BQH + self.o(attended_BAQD.transpose(1, 2).flatten(2))
        inner_BQH = self.mlp_norm(states_BQH)
        return states_BQH + self.down(F.silu(self.gate(inner_BQH)) * self.up(inner_BQH))

    def unroll(self, features_BTF: Tensor, embedded_BTH: Tensor, steps: int) -> list[Tensor]:
        """What training sees: hidden states, ready for the target's head, of `steps` drafted tokens from each column.

        features_BTF: the target's at the columns 0, ..., T - 1; embedded_BTH: the tokens at 1, ..., T. Item j is
        (B, T - j, H): its column t predicts the token at t + 2 + j, from the target's states at [0, t] and from its own
        steps after that, with the text's own tokens. A serving draft computes just that when the first j tokens that it
        drafts after t + 1 are the text's.
        """
        columns_1T = torch.arange(features_BTF.shape[1], device=features_BTF.device)[None]
        states = self.fuse(features_BTF)
        queries, keys, values = self.attention_inputs(states, embedded_BTH, columns_1T)
        repeats = self.shape.heads // self.shape.key_heads
        keys_BATD, values_BATD = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        later_TT = torch.ones(columns_1T.shape[1], columns_1T.shape[1], device=keys.device).triu(1).bool()
        own: list[tuple[Tensor, Tensor]] = []
        found: list[Tensor] = []
        for step in range(steps):
            count = columns_1T.shape[1] - step
            if count < 1:
                break
            if step:
                states = states[:, :count]
                queries, key, value = self.attention_inputs(
                    states, embedded_BTH[:, step:], columns_1T[:, :count] + step
                )
                own.append((key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)))
            scores = queries @ keys_BATD[:, :, :count].transpose(2, 3)
            scores = scores.masked_fill(later_TT[:count, :count], -torch.inf)
            chain = [(queries * key[:, :, :count]).sum(-1, keepdim=True) for key, _ in own]
            weights = (torch.cat((scores, *chain), -1) * self.shape.head_width**-0.5).softmax(-1)
            attended = weights[..., :count] @ values_BATD[:, :, :count]
            for place, (_, value) in enumerate(own):
                attended = attended + weights[..., count + place, None] * value[:, :, :count]
            states = self.output(states, attended)
            found.append(self.norm(states))
        return found

    def _rotate(self, heads_BAQD: Tensor, positions_BQ: Tensor) -> Tensor:
        half = self.shape.head_width // 2
        powers = torch.arange(half, device=heads_BAQD.device, dtype=torch.float32) / half
        angles_B1QD = (positions_BQ[:, None, :, None].float() * self.shape.theta**-powers).repeat(1, 1, 1, 2)
        first, second = heads_BAQD[..., :half], heads_BAQD[..., half:]
        turned = torch.cat((-second, first), -1)
        cos, sin = angles_B1QD.cos().to(heads_BAQD.dtype), angles_B1QD.sin().to(heads_BAQD.dtype)
        return heads_BAQD * cos + turned * sin
