"""Small residual networks with one trap each, for test_traps.py.

They live here and not in the test file because pytest rewrites the asserts of a test file, so that the source of a
function there is no longer what runs. Each trap says what is to be found in it (``expected``, in the order in which the
steps run) and holds its own reference: the same forward written by hand with a step factor for each expected step.
"""

from __future__ import annotations

import abc
import functools
import itertools
import operator
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

DIM = 8  # oneDNN of torch 2.15 writes past its memory in a channels_last backward with fewer than 8 channels
T = TypeVar("T")


class Expected(NamedTuple):
    """What is to be known of one step."""

    name: str = "<root>"
    kind: str = "identity"
    calls: int = 1
    depth: int = 1
    places: int = 1


ONE = (Expected(),)
PROJECTION = (Expected(kind="projection"),)


def two(name: str = "<root>", depth: int = 2) -> tuple[Expected, Expected]:
    """Two identity steps of one module, in one stream."""
    return Expected(f"{name}:0", depth=depth), Expected(f"{name}:1", depth=depth)


def each(*names: str, depth: int | None = None) -> tuple[Expected, ...]:
    """One identity step in each of the modules, in one stream."""
    return tuple(Expected(name, depth=len(names) if depth is None else depth) for name in names)


class Trap(nn.Module):
    """A model, what is to be found in it, and the same model written with step factors."""

    expected: ClassVar[tuple[Expected, ...]] = ONE
    long: ClassVar[tuple[str, ...]] = ()
    shape: ClassVar[tuple[int, ...]] = (2, 5, DIM)
    fused_inference: ClassVar[bool] = False  # without grad the original runs a fused kernel, equal up to rounding only
    autocast: ClassVar[bool] = True  # the original runs under autocast

    def inputs(self) -> tuple[Any, ...]:
        """The positional arguments of ``forward``."""
        return (torch.randn(self.shape),)

    def reference(self, *inputs: Any, h: Sequence[float]) -> Any:
        """``forward`` with the factor ``h[i]`` at the expected step ``i``."""
        raise NotImplementedError


TRAPS: list[type[Trap]] = []


def trap(cls: type[Trap]) -> type[Trap]:
    """Puts a class on the list (``__subclasses__`` would hold the subclasses made by patching as well)."""
    TRAPS.append(cls)
    return cls


UNSUPPORTED: list[type[Trap]] = []


def unsupported(cls: type[Trap]) -> type[Trap]:
    """Puts a class on the other list: its step is seen and cannot be rewritten, so it is named and left alone."""
    UNSUPPORTED.append(cls)
    return cls


def linear() -> nn.Linear:
    return nn.Linear(DIM, DIM)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))


