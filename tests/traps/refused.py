"""Sums that are not scaled by difference, since one of the things that this takes is not so."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.traps.base import linear
from tests.traps.difference import Rerun, RunAgainInItsBackward


class Beside(nn.Module):
    """The step of a function, after one that is found."""

    def __init__(self, function: Callable[[Beside, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = linear(), linear(), function
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return self.function(self, x)


def overwritten(m: Beside, x: Tensor) -> Tensor:
    return functools.reduce(operator.iadd, (x, m.b(x)))


def written_by_addcmul(m: Beside, x: Tensor) -> Tensor:
    return x.addcmul_(m.b(x), torch.ones_like(x))


def halved(m: Beside, x: Tensor) -> Tensor:
    return (lambda s, f: (s + f) / 2)(x, m.b(x))


def keeping(m: Beside, x: Tensor) -> Tensor:
    y = (lambda s, f, held: (held.append(s + f), held[-1])[1])(x, m.b(x), m.kept)  # type: ignore[func-returns-value]
    return y * m.kept.pop()


def reading(m: Beside, x: Tensor) -> Tensor:
    scale = []
    y = (lambda s, f: (y := s + f, scale.append(y.mean()))[0])(x, m.b(x))  # type: ignore[func-returns-value]
    return y * scale[0]


def skip_made_inside(m: Beside, x: Tensor) -> Tensor:
    return (lambda s: s.tanh() + m.b(s.tanh()))(x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor) -> Tensor:
        return 2 * (x + f)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return 2 * grad, 2 * grad


def doubled(m: Beside, x: Tensor) -> Tensor:
    return Doubled.apply(x, m.b(x))  # type: ignore[no-any-return, no-untyped-call]


class WithoutItsParameters(RunAgainInItsBackward):
    def forward(self, x: Tensor) -> Tensor:
        return Rerun.apply(self.both, 1, x, *self.a.parameters(), *self.b.parameters())  # type: ignore[no-any-return, no-untyped-call]


class Compiled(nn.Module):
    def __init__(self, add: Any) -> None:
        super().__init__()
        self.a, self.add = linear(), add

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.a(x))  # type: ignore[no-any-return]
