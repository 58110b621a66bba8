"""Additions made elsewhere: in an object with a `__call__`, a partial, a dict, an attribute, behind a decorator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.traps.base import Expected, Form, Trap, each, linear, mlp, trap, two


class Processor:
    """As the attention processors of diffusers: one object may serve many modules, and divides after it added."""

    def __init__(self, divisor: float) -> None:
        self.divisor = divisor

    def __call__(self, block: nn.Module, x: Tensor, scale: float = 1.0) -> Tensor:
        residual = x
        x = block.f(x) * scale
        x = x + residual
        return x / self.divisor


@trap
class SharedProcessor(Trap):
    """One object adds for two modules, each with its own h."""

    class Block(nn.Module):
        def __init__(self, processor: Processor) -> None:
            super().__init__()
            self.f, self.processor = mlp(), processor

        def forward(self, x: Tensor) -> Tensor:
            return self.processor(self, x, scale=0.5)

    expected = each("blocks.0", "blocks.1")

    def __init__(self) -> None:
        super().__init__()
        processor = Processor(2.0)
        self.blocks = nn.ModuleList(self.Block(processor) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, block in zip(h, self.blocks, strict=True):
            x = (x + factor * (0.5 * block.f(x))) / 2
        return x


def add(x: Tensor, f: Tensor, *, activation: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    total = x + f
    return total if activation is None else activation(total)


def make_add(times: float) -> Callable[[Tensor, Tensor], Tensor]:
    def inner(x: Tensor, f: Tensor) -> Tensor:
        return x.add(f, alpha=times)

    return inner


class InAttribute(Form):
    """What adds is kept in an attribute of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion: Any = add

    def forward(self, x: Tensor) -> Tensor:
        return self.fusion(x, self.a(x))


@trap
class FunctionInAnAttribute(InAttribute):
    """A function."""


@trap
class PartialInAnAttribute(InAttribute):
    """A partial of a partial."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion = partial(partial(add, activation=torch.relu), activation=torch.tanh)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return torch.tanh(x + h[0] * self.a(x))


@trap
class ClosureInAnAttribute(InAttribute):
    """A function that another one made, whose variables it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion = make_add(0.5)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * 0.5 * self.a(x)


@trap
class BoundMethodInAnAttribute(Form):
    """The module keeps its own bound method, which its class's does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion = self.add

    def add(self, x: Tensor, f: Tensor) -> Tensor:
        return torch.add(x, f)

    def forward(self, x: Tensor) -> Tensor:
        return self.fusion(x, self.a(x))


class ResidualOps:
    """Functions of a class that is no module."""

    times: ClassVar[float] = 1.0

    @classmethod
    def add(cls, x: Tensor, f: Tensor) -> Tensor:
        return x + cls.times * f


@trap
class ClassMethod(Form):
    """A method of another class."""

    def forward(self, x: Tensor) -> Tensor:
        return ResidualOps.add(x, self.a(x))


OPERATIONS: dict[str, Callable[..., Tensor]] = {"sum": add, "half": make_add(0.5)}


@trap
class FunctionInADict(Form):
    """Two functions of one dict, each with a source of its own."""

    expected = (Expected("<root>:0", depth=2), Expected("<root>:1", depth=2))

    def forward(self, x: Tensor) -> Tensor:
        x = OPERATIONS["sum"](x, self.a(x))
        return OPERATIONS["half"](x, self.a(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = x + h[0] * self.a(x)
        return x + h[1] * 0.5 * self.a(x)


def doubled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return 2 * function(*args, **kwargs)

    return wrapper


@doubled
def add_decorated(x: Tensor, f: Tensor) -> Tensor:
    return x + f


@trap
class DecoratedFunction(Form):
    """Between the method and the addition stands a wrapper: two calls, the second of which no name leads to."""

    def forward(self, x: Tensor) -> Tensor:
        return add_decorated(x, self.a(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return 2 * (x + h[0] * self.a(x))


def kept_in_a_default(function: Callable[..., Any]) -> Callable[..., Any]:
    """As beartype writes its wrappers: the function is the default of a keyword."""

    def wrapper(*args: Any, __function: Any = function, **kwargs: Any) -> Any:
        return __function(*args, **kwargs)

    return functools.update_wrapper(wrapper, function)


@trap
class ForwardInADefault(Trap):
    """A forward behind such a wrapper, and a loop in it."""

    keyed = True
    expected = each("layers.0", "layers.1")

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear() for _ in range(2))

    @kept_in_a_default
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, layer in zip(h, self.layers, strict=True):
            x = x + factor * torch.tanh(layer(x))
        return x


@trap
class MethodsInADict(Trap):
    """The instance keeps its methods in a dictionary, and goes over them."""

    expected = two()

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()
        self.ways = {"first": self.first, "second": self.second}

    def first(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.a(x))

    def second(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(x)) + x

    def forward(self, x: Tensor) -> Tensor:
        for way in self.ways.values():
            x = way(x)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = x + h[0] * torch.tanh(self.a(x))
        return h[1] * torch.relu(self.b(x)) + x


def other_add(self: nn.Module, x: Tensor, f: Tensor) -> Tensor:
    return f + x


@trap
class MethodBoundByHand(Form):
    """A function bound to the instance hides the method of its class."""

    def __init__(self) -> None:
        super().__init__()
        self.add = MethodType(other_add, self)  # type: ignore[method-assign]

    def add(self, x: Tensor, f: Tensor) -> Tensor:
        return x - f

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.a(x))
