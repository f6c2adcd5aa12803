"""Linear layers that take the faster product: the same layers to everything else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from limbeck.models import fast_linears
from limbeck.models.linear import FastLinear, is_linear
from limbeck.ops import products


class Other(nn.Linear):
    """Does more than a product."""


def test_layers_change_and_parameters_do_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "onednn_wins", lambda: True)
    model: Any = nn.ModuleDict({"plain": nn.Linear(128, 256), "other": Other(128, 4), "norm": nn.LayerNorm(4)})
    parameters = dict(model.named_parameters())
    hidden = torch.randn(256, 128)
    expected = model["plain"](hidden)
    assert fast_linears(model) is model
    assert [type(module) for module in model.values()] == [FastLinear, Other, nn.LayerNorm]
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    found = model["plain"](hidden)
    assert torch.allclose(found, expected, atol=1e-5) and "_Linear" in type(found.grad_fn).__name__
    twin = copy.deepcopy(model)
    assert type(twin["plain"]) is FastLinear and twin["plain"].weight is not model["plain"].weight


def test_what_is_a_plain_product():
    assert is_linear(nn.Linear(2, 2)) and is_linear(fast_linears(nn.Linear(2, 2)))
    assert not is_linear(Other(2, 2)) and not is_linear(nn.Embedding(2, 2))
