"""Steps that are seen and cannot be rewritten, so they are named and left alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.traps.base import DIM, Form, unsupported


@unsupported
class SelfIsBoundAnew(Form):
    """The name of the first argument is used for something else before the step."""

    def forward(self, x: Tensor) -> Tensor:
        branch, self = self.a, x
        return self + branch(self)


@unsupported
class ForwardIsALambda(Form):
    """The forward itself is no ``def``."""

    forward = lambda self, x: x + self.a(x)  # noqa: E731


@unsupported
class InAProperty(Form):
    """The addition is in a property's getter."""

    @property
    def state(self) -> Tensor:
        return self.x + self.a(self.x)

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        try:
            return self.state
        finally:
            del self.x


@unsupported
class InANestedFunctionThatHidesSelf(Form):
    """A nested function in which ``self`` is a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        branch = self.a

        def step(self: Tensor) -> Tensor:
            return self + branch(self)

        return step(x)


@unsupported
class SamePlaceForAStepAndForPositions(Form):
    """One addition, in a method, that serves a step and a position embedding: h belongs to one of its calls only."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(2, 5, DIM))

    def plus(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def forward(self, x: Tensor) -> Tensor:
        x = self.plus(x, self.position)
        return self.plus(x, self.a(x))


class ByHand(torch.autograd.Function):
    """A step with a backward of its own, which keeps no activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: nn.Module) -> Tensor:
        with torch.no_grad():
            return x + branch(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


@unsupported
class InAnAutogradFunction(Form):
    """The addition is in the forward of an autograd function, whose backward would not know of h."""

    def forward(self, x: Tensor) -> Tensor:
        return ByHand.apply(x, self.a)