def conv(size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(DIM, DIM, size, stride, size // 2, groups=groups, bias=False)


def body(stride: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(stride=stride), nn.BatchNorm2d(DIM), nn.ReLU(), conv(), nn.BatchNorm2d(DIM))


class Block(nn.Module):
    """The plain block of which larger traps are made: pre-norm, one linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.a = linear()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(self.norm(x))

    def reference(self, x: Tensor, h: float) -> Tensor:
        return x + h * self.a(self.norm(x))


# --------------------------------------------------------------------------------------------- forms of the addition


class Form(Trap):
    """One step, written in one of the forms that an addition can take."""

    def __init__(self) -> None:
        super().__init__()
        self.a = mlp()

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.a(x)


@trap
class Plus(Form):
    """The plain form."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x)


@trap
class BranchFirst(Form):
    """The branch is the left operand."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + x


@trap
class Minus(Form):
    """A step against the branch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - self.a(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x - h[0] * self.a(x)


@trap
class InPlaceMinus(Minus):
    """A step against the branch, in place."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y -= self.a(x)
        return y


@trap
class TorchAdd(Form):
    """``torch.add``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.a(x))


@trap
class TorchAddByKeyword(Form):
    """``torch.add`` with keywords, the branch first."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(other=x, input=self.a(x))


@trap
class TorchAddAlpha(Form):
    """A branch that has a factor already."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.a(x), alpha=0.5)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * (0.5 * self.a(x))


@trap
class TorchAddAlphaOnTheSkip(Form):
    """The factor that is there already belongs to the skip: h must not multiply it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.a(x), x, alpha=0.5)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return 0.5 * x + h[0] * self.a(x)


@trap
class TorchSubAlpha(Form):
    """``torch.sub`` with a factor."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sub(x, self.a(x), alpha=0.5)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x - h[0] * (0.5 * self.a(x))


@trap
class MethodAdd(Form):
    """``Tensor.add``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add(self.a(x))


@trap
class MethodAddAlpha(Form):
    """``Tensor.add`` with a factor."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add(self.a(x), alpha=2)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * (2 * self.a(x))


@trap
class MethodAddInPlace(Form):
    """``Tensor.add_`` into the branch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).add_(x)


@trap
class MethodAddInPlaceStatement(Form):
    """``Tensor.add_`` into the skip, its result not used."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y.add_(self.a(x))
        return y


@trap
class InPlaceBranch(Form):
    """``+=`` into the branch, as in torchvision's ResNet."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.a(x)
        out += x
        return out


@trap
class InPlaceSkip(Form):
    """``+=`` into the skip."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y += self.a(x)
        return y


@trap
class InPlaceSlice(Form):
    """``+=`` into a slice: the other tokens stay as they are. A slice is a shape-matching map."""

    expected = PROJECTION

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 1:] += self.a(x)[:, 1:]
        return y

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return torch.cat((x[:, :1], x[:, 1:] + h[0] * self.a(x)[:, 1:]), dim=1)


@trap
class InPlaceEntry(Form):
    """``+=`` into an entry of a dictionary."""

    def forward(self, x: Tensor) -> Tensor:
        features = {"x": x.clone()}
        features["x"] += self.a(x)
        return features["x"]


@trap
class InPlaceAttribute(Form):
    """``+=`` into an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        state = types.SimpleNamespace(x=x.clone())
        state.x += self.a(x)
        return state.x


@trap
class InPlaceIndexOnce(Form):
    """``+=`` at an index that may be evaluated once only."""

    def forward(self, x: Tensor) -> Tensor:
        states, index = [x.clone(), torch.zeros_like(x)], itertools.count()
        states[next(index)] += self.a(x)
        return states[0] + next(index)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.a(x) + 1


@trap
class InPlaceSeenThroughAView(Form):
    """An in-place addition shows in every view of the tensor."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.a(x)
        view = out.flatten(1)
        out += x
        return view * 2

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return 2 * (x + h[0] * self.a(x)).flatten(1)


@trap
class OperatorAdd(Form):
    """``operator.add``."""

    def forward(self, x: Tensor) -> Tensor:
        return operator.add(x, self.a(x))


@trap
class OperatorInPlaceAdd(Form):
    """``operator.iadd``."""

    def forward(self, x: Tensor) -> Tensor:
        return operator.iadd(self.a(x), x)


@trap
class DunderAdd(Form):
    """The special method, called by name."""

    def forward(self, x: Tensor) -> Tensor:
        return x.__add__(self.a(x))


@trap
class AFloatFunctional(Form):
    """``FloatFunctional.add``: a module whose forward is never called."""

    expected = (Expected("plus"),)

    def __init__(self) -> None:
        super().__init__()
        self.plus = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.plus.add(x, self.a(x))


class Add(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


@trap
class AdditionModule(Form):
    """A module that adds: the branch was begun by its caller."""

    expected = (Expected("add"),)

    def __init__(self) -> None:
        super().__init__()
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.a(x))


@trap
class WideningAddition(Form):
    """A float32 stream with a bfloat16 branch: the result is float32, and h * F is not rounded to bfloat16."""

    def branch(self, x: Tensor) -> Tensor:
        return self.a(x).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.branch(x).to(x.dtype)


@trap
class NarrowingInPlaceAddition(Form):
    """In place the dtype of the left side stays, here that of the branch."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.a(x).bfloat16()
        out += x
        return out

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return (x + h[0] * self.a(x).bfloat16().to(x.dtype)).bfloat16()


# ------------------------------------------------------------------------------------------- where the expression is


class Pair(Trap):
    """Two steps in one module."""

    expected = two()

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp(), mlp()

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = x + h[0] * self.a(x)
        return x + h[1] * self.b(x)


@trap
class TwoOnALine(Pair):
    """Two steps on one line."""

    # fmt: off
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x); x = x + self.b(x)  # noqa: E702
        return x
    # fmt: on


@trap
class OneWithinAnother(Pair):
    """One step is an operand of the other."""

    def forward(self, x: Tensor) -> Tensor:
        return (y := x + self.a(x)) + self.b(y)


@trap
class OnSeveralLines(Pair):
    """Expressions with line breaks and comments in them."""

    # fmt: off
    def forward(self, x: Tensor) -> Tensor:
        x = (
            x  # the skip
            + self.a(  # the branch
                x
            )
        )
        return x \
            + self.b(x)
    # fmt: on


@trap
class BehindOtherAlphabets(Pair):
    """Columns count bytes, not characters."""

    # fmt: off
    def forward(self, x: Tensor) -> Tensor:
        größe = {"ширина": x, "高さ": 2}; x = größe["ширина"] + self.a(größe["ширина"])  # noqa: E702
        return {"é": x}["é"] + self.b(x)
    # fmt: on


@trap
class LeftIsEvaluatedFirst(Form):
    """The operands take what the one before them left."""

    def forward(self, x: Tensor) -> Tensor:
        states = [x.relu(), x]
        return states.pop() + self.a(states.pop())

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.a(x.relu())


@trap
class DropoutOnBothOperands(Form):
    """Two dropouts must not change places, or each gets the other's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.a(x)) + self.drop(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        branch = self.drop(self.a(x))
        return self.drop(x) + h[0] * branch


@trap
class NameGivenInTheLeftOperand(Form):
    """The right operand uses a name that the left one binds (post-norm)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return (y := self.norm(x)) + self.a(y)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.norm(x)
        return x + h[0] * self.a(x)


@trap
class ConditionalExpression(Trap):
    """One class whose instances differ: some have a step there and some have none."""

    expected = each("blocks.0", "blocks.2")

    class Maybe(nn.Module):
        def __init__(self, residual: bool) -> None:
            super().__init__()
            self.residual, self.a = residual, mlp()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.a(x) if self.residual else self.a(x) + 1

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(self.Maybe(residual) for residual in (True, False, True)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        first, middle, last = (block.a for block in self.blocks)
        x = middle(x + h[0] * first(x)) + 1
        return x + h[1] * last(x)


@trap
class InAComprehension(Form):
    """A comprehension is a function of its own in Python 3.11."""

    expected = (Expected(calls=2, depth=2),)

    def forward(self, x: Tensor) -> Tensor:
        return [x := x + self.a(x) for _ in range(2)][-1]

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = x + h[0] * self.a(x)
        return x + h[0] * self.a(x)


@trap
class InAGenerator(Pair):
    """The frame that adds is a generator's."""

    def states(self, x: Tensor) -> Iterator[Tensor]:
        for branch in (self.a,):
            x = x + branch(x)
            yield x
        yield x + self.b(x)

    def forward(self, x: Tensor) -> Tensor:
        return list(self.states(x))[-1]


@trap
class InALambda(Form):
    """A lambda that is called by somebody else."""

    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(lambda y, branch: y + branch(y), [self.a], x)


@trap
class InANestedFunction(Form):
    """A nested function that uses ``self``."""

    def forward(self, x: Tensor) -> Tensor:
        def step(y: Tensor) -> Tensor:
            return y + self.a(y)

        return step(x)


@trap
class InANestedFunctionWithoutSelf(Form):
    """A nested function that does not use ``self``."""

    def forward(self, x: Tensor) -> Tensor:
        branch = self.a

        def step(y: Tensor) -> Tensor:
            return y + branch(y)

        return step(x)


@trap
class FirstArgumentOfAnotherName(Form):
    """The first argument is not called ``self``."""

    def forward(module, x: Tensor) -> Tensor:
        return x + module.a(x)


@trap
class PrivateNames(Trap):
    """Names with two underscores are mangled with the class's name."""

    def __init__(self) -> None:
        super().__init__()
        self.__branch = mlp()

    def forward(self, x: Tensor) -> Tensor:
        __y = x
        return __y + self.__branch(__y)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.__branch(x)


@trap
class KeywordOnly(Form):
    """Keyword-only arguments with defaults, and defaults of positional ones."""

    def forward(self, x: Tensor, sign: int = 1, *, again: bool = True) -> Tensor:
        return x + sign * self.a(x) if again else x


@trap
class InAMethod(Form):
    """``forward`` only calls the method that adds, as in torchvision."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        return x + self.a(x)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


@trap
class InAStaticMethod(Form):
    """The function that adds has no module among its arguments."""

    @staticmethod
    def plus(x: Tensor, f: Tensor) -> Tensor:
        return x + f

    def forward(self, x: Tensor) -> Tensor:
        return self.plus(x, self.a(x))


# ---------------------------------------------------------------------------------------------- classes and functions


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


def dropout_add(x: Tensor, residual: Tensor, p: float, training: bool) -> Tensor:
    return residual + F.dropout(x, p, training)


def add_outer(x: Tensor, residual: Tensor) -> Tensor:
    return add_inner(residual, x)


def add_inner(residual: Tensor, x: Tensor) -> Tensor:
    return residual + x


class operations:
    """A namespace of functions, reached by an attribute."""

    @staticmethod
    def add(residual: Tensor, x: Tensor) -> Tensor:
        return residual + x


@trap
class FreeFunction(Trap):
    """The addition is in a free function that several modules call, one of them not for a step (bloom, falcon)."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return dropout_add(self.a(x), x, 0.5, self.training)

    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(2, 5, DIM))

        def forward(self, x: Tensor) -> Tensor:
            return dropout_add(x, self.position, 0.5, self.training)

    expected = each("attention", "mlp")

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.attention, self.mlp = self.Embedding(), self.Part(), self.Part()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attention(self.embedding(x)))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.embedding.position + F.dropout(x, 0.5, self.training)
        x = x + h[0] * F.dropout(self.attention.a(x), 0.5, self.training)
        return x + h[1] * F.dropout(self.mlp.a(x), 0.5, self.training)


