"""Networks whose h follows from depth or from time."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import eulernet
from eulernet import schedules
from tests.traps.base import Block

DIM = 8

X = torch.linspace(-1, 1, 2 * DIM).view(2, DIM)


def net(depth: int = 4) -> nn.Sequential:
    return nn.Sequential(*(Block() for _ in range(depth)))


def patched(depth: int = 4, h: Any = 0.1) -> nn.Sequential:
    return eulernet.patch(net(depth), h, example_inputs=X)


def factors(model: nn.Module) -> list[float | None]:
    return [step.h for step in eulernet.steps(model)]


RULES: dict[Any, Callable[[int, int], float]] = {  # the rule -> its formula in D and l
    schedules.constant(0.3): lambda depth, position: 0.3,
    schedules.inverse_sqrt(): lambda depth, position: depth**-0.5,
    schedules.inverse_sqrt(2): lambda depth, position: 2 * depth**-0.5,
    schedules.inverse(): lambda depth, position: 1 / depth,
    schedules.inverse(c=0.5): lambda depth, position: 0.5 / depth,
    schedules.decreasing(): lambda depth, position: position**-0.5 / math.log1p(position),
}


class Repeated(nn.Module):
    """One block that is called three times, between two that are called once, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = Block(), Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self.middle(x)
        return self.last(x)


class Towers(nn.Module):
    """Two streams, of three and of two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = net(3), net(2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(y)
