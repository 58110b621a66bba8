"""Residual networks to fold h into, and what each must still compute."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

SHAPE = (3, 4, 8, 8)

X = torch.linspace(-2, 2, 3 * 4 * 8 * 8, dtype=torch.float64).sin().view(SHAPE) * 1.7


class Branch(nn.Module):
    """Layers, parameters and buffers by name, and a function of them and x."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], /, **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Residual(nn.Module):
    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def conv(**kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, **kwargs)


def linear(**kwargs: Any) -> nn.Linear:
    return nn.Linear(8, 8, **kwargs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def residual(branch: nn.Module, seed: int = 0) -> Residual:
    """A block with random parameters in float64."""
    torch.manual_seed(seed)
    model = Residual(branch).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def in_both_modes(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """The outputs of a copy in eval and in train mode, under one seed, and the buffers afterwards."""
    model = copy.deepcopy(model)
    outputs = []
    for training in (False, True):
        torch.manual_seed(1)
        with torch.no_grad():
            outputs += tree_leaves(model.train(training)(*(x.clone() for x in inputs)))
    return outputs + list(model.buffers())


def assert_equal_to_rounding(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def scaled(s: Any, x: Tensor) -> Tensor:
    return F.dropout(s.gamma * s.c(x), 0.5, s.training)


def gated(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    return y * s.g(y).sigmoid()