@trap
class FreeFunctionOfAFreeFunction(Form):
    """The addition is two calls away from the module."""

    def forward(self, x: Tensor) -> Tensor:
        return add_outer(self.a(x), x)


@trap
class FunctionOfANamespace(Form):
    """The function that adds is an attribute of something global."""

    def forward(self, x: Tensor) -> Tensor:
        return operations.add(x, self.a(x))


class Dense(nn.Module):
    """BERT's output module: the branch was begun by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = linear(), nn.LayerNorm(DIM)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.norm(self.dense(hidden) + residual)

    def reference(self, hidden: Tensor, residual: Tensor, h: float) -> Tensor:
        return self.norm(residual + h * self.dense(hidden))


@trap
class BranchBegunByTheCaller(Trap):
    """BERT: the skip and the branch come in as two arguments."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.attention_output = linear(), Dense()
            self.intermediate, self.output = nn.Sequential(linear(), nn.GELU()), Dense()

        def forward(self, x: Tensor) -> Tensor:
            x = self.attention_output(self.attention(x), x)
            return self.output(self.intermediate(x), x)

    expected = each(*(f"layers.{i}.{part}" for i in range(2) for part in ("attention_output", "output")))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        factors = iter(h)
        for layer in self.layers:
            x = layer.attention_output.reference(layer.attention(x), x, next(factors))
            x = layer.output.reference(layer.intermediate(x), x, next(factors))
        return x


@trap
class TrainingRunsOtherCode(Form):
    """Stochastic depth in training and not in evaluation (LeViT): one step, at another place in each mode."""

    expected = (Expected(places=2),)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            keep = torch.rand(len(x), 1, 1, dtype=x.dtype).lt(0.5) / 0.5
            return x + self.a(x) * keep
        return x + self.a(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        if self.training:
            keep = torch.rand(len(x), 1, 1, dtype=x.dtype).lt(0.5) / 0.5
            return x + h[0] * (self.a(x) * keep)
        return x + h[0] * self.a(x)


@trap
class TrainingHasMoreSteps(Form):
    """A step that runs in training only."""

    expected = (Expected("block"), Expected("head"))

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), Block()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.block(x)
        return (y, self.head(self.a(x))) if self.training else (y,)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> tuple[Tensor, ...]:
        y = self.block.reference(x, h[0])
        return (y, self.head.reference(self.a(x), h[1])) if self.training else (y,)


@trap
class ScaledOnce(Form):
    """Layer scale and drop path in the branch: h multiplies the whole right-hand side, once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gamma, self.drop = nn.LayerNorm(DIM), nn.Parameter(torch.randn(DIM)), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.gamma * self.a(self.norm(x)))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.drop(self.gamma * self.a(self.norm(x)))


@trap
class CalledThrice(Trap):
    """One block object called several times (ALBERT)."""

    expected = (Expected("block", calls=3, depth=3),)

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for _ in range(3):
            x = self.block.reference(x, h[0])
        return x


@trap
class TwoNamesForOneBlock(Trap):
    """One block object registered under two names: a step of the first, called twice."""

    expected = (Expected("first", calls=2, depth=2),)

    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.first.reference(self.first.reference(x, h[0]), h[0])


@trap
class ForwardCalledByName(Trap):
    """``block.forward(x)``: no hook of the block runs."""

    expected = (Expected("block"),)

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block.forward(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(x, h[0])


@trap
class StructuredArguments(Trap):
    """The state travels in dictionaries and tuples."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = mlp()

        def forward(self, *, state: dict[str, Any]) -> tuple[dict[str, Any], int]:
            return {**state, "x": (state["x"][0] + self.a(state["x"][0]),)}, 1

    expected = each("first", "second")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.Part(), self.Part()

    def forward(self, x: Tensor) -> dict[str, Any]:
        return self.second(state=self.first(state={"x": (x,)})[0])[0]

    def reference(self, x: Tensor, *, h: Sequence[float]) -> dict[str, Any]:
        x = x + h[0] * self.first.a(x)
        return {"x": (x + h[1] * self.second.a(x),)}


def gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(x, weight)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch calls its scripts deprecated; models have them still
    scripted_gelu, scripted_matmul = torch.jit.script(gelu), torch.jit.script(matmul)


