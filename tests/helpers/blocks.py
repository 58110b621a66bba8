"""Small residual blocks that are awkward to change: they refuse, freeze, or have names of their own."""

from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Closed(Block):
    """Takes no further parameters."""

    def register_parameter(self, name: str, param: Any) -> None:
        if "log_h" in name:
            self.asked = name
            raise RuntimeError("this module takes no further parameters")
        super().register_parameter(name, param)


class Fails(Block):
    """Fails to take a parameter log_h, before it has it or afterwards, as many times as its class says."""

    error: BaseException = RuntimeError("no further parameters")
    times = 0
    afterwards = False

    def register_parameter(self, name: str, param: Any) -> None:
        fails = "log_h" in name and Fails.times > 0
        if not fails or Fails.afterwards:
            super().register_parameter(name, param)
        if fails:
            Fails.times -= 1
            raise Fails.error


class Loop(nn.Module):
    """One addition that is a step of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Frozen(Block):
    """Its class cannot be assigned by its own `__setattr__`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise AttributeError("class is frozen")
        super().__setattr__(name, value)


class Named(Block):
    """Has attributes with names that a patched block gets."""

    def __init__(self, name: str) -> None:
        super().__init__()
        setattr(self, name, "the owner's")


class NamedByItsClass(Block):
    _euler_step = 1


class Weighted(nn.Module):
    """A block with a parameter of its own, to be parametrized."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.linear(x, self.weight)


class Dropped(Block):
    """A branch that is left out at random, by Python's numbers, NumPy's and torch's."""

    def forward(self, x: Tensor) -> Tensor:
        import random

        import numpy as np

        kept = random.random() + np.random.rand() + torch.rand(()).item()
        if kept < 1.5:
            x = torch.relu(x)
        return x + self.f(x)


def chain(*blocks: nn.Module) -> nn.Sequential:
    """These blocks, by default two; the same weights each time."""
    torch.manual_seed(0)
    model = nn.Sequential(*(blocks or (Block(), Block())))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
    return model
