"""Linear layers that take the faster of the products this machine has (see `ops.products`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from limbeck.ops.products import linear


class FastLinear(nn.Linear):
    """`nn.Linear` by `ops.products.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def fast_linears(model: Any) -> Any:
    """The model, with every `nn.Linear` in it a `FastLinear` on the same parameters; subclasses stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear
    return model


def is_linear(module: Any) -> bool:
    """Whether a module computes the plain product with its weight and nothing else: subclasses may do more."""
    return type(module) in (nn.Linear, FastLinear)