@trap
class ScriptedHelper(Trap):
    """A scripted function within the branch, and one that is the branch."""

    expected = two()

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.weight = linear(), linear(), nn.Parameter(torch.randn(DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(scripted_gelu(self.a(x)))
        return x + scripted_matmul(x, self.weight)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = x + h[0] * self.b(scripted_gelu(self.a(x)))
        return x + h[1] * (x @ self.weight)


class Matmul(torch.autograd.Function):
    """A linear map with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight.mT, x.flatten(0, -2).mT @ grad.flatten(0, -2)


@trap
class CustomAutograd(Trap):
    """The branch is a custom autograd function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x + Matmul.apply(x, self.weight)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * (x @ self.weight)


class Checkpointed(Trap):
    """Activation checkpointing in training, around a block and around a bound method."""

    expected = each("block", "<root>")
    use_reentrant: ClassVar[bool]

    def __init__(self) -> None:
        super().__init__()
        self.block, self.a, self.drop = Block(), mlp(), nn.Dropout(0.5)

    def step(self, x: Tensor) -> Tensor:
        return x + self.drop(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.step(self.block(x))
        x = checkpoint(self.block, x, use_reentrant=self.use_reentrant)
        return checkpoint(self.step, x, use_reentrant=self.use_reentrant)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.block.reference(x, h[0])
        return x + h[1] * self.drop(self.a(x))


@trap
class CheckpointedReentrant(Checkpointed):
    """The reentrant kind runs the forward without grad and again in backward."""

    use_reentrant = True


@trap
class CheckpointedNonReentrant(Checkpointed):
    """The kind that recomputes by saved-tensor hooks."""

    use_reentrant = False


# ------------------------------------------------------------------------------------------------- kinds of branches


@trap
class RecurrentBranches(Trap):
    """GRU, LSTM and a cell as branches."""

    autocast = False  # oneDNN has no bfloat16 LSTM on every processor
    expected = tuple(Expected(f"<root>:{i}", depth=3) for i in range(3))

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(DIM, DIM, batch_first=True)
        self.lstm = nn.LSTM(DIM, DIM // 2, batch_first=True, bidirectional=True)
        self.cell = nn.GRUCell(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gru(x)[0]
        out, _ = self.lstm(x)
        x = out + x
        return x + torch.stack([self.cell(token) for token in x.unbind(1)], dim=1)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = x + h[0] * self.gru(x)[0]
        x = x + h[1] * self.lstm(x)[0]
        return x + h[2] * torch.stack([self.cell(token) for token in x.unbind(1)], dim=1)


@trap
class MixingWithoutAModule(Trap):
    """Branches that are functions: einsum, ``@``, attention, convolution, pooling."""

    expected = tuple(Expected(f"<root>:{i}", depth=5) for i in range(5))
    shape = (2, 5, DIM)

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.kernel = nn.Parameter(torch.randn(DIM, DIM)), nn.Parameter(torch.randn(5, 5, 3))

    def branches(self) -> list[Callable[[Tensor], Tensor]]:
        return [
            lambda x: torch.einsum("btc,cd->btd", x, self.weight),
            lambda x: x @ self.weight,
            lambda x: F.scaled_dot_product_attention(x, x, x),
            lambda x: F.conv1d(x, self.kernel, padding=1),
            lambda x: F.avg_pool1d(x, 3, 1, 1),
        ]

    def forward(self, x: Tensor) -> Tensor:
        einsum, matmul, attention, convolution, pooling = self.branches()
        x = x + einsum(x)
        x = x + matmul(x)
        x = x + attention(x)
        x = x + convolution(x)
        return x + pooling(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, branch in zip(h, self.branches(), strict=True):
            x = x + factor * branch(x)
        return x


@trap
class FourierBranch(Form):
    """A Fourier transform mixes the tokens (FNet)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.fft.fft2(x).real

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * torch.fft.fft2(x).real


@trap
class ClassTokenIsTheState(Trap):
    """The state is a parameter, the class token, which attends to the image (CaiT)."""

    expected = two()

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, DIM))
        self.attention, self.mlp = nn.MultiheadAttention(DIM, 2, batch_first=True), mlp()

    def attend(self, token: Tensor, x: Tensor) -> Tensor:
        x = torch.cat((token, x), dim=1)
        return self.attention(token, x, x, need_weights=False)[0]

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.expand(len(x), -1, -1)
        token = token + self.attend(token, x)
        return token + self.mlp(token)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        token = self.token.expand(len(x), -1, -1)
        token = token + h[0] * self.attend(token, x)
        return token + h[1] * self.mlp(token)


@trap
class LearnedQueriesAreTheState(Trap):
    """The state is an embedding's weight, the queries, which attend to the input (Perceiver, DETR)."""

    expected = each("layers.0", "layers.1")

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)

        def attend(self, queries: Tensor, x: Tensor) -> Tensor:
            return self.attention(queries, x, x, need_weights=False)[0]

        def forward(self, queries: Tensor, x: Tensor) -> Tensor:
            return queries + self.attend(queries, x)

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Embedding(4, DIM)
        self.layers = nn.ModuleList(self.Cross() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.weight.unsqueeze(0).repeat(len(x), 1, 1)
        for layer in self.layers:
            queries = layer(queries, x)
        return queries

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        queries = self.queries.weight.unsqueeze(0).repeat(len(x), 1, 1)
        for factor, layer in zip(h, self.layers, strict=True):
            queries = queries + factor * layer.attend(queries, x)
        return queries


def encoder_reference(layer: nn.TransformerEncoderLayer, x: Tensor, h: Sequence[float]) -> Tensor:
    """``nn.TransformerEncoderLayer``, written by hand."""

    def attend(y: Tensor) -> Tensor:
        return layer.dropout1(layer.self_attn(y, y, y, need_weights=False)[0])

    def feed(y: Tensor) -> Tensor:
        return layer.dropout2(layer.linear2(layer.dropout(layer.activation(layer.linear1(y)))))

    if layer.norm_first:
        x = x + h[0] * attend(layer.norm1(x))
        return x + h[1] * feed(layer.norm2(x))
    x = layer.norm1(x + h[0] * attend(x))
    return layer.norm2(x + h[1] * feed(x))


def decoder_reference(layer: nn.TransformerDecoderLayer, x: Tensor, memory: Tensor, h: Sequence[float]) -> Tensor:
    """``nn.TransformerDecoderLayer``, post-norm, written by hand."""
    x = layer.norm1(x + h[0] * layer.dropout1(layer.self_attn(x, x, x, need_weights=False)[0]))
    x = layer.norm2(x + h[1] * layer.dropout2(layer.multihead_attn(x, memory, memory, need_weights=False)[0]))
    feed = layer.linear2(layer.dropout(layer.activation(layer.linear1(x))))
    return layer.norm3(x + h[2] * layer.dropout3(feed))


class Encoder(Trap):
    """``nn.TransformerEncoderLayer``, whose fused inference path never reaches its Python additions."""

    expected = two("layer")
    fused_inference = True
    norm_first: ClassVar[bool]

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(DIM, 2, 12, batch_first=True, norm_first=self.norm_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return encoder_reference(self.layer, x, h)


@trap
class EncoderPostNorm(Encoder):
    """The default."""

    norm_first = False


@trap
class EncoderPreNorm(Encoder):
    """With ``norm_first=True``."""

    norm_first = True


@trap
class EncoderOfTwoLayers(Trap):
    """``nn.TransformerEncoder``, which has a path of its own with nested tensors."""

    expected = two("encoder.layers.0", 4) + two("encoder.layers.1", 4)
    fused_inference = True

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(DIM, 2, 12, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for i, layer in enumerate(self.encoder.layers):
            x = encoder_reference(layer, x, h[2 * i :])
        return x


@trap
class DecoderLayer(Trap):
    """``nn.TransformerDecoderLayer``: three steps, and the memory is none of its states."""

    expected = tuple(Expected(f"layer:{i}", depth=3) for i in range(3))

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(DIM, 2, 12, batch_first=True)

    def inputs(self) -> tuple[Tensor, Tensor]:
        return torch.randn(2, 5, DIM), torch.randn(2, 5, DIM)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.layer(x, memory)

    def reference(self, x: Tensor, memory: Tensor, *, h: Sequence[float]) -> Tensor:
        return decoder_reference(self.layer, x, memory, h)


@trap
class WholeTransformer(Trap):
    """``nn.Transformer``: two streams, the encoder's and the decoder's."""

    expected = two("net.encoder.layers.0") + tuple(Expected(f"net.decoder.layers.0:{i}", depth=3) for i in range(3))
    fused_inference = True

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Transformer(DIM, 2, 1, 1, 12, batch_first=True)

    def inputs(self) -> tuple[Tensor, Tensor]:
        return torch.randn(2, 5, DIM), torch.randn(2, 4, DIM)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.net(x, target)

    def reference(self, x: Tensor, target: Tensor, *, h: Sequence[float]) -> Tensor:
        memory = self.net.encoder.norm(encoder_reference(self.net.encoder.layers[0], x, h))
        return self.net.decoder.norm(decoder_reference(self.net.decoder.layers[0], target, memory, h[2:]))


# ---------------------------------------------------------------------------------------------------- kinds of steps


class Parallel(Trap):
    """Two branches of one state: both get the one h."""

    expected = (Expected(kind="parallel", places=2),)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(DIM), linear(), mlp()

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        y = self.norm(x)
        return x + h[0] * (self.a(y) + self.b(y))


@trap
class ParallelOnALine(Parallel):
    """``x + a(x) + b(x)``."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.a(y) + self.b(y)


@trap
class ParallelOfTwoNorms(Parallel):
    """Each branch normalizes for itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(self.norm(x)) + self.b(self.norm(x))


@trap
class ParallelStatements(Parallel):
    """In place, over several statements."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out = x + self.a(y)
        out += self.b(y)
        return out


@trap
class ParallelSummedFirst(Parallel):
    """``a(x) + b(x) + x`` (GPT-J): the first addition is a sum of siblings, the second is the step."""

    expected = (Expected(),)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.a(y) + self.b(y) + x


@trap
class ParallelOfThree(Trap):
    """Three branches of one state."""

    expected = (Expected(kind="parallel", places=3),)

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(linear() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.branches
        return x + a(x) + b(x) + c(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + sum(h[0] * branch(x) for branch in self.branches)


class Projection(Trap):
    """A step whose skip is a map between shapes."""

    expected = PROJECTION
    shape = (2, DIM, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.body = body(stride=2)
        self.shortcut = nn.Sequential(conv(1, stride=2), nn.BatchNorm2d(DIM))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        branch = self.body(x)
        return F.relu(self.shortcut(x) + h[0] * branch)


@trap
class ProjectionShortcut(Projection):
    """ResNet's shortcut with a strided convolution and a norm."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += self.shortcut(x)
        return F.relu(out)


@trap
class ProjectionShortcutFirst(Projection):
    """The shortcut is the left operand."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.body(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return F.relu(self.shortcut(x) + h[0] * self.body(x))


@trap
class PoolingShortcut(Projection):
    """ResNet-D's shortcut: pooling, then a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2), conv(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


@trap
class PoolingBesideAToken(Trap):
    """MViT: on the skip the class token is taken apart, the others are mapped and pooled, and joined with it again.

    The branch pools its query in the same way and adds it to what attention gives, which is no step.
    """

    expected = PROJECTION
    shape = (2, 9, DIM)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.query, self.out = nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, 2 * DIM)
        self.project = nn.Linear(DIM, 2 * DIM)

    @staticmethod
    def pool(x: Tensor) -> Tensor:
        token, others = torch.split(x, [1, x.shape[1] - 1], dim=1)
        return torch.cat([token, F.max_pool1d(others.mT, 2).mT], dim=1)

    def branch(self, x: Tensor) -> Tensor:
        query = self.pool(self.query(x))
        return self.out(F.scaled_dot_product_attention(query, query, query) + query)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.pool(self.project(x)) + self.branch(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.norm(x)
        return self.pool(self.project(x)) + h[0] * self.branch(x)


@trap
class PaddingShortcut(Trap):
    """Option A of the ResNet paper: the shortcut leaves out pixels and pads channels with zeros."""

    expected = PROJECTION
    shape = (2, DIM, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(DIM, 2 * DIM, 3, 2, 1), nn.ReLU(), nn.Conv2d(2 * DIM, 2 * DIM, 3, 1, 1))

    def shortcut(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, DIM // 2, DIM // 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.shortcut(x) + h[0] * self.body(x)


@trap
class LearnedScaleOnTheSkip(Trap):
    """The skip has a learned scale."""

    expected = PROJECTION

    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale = mlp(), nn.Parameter(torch.randn(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.a(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x * self.scale + h[0] * self.a(x)


@trap
class LearnedScaleOnTheSkipOfAText(Trap):
    """The same where all comes from parameters: the state was looked up by integers (Doge)."""

    expected = tuple(step._replace(kind="projection") for step in two())

    def __init__(self) -> None:
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(10, DIM), mlp(), mlp()
        self.scale = nn.Parameter(torch.randn(DIM))

    def inputs(self) -> tuple[Tensor]:
        return (torch.randint(10, (2, 5)),)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = self.scale * x + self.a(x)
        return self.scale * x + self.b(x)

    def reference(self, ids: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.words(ids)
        x = self.scale * x + h[0] * self.a(x)
        return self.scale * x + h[1] * self.b(x)


@trap
class Stage(Trap):
    """A projection and identities after it are one stream (ResNet)."""

    class BasicBlock(nn.Module):
        def __init__(self, stride: int) -> None:
            super().__init__()
            self.body = body(stride)
            self.downsample = conv(1, stride) if stride > 1 else None

        def forward(self, x: Tensor) -> Tensor:
            identity = x
            out = self.body(x)
            if self.downsample is not None:
                identity = self.downsample(x)
            out += identity
            return F.relu(out)

        def reference(self, x: Tensor, h: float) -> Tensor:
            out = self.body(x)
            return F.relu((x if self.downsample is None else self.downsample(x)) + h * out)

    shape = (2, DIM, 8, 8)
    expected = tuple(
        Expected(f"blocks.{i}", kind, depth=4)
        for i, kind in enumerate(("identity", "projection", "identity", "projection"))
    )

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv()
        self.blocks = nn.Sequential(*(self.BasicBlock(stride) for stride in (1, 2, 1, 2)))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(DIM, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.stem(x)
        for factor, block in zip(h, self.blocks, strict=True):
            x = block.reference(x, factor)
        return self.head(x)


def keep_output(module: nn.Module, args: Any, output: Tensor) -> None:
    """A forward hook without which its model does not run."""
    module.__dict__["kept"] = output


@trap
class WorksInHooks(Trap):
    """The outputs of the layers are collected by hooks (backbones of transformers)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()
        self.a.register_forward_hook(keep_output)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.b(self.a(x))
        return y * self.a.__dict__.pop("kept")

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        y = x + h[0] * self.b(self.a(x))
        return y * self.a.__dict__.pop("kept")


@trap
class LayersDroppedAtRandom(Trap):
    """In training each layer is left out with a probability (LayerDrop): in the trace and its proof the same ones."""

    expected = each("layers.0", "layers.1", "layers.2", "layers.3")

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or torch.rand(()) < 0.5:
                x = layer(x)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for layer, factor in zip(self.layers, h, strict=True):
            if not self.training or torch.rand(()) < 0.5:
                x = layer.reference(x, factor)
        return x


@trap
class TwoTowers(Trap):
    """Two streams, each with a depth of its own (CLIP)."""

    expected = (*each("image.0", "image.1"), *each("text.0", "text.1", "text.2"))

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(Block(), Block())
        self.text = nn.Sequential(Block(), Block(), Block())

    def inputs(self) -> tuple[Tensor, Tensor]:
        return torch.randn(2, 5, DIM), torch.randn(3, 4, DIM)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.image(image).mean(1) @ self.text(text).mean(1).mT

    def reference(self, image: Tensor, text: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, block in zip(h[:2], self.image, strict=True):
            image = block.reference(image, factor)
        for factor, block in zip(h[2:], self.text, strict=True):
            text = block.reference(text, factor)
        return image.mean(1) @ text.mean(1).mT


# ------------------------------------------------------------------------------------------------------- long skips


@trap
class GlobalSkip(Trap):
    """``body(x) + x`` around steps: reported as long and left alone."""

    expected = each("body.0", "body.1")
    long = ("<root>",)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Block(), Block(), linear())

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += x
        return out

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        y = x
        for factor, block in zip(h[:2], self.body[:2], strict=True):
            y = block.reference(y, factor)
        outer = h[2] if len(h) > 2 else 1.0
        return x + outer * self.body[2](y)


@trap
class ResidualInResidual(Trap):
    """The outer skips of nested residual blocks (RRDB) are long; the inner steps are a stream of their own each."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(Block(), Block())

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * 0.2 + x

    expected = tuple(Expected(f"blocks.{i}.inner.{j}", depth=2) for i in range(2) for j in range(2))
    long = ("blocks.0", "blocks.1")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(self.Outer(), self.Outer())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        outer = h[4:] if len(h) > 4 else (1.0, 1.0)
        for i, block in enumerate(self.blocks):
            y = x
            for j, inner in enumerate(block.inner):
                y = inner.reference(y, h[2 * i + j])
            x = x + outer[i] * (y * 0.2)
        return x


@trap
class AdditiveUNet(Trap):
    """A U-Net that adds its skips: reported as long and left alone; what is inside of it is a stream of its own."""

    expected = (Expected("down", depth=2), Expected("middle"), Expected("up", depth=2))
    long = ("<root>",)
    shape = (2, DIM, 8, 8)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.body(x)

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = self.Residual(), self.Residual(), self.Residual()
        self.reduce, self.enlarge = conv(stride=2), nn.ConvTranspose2d(DIM, DIM, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        y = self.middle(self.reduce(skip))
        return self.up(self.enlarge(y) + skip)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        skip = x + h[0] * self.down.body(x)
        y = self.reduce(skip)
        y = y + h[1] * self.middle.body(y)
        x = (h[3] if len(h) > 3 else 1.0) * self.enlarge(y) + skip
        return x + h[2] * self.up.body(x)


# ------------------------------------------------------------------------------------------------- what is not a step


class WithABlock(Trap):
    """Additions that are not steps, beside one that is."""

    expected = (Expected("block"),)

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()


@trap
class PositionEmbedding(WithABlock):
    """Learned and fixed position embeddings, and a bias, all of the state's own shape."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = linear()
        self.position = nn.Parameter(torch.randn(2, 5, DIM))
        self.register_buffer("fixed", torch.randn(2, 5, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x) + self.position
        x += self.fixed
        return self.block(x) + self.position

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(self.patch(x) + self.position + self.fixed, h[0]) + self.position


@trap
class Embeddings(WithABlock):
    """The sum of a word's, a position's and a segment's embedding (BERT), then a timestep's projection."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.position, self.segment = (nn.Embedding(10, DIM) for _ in range(3))
        self.time = linear()

    def inputs(self) -> tuple[Tensor, Tensor]:
        return torch.randint(10, (2, 5)), torch.randn(2, 1, DIM)

    def embed(self, ids: Tensor, time: Tensor) -> Tensor:
        positions = torch.arange(5).expand(2, 5)
        x = self.word(ids) + self.segment(torch.zeros_like(ids))
        return x + self.position(positions) + self.time(time).expand(2, 5, DIM)

    def forward(self, ids: Tensor, time: Tensor) -> Tensor:
        return self.block(self.embed(ids, time))

    def reference(self, ids: Tensor, time: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(self.embed(ids, time), h[0])


@trap
class PositionsInEveryLayer(Trap):
    """DETR: the layers add the positions to queries and keys again; by then the state derives from the positions."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.value = linear(), linear()

        def attend(self, x: Tensor, position: Tensor) -> Tensor:
            query = self.query(x + position)
            return torch.softmax(query @ (x + position).mT, dim=-1) @ self.value(x)

        def forward(self, x: Tensor, position: Tensor) -> Tensor:
            return x + self.attend(x, position)

    expected = each("layers.0", "layers.1", "layers.2")

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(2, 5, DIM))
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.position)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, layer in zip(h, self.layers, strict=True):
            x = x + factor * layer.attend(x, self.position)
        return x


@trap
class PositionsInEveryTurn(Trap):
    """The same in one forward, where no argument separates state and positions."""

    expected = (Expected(calls=3, depth=3),)

    def __init__(self) -> None:
        super().__init__()
        self.position, self.a = nn.Parameter(torch.randn(2, 5, DIM)), mlp()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            y = x + self.position
            x = x + self.a(y)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for _ in range(3):
            x = x + h[0] * self.a(x + self.position)
        return x


class Scores(nn.Module):
    """Attention scores and whatever is added to them, of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = linear(), linear(), linear()

    def attend(self, x: Tensor, bias: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).mT
        scores = scores + bias
        return torch.softmax(scores, dim=-1) @ self.value(x)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.attend(x, bias)


@trap
class AttentionMask(Trap):
    """A mask of the scores' own shape that was computed from the input."""

    expected = (Expected("attention"),)

    def __init__(self) -> None:
        super().__init__()
        self.attention = Scores()

    def mask(self, x: Tensor) -> Tensor:
        empty = x.sum(-1).lt(-1e3)
        return torch.zeros_like(x[..., :1].expand(-1, -1, 5)).masked_fill(empty.unsqueeze(1), -1e4)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, self.mask(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.attention.attend(x, self.mask(x))


@trap
class RelativePositionsPassedDown(Trap):
    """T5: the first layer's bias goes to all layers as an argument; by then the state derives from it."""

    expected = each("layers.0", "layers.1", "layers.2")

    def __init__(self) -> None:
        super().__init__()
        self.relative = nn.Embedding(9, 1)
        self.layers = nn.ModuleList(Scores() for _ in range(3))

    def bias(self) -> Tensor:
        distance = torch.arange(5).unsqueeze(1) - torch.arange(5) + 4
        return self.relative(distance).squeeze(-1).expand(2, 5, 5)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias()
        for layer in self.layers:
            x = layer(x, bias)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, layer in zip(h, self.layers, strict=True):
            x = x + factor * layer.attend(x, self.bias())
        return x


@trap
class ScoresPassedDown(Trap):
    """RealFormer: the scores of one layer are added to the next layer's, a stream of siblings beside the state."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.value = linear(), linear()

        def attend(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.query(x) @ x.mT + before
            return torch.softmax(scores, dim=-1) @ self.value(x), scores

        def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
            branch, scores = self.attend(x, before)
            return x + branch, scores

    expected = each("first", "second")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.Layer(), self.Layer()

    def forward(self, x: Tensor) -> Tensor:
        x, scores = self.first(x, x.new_zeros(2, 5, 5))
        return self.second(x, scores)[0]

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        branch, scores = self.first.attend(x, x.new_zeros(2, 5, 5))
        x = x + h[0] * branch
        return x + h[1] * self.second.attend(x, scores)[0]


@trap
class Rotary(Trap):
    """Rotary embeddings: ``q * cos + rotate(q) * sin``."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = linear(), linear()
        angle = torch.arange(5.0).unsqueeze(1) * torch.ones(DIM)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def rotate(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-right, left), dim=-1) * self.sin

    def attend(self, x: Tensor) -> Tensor:
        query, key = self.rotate(self.query(x)), self.rotate(x)
        return torch.softmax(query @ key.mT, dim=-1) @ self.value(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.attend(x)


@trap
class SumOfSiblings(WithABlock):
    """Two branches of one state, added to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.a(x) + self.b(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(self.a(x) + self.b(x), h[0])


@trap
class JoinedMapsAreNoShortcut(WithABlock):
    """Two maps one after another, of which the second takes joined parts: more than what matches a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = linear(), linear(), linear()
        self.body = nn.Sequential(linear(), nn.ReLU(), linear(), nn.ReLU(), linear())

    def siblings(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([self.a(x[:, :1]), self.b(x[:, 1:])], dim=1)) + self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.siblings(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(self.siblings(x), h[0])


@trap
class NothingMixes(WithABlock):
    """``x + f(x)`` with an elementwise f."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + x
        x = x + F.relu(x)
        x = x + self.drop(x.sigmoid() * 2)
        return self.block(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = x + x
        x = x + F.relu(x)
        return self.block.reference(x + self.drop(x.sigmoid() * 2), h[0])


@trap
class BroadcastContext(WithABlock):
    """A pooled context that is added to every pixel is not of the state's shape."""

    expected = (Expected("block"),)

    def __init__(self) -> None:
        super().__init__()
        self.context = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + self.context(x.mean(1, keepdim=True)))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(x + self.context(x.mean(1, keepdim=True)), h[0])


@trap
class Loss(WithABlock):
    """Sums of scalars and of integers."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        index = x.argmax(-1)
        index = index + torch.ones_like(index)
        return x.square().mean() + x.abs().mean() + index.sum() * 0

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.block.reference(x, h[0])
        return x.square().mean() + x.abs().mean()


@trap
class ResolutionFusion(Trap):
    """HRNet: every resolution gets the sum over all resolutions."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.body(x))

        def reference(self, x: Tensor, h: float) -> Tensor:
            return F.relu(x + h * self.body(x))

    class Exchange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(ResolutionFusion.Residual() for _ in range(2))
            self.up, self.down = nn.Sequential(conv(1), nn.Upsample(scale_factor=2)), conv(stride=2)

        def fuse(self, high: Tensor, low: Tensor) -> list[Tensor]:
            return [F.relu(high + self.up(low)), F.relu(self.down(high) + low)]

        def forward(self, x: list[Tensor]) -> list[Tensor]:
            high, low = (branch(y) for branch, y in zip(self.branches, x, strict=True))
            return self.fuse(high, low)

    expected = tuple(Expected(f"modules_.{i}.branches.{j}", depth=2) for i in range(2) for j in range(2))
    shape = (2, DIM, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.transition = conv(), conv(stride=2)
        self.modules_ = nn.ModuleList(self.Exchange() for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        y = [x, self.transition(x)]
        for module in self.modules_:
            y = module(y)
        return y

    def reference(self, x: Tensor, *, h: Sequence[float]) -> list[Tensor]:
        x = self.stem(x)
        y = [x, self.transition(x)]
        for i, module in enumerate(self.modules_):
            first, second = module.branches
            y = module.fuse(first.reference(y[0], h[2 * i]), second.reference(y[1], h[2 * i + 1]))
        return y


@trap
class FeaturePyramid(Trap):
    """FPN: lateral maps plus the upsampled map from above."""

    expected = each("stage.0", "stage.1")
    shape = (2, DIM, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.ModuleList(ResolutionFusion.Residual() for _ in range(2))
        self.reduce, self.lateral = conv(stride=2), nn.ModuleList(conv(1) for _ in range(2))

    def merge(self, fine: Tensor, coarse: Tensor) -> list[Tensor]:
        top = self.lateral[1](coarse)
        return [self.lateral[0](fine) + F.interpolate(top, scale_factor=2.0), top]

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.stage[0](x)
        return self.merge(fine, self.stage[1](self.reduce(fine)))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> list[Tensor]:
        fine = self.stage[0].reference(x, h[0])
        return self.merge(fine, self.stage[1].reference(self.reduce(fine), h[1]))


@trap
class HierarchicalSplits(Trap):
    """Res2Net: the inner additions of its splits are part of the branch."""

    shape = (2, DIM, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(1), conv(1)
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 3, 1, 1) for _ in range(3))

    def branch(self, x: Tensor) -> Tensor:
        splits = torch.split(self.first(x), 2, dim=1)
        y, outputs = splits[0], []
        for i, layer in enumerate(self.convs):
            y = layer(y if i == 0 else y + splits[i])
            outputs.append(y)
        return self.last(torch.cat((*outputs, splits[3]), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        out += x
        return out

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.branch(x)


@trap
class ResponseNorm(Trap):
    """The addition inside ConvNeXt V2's global response norm is a gate."""

    expected = (Expected("block"),)
    shape = (2, 4, 4, DIM)

    class GlobalResponseNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma, self.beta = nn.Parameter(torch.zeros(DIM)), nn.Parameter(torch.zeros(DIM))

        def forward(self, x: Tensor) -> Tensor:
            norm = x.norm(p=2, dim=(1, 2), keepdim=True)
            norm = norm / (norm.mean(-1, keepdim=True) + 1e-6)
            return x + (self.beta + self.gamma * (x * norm))

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(linear(), ResponseNorm.GlobalResponseNorm(), linear())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(x)

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.block.branch(x)


@trap
class StateSpaceScan(Trap):
    """Mamba: the recurrence and the feed-through ``D * x`` of a scan are part of the branch."""

    expected = (Expected("block"),)

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.rate = linear(), linear(), linear()
            self.decay, self.through = nn.Parameter(torch.rand(DIM)), nn.Parameter(torch.randn(DIM))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            drive, state, states = self.rate(x) * x, torch.zeros_like(x[:, 0]), []
            for i in range(x.shape[1]):
                state = self.decay.sigmoid() * state + drive[:, i]
                states.append(state)
            y = torch.stack(states, dim=1)
            y = y + x * self.through
            return self.last(y)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mixer = nn.LayerNorm(DIM), StateSpaceScan.Mixer()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mixer(self.norm(x))

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.block.mixer(self.block.norm(x))


@trap
class LowRank(Trap):
    """The sum of a LoRA layer inside a branch."""

    expected = (Expected("block"),)

    class Lora(nn.Linear):
        def __init__(self) -> None:
            super().__init__(DIM, DIM)
            self.down, self.up = nn.Linear(DIM, 2, bias=False), nn.Linear(2, DIM, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            result = super().forward(x)
            result = result + self.up(self.down(x)) * 2.0
            return result

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(LowRank.Lora(), nn.GELU(), LowRank.Lora())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(x)

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.block.branch(x)


@trap
class SeriesDecomposition(Trap):
    """Autoformer: between its steps ``x - pool(x)`` takes the trend out of the state."""

    expected = two()

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp(), mlp()
        self.pool = nn.AvgPool1d(3, 1, 1)

    def decompose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        trend = self.pool(x.mT).mT
        return x - trend, trend

    def forward(self, x: Tensor) -> Tensor:
        x, trend = self.decompose(x + self.a(x))
        x, more = self.decompose(x + self.b(x))
        return torch.cat((x, trend + more), dim=-1)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x, trend = self.decompose(x + h[0] * self.a(x))
        x, more = self.decompose(x + h[1] * self.b(x))
        return torch.cat((x, trend + more), dim=-1)


@trap
class PoolingResidual(Trap):
    """PoolFormer: ``pool(x) - x`` inside a branch is part of it."""

    shape = (2, DIM, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.pool = nn.GroupNorm(1, DIM), nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def mix(self, x: Tensor) -> Tensor:
        return self.pool(x) - x

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.mix(self.norm(x))


# ------------------------------------------------------------------------------------ what is seen and not supported


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
