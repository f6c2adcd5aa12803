"""A feature draft as something to train: through its own drafted steps, as it serves (EAGLE-3, arXiv 2503.01840).

The token at index i is the first drafted one where the target has read the tokens [0, i - 2] (column i - 2 of its
hidden states) and i - 1 is the newest token; it is the one after j drafted tokens where the target has read up to i - 2
- j, and these are the text's own.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.decoding.drafts.feature_files import FEATURE, feature_net
from limbeck.decoding.drafts.feature_net import FeatureNet
from limbeck.errors import ModelError
from limbeck.models import load_model, output_head, set_vocabulary, unwrap
from limbeck.online.learner import Batch
from limbeck.types import Head

FIRST_DRAFTED = 2
"""The index of the first token that such a draft may draft: before it stand one that the target has read, and one."""


class FeatureLearner:
    """`net` belongs to the learner from now on. Of `target` it has float32 copies of the embedding and the output head,
    which are not trained. `steps`: drafted tokens that it is trained through."""

    def __init__(self, net: FeatureNet, target: Any, *, steps: int = 3, ids_D: Tensor | None = None) -> None:
        base: Any = unwrap(target)
        embedding, head = copy.deepcopy((base.get_input_embeddings(), output_head(base)))  # tied weights stay one
        self.net = net.to("cpu", torch.float32).train().requires_grad_(True)
        self.embedding: nn.Module = embedding.to("cpu", torch.float32).requires_grad_(False)
        weight_VH, bias_V = (
            None if tensor is None else tensor.detach().to("cpu", torch.float32)
            for tensor in (head.weight_VH, head.bias_V)
        )
        self.head = replace(head, weight_VH=weight_VH, bias_V=bias_V)
        self.steps = steps
        self.ids_D = ids_D
        self.autocast: torch.dtype | None = None

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.net.named_parameters())

    def predict(self, batch: Batch) -> tuple[Tensor, Head]:
        hidden_NH, _ = self._drafted(batch, 1)
        return hidden_NH, self.head

    def lessons(self, batch: Batch) -> tuple[Tensor, Head, Tensor]:
        hidden_MH, place_M = self._drafted(batch, self.steps)
        return hidden_MH, self.head, place_M

    def _drafted(self, batch: Batch, steps: int) -> tuple[Tensor, Tensor]:
        """Hidden states (M, H) of `steps` drafted tokens, step by step, and the position that each predicts: all of
        them in the first step, later those with as many tokens before them. ModelError for a batch without the columns
        that the net reads, and for positions before `FIRST_DRAFTED`."""
        columns_BTF, width = batch.columns_BTF, self.net.fuse.in_features
        if columns_BTF is None or columns_BTF.shape[2] != width:
            found = "none" if columns_BTF is None else columns_BTF.shape[2]
            raise ModelError(
                f"feature draft: expected {width} numbers of the target's hidden states a column to train on, found "
                f"{found}: give its buffer taps=True, and what `Engine.tapped_by` gives of an observation"
            )
        if int(batch.index_N.min()) < FIRST_DRAFTED:
            raise ModelError(
                f"feature draft: expected positions from {FIRST_DRAFTED} on to train on, found "
                f"{int(batch.index_N.min())}, where it drafts nothing: give its buffer taps=True"
            )
        # The newest token is predicted from two columns before it, with the token between them.
        states = self.net.unroll(columns_BTF[:, :-2], self.embedding(batch.tokens_BT[:, 1:-1]), steps)
        hidden: list[Tensor] = []
        places: list[Tensor] = []
        for step, states_BTH in enumerate(states):
            column_N = batch.index_N - FIRST_DRAFTED - step
            place_M = (column_N >= 0).nonzero()[:, 0]
            hidden.append(states_BTH[batch.row_N[place_M], column_N[place_M]])
            places.append(place_M)
        return torch.cat(hidden), torch.cat(places)


def feature_learner(
    target: str | Path,
    *,
    draft: str | Path = FEATURE,
    seed: int = 0,
    steps: int = 3,
    vocabulary: int | None = None,
) -> FeatureLearner:
    """The learner of `feature_net(target, draft, seed=seed)`. `target`: a model's folder, which is read whole, once.
    `vocabulary`: rows of its head that are tokens, as the target that serves has them (None: as its config says).
    ModelError as from `load_model`, CheckpointError and PreflightError as from `feature_net`."""
    model = load_model(target)
    if vocabulary is not None:
        set_vocabulary(model, vocabulary)
    return FeatureLearner(feature_net(model, draft, seed=seed), model, steps=steps)
