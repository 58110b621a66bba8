"""Blocks whose class or forward was made in an unusual way: inherited, registered, decorated, in a factory."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.traps.base import DIM, Block, Expected, Form, T, Trap, each, linear, mlp, trap, two


@trap
class ZeroArgumentSuper(Trap):
    """The branch is ``super().forward``, found through the cell ``__class__``."""

    expected = (Expected("conv"),)
    shape = (2, DIM, 4, 4)

    class ResidualConv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.conv = self.ResidualConv(DIM, DIM, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * F.conv2d(x, self.conv.weight, self.conv.bias, padding=1)


class Inherited(Block):
    """A forward that is inherited as it is."""


class Extended(Block):
    """A forward that is reached by ``super().forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.b = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(super().forward(x))


class ExtendedAgain(Extended):
    """The class with the addition is two levels away; there is an addition at this level too."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + self.b(x)


@trap
class SuperForward(Trap):
    """Forwards that are inherited, reached by ``super()``, and both."""

    expected = (
        Expected("inherited", depth=4),
        Expected("extended", depth=4),
        Expected("again:0", depth=4),
        Expected("again:1", depth=4),
    )

    def __init__(self) -> None:
        super().__init__()
        self.inherited, self.extended, self.again = Inherited(), Extended(), ExtendedAgain()

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.extended(self.inherited(x)))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.inherited.reference(x, h[0])
        x = self.extended.b(self.extended.reference(x, h[1]))
        x = self.again.b(self.again.reference(x, h[2]))
        return x + h[3] * self.again.b(x)


@trap
class DiamondSuper(Trap):
    """``super()`` goes to the next class of the method resolution order, not to the base."""

    expected = (Expected("block:0", depth=2), Expected("block:1", depth=2))

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = mlp(), mlp(), mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.c(x)

    class Left(Base):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.a(x))

    class Right(Base):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.b(x))

    class Both(Left, Right):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Both()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = x + h[0] * self.block.a(x)
        return self.block.c(x + h[1] * self.block.b(x))


@trap
class ResidualSequential(Trap):
    """A container that adds around its own ``super().forward``."""

    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    expected = each("body.0", "body.1")

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(self.Residual(mlp(), nn.Tanh()), self.Residual(linear()))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, block in zip(h, self.body, strict=True):
            x = x + factor * nn.Sequential.forward(block, x)
        return x


class Registered(nn.Module):
    """A base that notes its subclasses, wants a keyword from them, and has a metaclass."""

    known: ClassVar[list[str]] = []

    def __init_subclass__(cls, *, key: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Registered.known.append(key)


class Meta(abc.ABCMeta):
    pass


class RegisteredBlock(Registered, Generic[T], metaclass=Meta, key="block"):
    def __init__(self) -> None:
        super().__init__()
        self.a = mlp()

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x)


class RegisteredChild(RegisteredBlock[int], key="child"):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@trap
class RegistryGenericAbstract(Trap):
    """A class with a registry of its subclasses, a metaclass, type parameters and abstract methods."""

    expected = (Expected("block"),)

    def __init__(self) -> None:
        super().__init__()
        self.block = RegisteredChild()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.block.a(x)


@trap
class Parametrized(Trap):
    """A block with a parametrization has a class of its own already."""

    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.scale = mlp(), nn.Parameter(torch.ones(DIM))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * self.a(x)

    expected = (Expected("block"),)

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Scaled()
        parametrize.register_parametrization(self.block, "scale", self.Half())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.block.scale * self.block.a(x)


def passes_on(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator as Hugging Face's layers have them."""

    @functools.wraps(function)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return wrapper


def divides_by(divisor: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator with an argument and without ``functools.wraps``."""

    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: nn.Module, *args: Any) -> Any:
            return function(self, *args) / divisor

        return wrapper

    return decorator


@trap
class Decorated(Form):
    """The function that adds is in a cell of its wrapper."""

    @passes_on
    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x)


def residual(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(module: Any, x: Tensor) -> Tensor:
        return x + function(module, x)

    return wrapper


@trap
class OneDecoratorOfTwoMethods(Trap):
    """The wrapper adds: one code for both methods, each of which is a step."""

    expected = two()

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp(), mlp()

    @residual
    def one(self, x: Tensor) -> Tensor:
        return self.a(x)  # type: ignore[no-any-return]

    @residual
    def other(self, x: Tensor) -> Tensor:
        return self.b(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = x + h[0] * self.a(x)
        return x + h[1] * self.b(x)


@trap
class DecoratedThrice(Form):
    """Three wrappers, one of torch's and one with an argument."""

    @passes_on
    @divides_by(4.0)
    @torch.enable_grad()
    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return (x + h[0] * self.a(x)) / 4.0


@trap
class DecoratedWithSuper(Trap):
    """A decorated forward that is reached by ``super()`` from a decorated forward."""

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = mlp()

        @passes_on
        def forward(self, x: Tensor) -> Tensor:
            return x + self.a(x)

    class Child(Base):
        @divides_by(2.0)
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    expected = (Expected("block"),)

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Child()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return (x + h[0] * self.block.a(x)) / 2.0


def make_class(divisor: float) -> type[nn.Module]:
    """Classes of one name and one code, whose closures differ."""

    class Closure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.a(x) / divisor

    return Closure


@trap
class Closures(Trap):
    """Two classes that share their code and differ in a closure only."""

    divisors = (2.0, 5.0)
    expected = each("blocks.0", "blocks.1")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(make_class(divisor)() for divisor in self.divisors))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, divisor, block in zip(h, self.divisors, self.blocks, strict=True):
            x = x + factor * block.a(x) / divisor
        return x


def make_forward(divisor: float) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x + self.a(x) / divisor

    return forward


@trap
class ForwardFromAFactory(Form):
    """A forward that was made elsewhere and put into the class."""

    forward = make_forward(2.0)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.a(x) / 2.0
