"""Steps that are seen and cannot be rewritten, so they are named and left alone."""

from __future__ import annotations

from torch import Tensor

from tests.traps.base import Form, unsupported


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
class AStateIsSubtractedFromTheBranch(Form):
    """Leapfrog with the branch first: no operand is what the sum is at h = 0."""

    def forward(self, x: Tensor) -> Tensor:
        before = 0.5 * x
        for _ in range(3):
            x, before = self.a(x) - before + 2 * x, x
        return x
