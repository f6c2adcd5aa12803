"""A causal model that reads sequences of different lengths side by side, by the fastest way that it allows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.decoding.cache import beyond_attention
from limbeck.decoding.lean import Lean, is_lean
from limbeck.decoding.modes import evaluating
from limbeck.decoding.packed import Linear, check_packing, installed, pack
from limbeck.decoding.ragged_cache import RaggedCache, causal_mask
from limbeck.errors import RolloutError
from limbeck.models import check_head, context_length, output_head, unwrap
from limbeck.ops.chunked import head_logits


class Reader:
    """A causal model of transformers over a `RaggedCache`.

    Raises RolloutError for a model whose states are more than keys and values, that takes no positions, or whose
    attention follows a pattern that no mask here knows.
    """

    def __init__(self, model: Any, weights: str = "own") -> None:
        self.model: Any = unwrap(model)
        config = self.model.config.get_text_config()
        name = type(self.model).__name__
        if (found := beyond_attention(self.model.config)) is not None:
            raise RolloutError(f"{name}: expected plain keys and values in every layer, found {found}: serve another")
        # Where the prefix of a class names nothing, `base_model` is the model itself.
        self.body: Any = self.model.base_model if self.model.base_model is not self.model else self.model.model
        accepted = inspect.signature(self.body.forward).parameters
        if "position_ids" not in accepted:
            raise RolloutError(f"{name}: expected a model that takes position_ids, found none: serve another")
        self.limit = context_length(self.model)
        self.kinds = _mask_kinds(config)
        # Other kernels than SDPA add the mask to the scores.
        self.added = config._attn_implementation != "sdpa"
        self.head = output_head(self.model)
        self.embedding: Any = self.model.get_input_embeddings()
        self.device: torch.device = self.embedding.weight.device
        self.weights = weights
        check_packing(weights, self.device)
        self.rows = RaggedCache(self.limit)
        self.lean: Lean | None = None
        self.packed: dict[nn.Module, Linear] = {}  # for the time of a pass: the model may be trained by others
        with evaluating(tuple(self.model.modules())):
            check_head(self.model)
            if is_lean(self.body):
                self.lean = self._lean_if_the_same()
        if self.lean is None or weights != "own":  # packed once: a large model has no room for it twice
            self.pack()()

    def read(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int], taps: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """(last hidden states (B, Q, H), those of the layers `taps` side by side (B, Q, F) or None).

        Slot `slots[b]` reads `tokens[b]`, the first of them at column `starts[b]`; Q is the longest. Behind the end of
        a shorter row stands nothing of meaning.
        """
        width = max(map(len, tokens))
        input_ids_BQ = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in tokens], device=self.device)
        self.rows.place(slots, starts, width)
        if self.lean is not None and self.rows.written and self.lean.pays(*input_ids_BQ.shape):
            return self.lean.read(input_ids_BQ, taps)
        return self._read_by_model(input_ids_BQ, starts, taps)

    def _read_by_model(
        self, input_ids_BQ: Tensor, starts: Sequence[int], taps: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        width = input_ids_BQ.shape[1]
        options: dict[str, Any] = {"output_hidden_states": list(taps)} if taps else {}
        with installed(self.packed):
            output = self.body(
                input_ids=input_ids_BQ,
                position_ids=self._positions(starts, width),
                attention_mask=self._mask(input_ids_BQ.shape[0]),
                past_key_values=self.rows.cache,
                use_cache=True,
                **options,
            )
        if not taps:
            return output.last_hidden_state, None
        count = len(output.hidden_states)
        return output.last_hidden_state, torch.cat([output.hidden_states[tap % count] for tap in taps], -1)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Raw logits (N, V), float32, without padding rows."""
        return head_logits(hidden_NH, self.head, self.head_product)

    @cached_property
    def head_product(self) -> Linear:
        """The head's product, in its own numbers however the others are kept: what is drawn depends on it most."""
        return Linear(self.head.weight_VH[: self.head.rows], None, "own")

    def pack(self, new: Mapping[Any, Tensor] | None = None) -> Callable[[], None]:
        """Prepares steps with packed weights: the model's, or by parameter those of `new` in their place. The function
        returned, called in between two reads, makes it so."""
        if self.lean is not None:
            lean = Lean(self.body, self.rows, self.weights, new)
            return lambda: setattr(self, "lean", lean)
        layers = pack(self.body, self.weights, new)
        return lambda: setattr(self, "packed", self.packed | layers)

    def _lean_if_the_same(self) -> Lean | None:
        """Tries both ways on three tokens after six others."""
        lean, tokens = Lean(self.body, self.rows, "own"), list(range(1, 10))
        size = self.embedding.weight.shape[0]
        self.read([0], [[token * (size // 10 or 1) % size for token in tokens[:6]]], [0])
        last_BQ = torch.tensor([tokens[6:]], device=self.device) % size
        self.rows.place([0], [6], 3)
        expected, _ = self._read_by_model(last_BQ, [6], ())
        found, _ = lean.read(last_BQ, ())
        self.rows.forget()
        # By the token, and by the sums: a few entries of a model are many times the others.
        error = ((found - expected).abs().sum(-1) / expected.abs().sum(-1).clamp_min(1e-6)).max()
        return lean if error <= (1e-4 if expected.dtype == torch.float32 else 5e-2) else None

    def _positions(self, starts: Sequence[int], width: int) -> Tensor:
        view = self.rows.view
        if view.positions_BQ is None:
            positions_BQ = torch.arange(view.column, view.end)[None]
            if len(starts) > 1:
                positions_BQ = positions_BQ.expand(len(starts), width)
        else:
            positions_BQ = view.positions_BQ
        if self.limit is not None and view.end > self.limit:  # padding alone stands there
            positions_BQ = positions_BQ.clamp(max=self.limit - 1)
        return positions_BQ.to(self.device)

    def _mask(self, rows: int) -> Any:
        """None where the model's own masks are right: all rows begin at one column."""
        positions_BQ = self.rows.view.positions_BQ
        if positions_BQ is None:
            return None
        masks = {kind: self._mask_of(kind, size, positions_BQ) for kind, size in self.kinds.items()}
        return masks if len(masks) > 1 or "" not in masks else masks[""]

    def _mask_of(self, kind: str, size: int | None, positions_BQ: Tensor) -> Tensor:
        columns_T = torch.arange(self.rows.view.end)
        seen_BQT = causal_mask(positions_BQ, columns_T)
        if size is not None:
            own_BQ1 = positions_BQ[..., None]
            near_BQT = columns_T // size == own_BQ1 // size if kind == _CHUNKED else columns_T > own_BQ1 - size
            seen_BQT &= near_BQT
        mask_B1QT = seen_BQT[:, None].to(self.device)
        if not self.added:
            return mask_B1QT
        dtype = self.embedding.weight.dtype
        zeros_B1QT = torch.zeros(mask_B1QT.shape, dtype=dtype, device=self.device)
        return zeros_B1QT.masked_fill(~mask_B1QT, torch.finfo(dtype).min)


def check_rotation(model: Any) -> None:
    """RolloutError for a model whose positions are turned by angles that depend on the longest text in a pass (RoPE
    `dynamic`, `longrope`): what it makes of a text would depend on what is read beside it, and in which pieces."""
    rotations = getattr(unwrap(model).config.get_text_config(), "rope_parameters", None) or {}
    for rotation in (rotations, *(each for each in rotations.values() if isinstance(each, dict))):
        found = rotation.get("rope_type") or ""
        if "dynamic" in found or found == "longrope":
            raise RolloutError(
                f"{type(unwrap(model)).__name__}: expected positions that a text alone decides, found RoPE {found}: "
                "serve another"
            )


_FULL, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def _mask_kinds(config: Any) -> dict[str, int | None]:
    """{layer type: window or chunk}; the type is "" for a model that takes one mask for all layers."""
    sizes = {
        _FULL: None,
        _SLIDING: getattr(config, "sliding_window", None),
        _CHUNKED: getattr(config, "attention_chunk_size", None),
    }
    types = getattr(config, "layer_types", None)
    if types is None:
        return {"": sizes[_SLIDING]}
    unknown = sorted(set(types) - set(sizes))
    if unknown:
        raise RolloutError(f"{config.model_type}: expected layers of {', '.join(sizes)}, found {unknown[0]}")
    return {kind: sizes[kind] for kind in sorted(set(types))}
