"""What the traps are made of: the class, the two lists, the plain block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

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
    keyed: ClassVar[bool] = False  # one line of a loop in the model itself makes the steps of its layers

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


class Form(Trap):
    """One step, written in one of the forms that an addition can take."""

    def __init__(self) -> None:
        super().__init__()
        self.a = mlp()

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.a(x)


class WithABlock(Trap):
    """Additions that are not steps, beside one that is."""

    expected = (Expected("block"),)

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
