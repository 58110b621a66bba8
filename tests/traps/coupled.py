"""Two streams that read each other, and earlier states that are injected into branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.traps.base import DIM, Expected, Trap, WithABlock, each, linear, mlp, trap, two


class Injected(Trap):
    """Blocks that read the first state besides their own, in a branch alone; what a block is, its subclass says."""

    expected = each("layers.0", "layers.1", "layers.2")

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a = nn.LayerNorm(DIM), mlp()

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers, self.head = linear(), nn.ModuleList(self.Layer() for _ in range(3)), linear()

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.stem(x)
        for layer in self.layers:
            x = layer(x, first)
        return self.head(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = first = self.stem(x)
        for factor, layer in zip(h, self.layers, strict=True):
            x = layer.reference(x, first, factor)
        return self.head(x)


@trap
class InjectedBehindTheNorm(Injected):
    class Layer(Injected.Layer):
        def forward(self, x: Tensor, first: Tensor) -> Tensor:
            return x + self.a(self.norm(x) + first)

        def reference(self, x: Tensor, first: Tensor, h: float) -> Tensor:
            return x + h * self.a(self.norm(x) + first)


@trap
class InjectedBesideANormedSkip(Injected):
    """CodeBrain: the skip is the normed state, and the branch reads the raw one."""

    expected = tuple(Expected(f"layers.{i}", "projection", depth=3) for i in range(3))

    class Layer(Injected.Layer):
        def forward(self, x: Tensor, first: Tensor) -> Tensor:
            return self.norm(x) + self.a(x + first)

        def reference(self, x: Tensor, first: Tensor, h: float) -> Tensor:
            return self.norm(x) + h * self.a(x + first)


@trap
class InjectedBesideAMultiple(Injected):
    """DeepNorm: the skip is a multiple of the state."""

    class Layer(Injected.Layer):
        def forward(self, x: Tensor, first: Tensor) -> Tensor:
            return 1.5 * x + self.a(x + first)

        def reference(self, x: Tensor, first: Tensor, h: float) -> Tensor:
            return 1.5 * x + h * self.a(x + first)

    expected = tuple(Expected(f"layers.{i}", "projection", depth=3) for i in range(3))


class Coupled(Trap):
    """Two states, and layers that take and return both."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = mlp(), mlp()

    def inputs(self) -> tuple[Any, ...]:
        return torch.randn(2, 5, DIM), torch.randn(2, 5, DIM)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            a, b = layer(a, b)
        return a, b

    def reference(self, a: Tensor, b: Tensor, *, h: Sequence[float]) -> tuple[Tensor, Tensor]:
        for i, layer in enumerate(self.layers):
            a, b = layer.reference(a, b, *h[2 * i : 2 * i + 2])
        return a, b


@trap
class TwoStreamsInTurn(Coupled):
    """Each branch reads both: nodes and edges of a graph network."""

    expected = (*two("layers.0", 3), *two("layers.1", 3), *two("layers.2", 3))

    class Layer(Coupled.Layer):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            a = a + self.f(a * b)
            b = b + self.g(b * a)
            return a, b

        def reference(self, a: Tensor, b: Tensor, h: float, k: float) -> tuple[Tensor, Tensor]:
            a = a + h * self.f(a * b)
            b = b + k * self.g(b * a)
            return a, b


@trap
class AStreamDrivenByAnother(TwoStreamsInTurn):
    """The pair representation of AlphaFold: its branch reads the sequence alone, which reads itself and the pairs."""

    class Layer(Coupled.Layer):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            a = a + self.f(a * b)
            b = b + self.g(a)
            return a, b

        def reference(self, a: Tensor, b: Tensor, h: float, k: float) -> tuple[Tensor, Tensor]:
            a = a + h * self.f(a * b)
            b = b + k * self.g(a)
            return a, b


@trap
class MultiplesOfTwoStreams(TwoStreamsInTurn):
    """GemNet: each sum is divided by the square root of two."""

    class Layer(Coupled.Layer):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            a = (a + self.f(a * b)) * 0.5**0.5
            b = (b + self.g(a)) * 0.5**0.5
            return a, b

        def reference(self, a: Tensor, b: Tensor, h: float, k: float) -> tuple[Tensor, Tensor]:
            a = (a + h * self.f(a * b)) * 0.5**0.5
            b = (b + k * self.g(a)) * 0.5**0.5
            return a, b


@trap
class WhatCodesLeaveOver(WithABlock):
    """Residual quantization: each code is taken out of what those before left over."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = linear(), linear()

    def run(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for _ in range(2):
            low = self.down(x)
            code = self.up(low + (low.round() - low).detach())
            x = x - code
            total = total + code
        return 2 * total + x

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.block(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.run(self.block.reference(x, h[0]))


@trap
class WhatLayersGiveBesideTheStream(Trap):
    """WaveNet: half of what a layer makes is added to the stream, and half to a sum that no layer reads."""

    expected = each("<root>:0", "<root>:1", depth=2)

    def __init__(self) -> None:
        super().__init__()
        self.ins = nn.ModuleList(linear() for _ in range(3))
        self.outs = nn.ModuleList(nn.Linear(DIM, 2 * DIM) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        made = self.outs[0](torch.tanh(self.ins[0](x)))
        x = x + made[..., :DIM]
        total = total + made[..., DIM:]
        made = self.outs[1](torch.tanh(self.ins[1](x)))
        x = x + made[..., :DIM]
        total = total + made[..., DIM:]
        return total + self.outs[2](torch.tanh(self.ins[2](x)))[..., DIM:]

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        total = torch.zeros_like(x)
        for i in range(2):
            rest, given = self.outs[i](torch.tanh(self.ins[i](x))).chunk(2, -1)
            x, total = x + h[i] * rest, total + given
        return total + self.outs[2](torch.tanh(self.ins[2](x)))[..., DIM:]
