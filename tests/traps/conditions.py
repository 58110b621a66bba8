"""What is added to a stream beside its branches: conditions, hints, and latents that a batch is spread over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.traps.base import DIM, Block, Expected, Trap, each, linear, mlp, trap


class Conditioned(Trap):
    """Blocks that add one condition, from an input of its own; what a block is, its subclass says."""

    expected = each("layers.0", "layers.1", "layers.2")

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = mlp(), linear()

        def reference(self, x: Tensor, c: Tensor, h: float) -> Tensor:
            return x + c + h * self.a(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.time = linear(), linear()
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))

    def inputs(self) -> tuple[Any, ...]:
        return torch.randn(self.shape), torch.randn(self.shape)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x, c = self.stem(x), self.time(c)
        for layer in self.layers:
            x = layer(x, c)
        return x

    def reference(self, x: Tensor, c: Tensor, *, h: Sequence[float]) -> Tensor:
        x, c = self.stem(x), self.time(c)
        for factor, layer in zip(h, self.layers, strict=True):
            x = layer.reference(x, c, factor)
        return x


@trap
class AConditionBetween(Conditioned):
    """From the second block on the stream was computed from the condition, which must not be taken for a skip."""

    class Layer(Conditioned.Layer):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return x + c + self.a(x)


@trap
class AConditionBehind(Conditioned):
    class Layer(Conditioned.Layer):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return x + self.a(x) + c


@trap
class AConditionAddedAfterTheBranch(Conditioned):
    class Layer(Conditioned.Layer):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            branch = self.a(x)
            x = x + c
            return x + branch


@trap
class AConditionBefore(Conditioned):
    class Layer(Conditioned.Layer):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            x = x + c
            return x + self.a(x)

        def reference(self, x: Tensor, c: Tensor, h: float) -> Tensor:
            return x + c + h * self.a(x + c)


@trap
class AMappedConditionBetween(Conditioned):
    """Each block has a map of its own for the condition."""

    class Layer(Conditioned.Layer):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return x + self.c(c) + self.a(x)

        def reference(self, x: Tensor, c: Tensor, h: float) -> Tensor:
            return x + self.c(c) + h * self.a(x)


@trap
class AConditionAndAMapOfIt(Conditioned):
    class Layer(Conditioned.Layer):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return x + c - self.a(x) + self.c(c)

        def reference(self, x: Tensor, c: Tensor, h: float) -> Tensor:
            return x + c - h * self.a(x) + self.c(c)


@trap
class MultiplesOfStateAndCondition(Conditioned):
    class Layer(Conditioned.Layer):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return 0.5 * x + 0.5 * c + self.a(x)

        def reference(self, x: Tensor, c: Tensor, h: float) -> Tensor:
            return 0.5 * x + 0.5 * c + h * self.a(x)


@trap
class NoMapBetween(Conditioned):
    """Soft data consistency (VarNet): what is added first was computed from the state, without a map."""

    class Layer(Conditioned.Layer):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return x - torch.where(c > 0, x - c, 0.0) - self.a(x)

        def reference(self, x: Tensor, c: Tensor, h: float) -> Tensor:
            return x - torch.where(c > 0, x - c, 0.0) - h * self.a(x)


@trap
class AStateWrittenTwice(Conditioned):
    class Layer(Conditioned.Layer):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return x + c + self.a(x + c)

        def reference(self, x: Tensor, c: Tensor, h: float) -> Tensor:
            return x + c + h * self.a(x + c)


@trap
class HintsBetweenBlocks(Trap):
    """T2I-Adapter, ControlNet: after each block a map of the hint, which is no mapped skip of it."""

    expected = each("blocks.0", "blocks.1", "blocks.2")

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.hints = (nn.ModuleList(kind() for _ in range(3)) for kind in (Block, linear))

    def inputs(self) -> tuple[Any, ...]:
        return torch.randn(self.shape), torch.randn(self.shape)

    def forward(self, x: Tensor, hint: Tensor) -> Tensor:
        for block, k in zip(self.blocks, self.hints, strict=True):
            x = block(x)
            x = x + k(hint)
        return x

    def reference(self, x: Tensor, hint: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, block, k in zip(h, self.blocks, self.hints, strict=True):
            x = block.reference(x, factor) + k(hint)
        return x


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = linear(), nn.Linear(DIM, 2 * DIM)

    def read(self, q: Tensor, memory: Tensor) -> Tensor:
        k, v = self.kv(memory).chunk(2, -1)
        return torch.softmax(self.q(q) @ k.mT, -1) @ v

    def forward(self, q: Tensor, memory: Tensor) -> Tensor:
        return q + self.read(q, memory)


@trap
class LatentsSpreadOverTheBatch(Trap):
    """Perceiver, Q-Former: the sum itself gives the latents the batch's axis."""

    latents = (3, DIM)
    expected = each("cross", "block")

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(self.latents))
        self.cross, self.block = Cross(), Block()

    def forward(self, memory: Tensor) -> Tensor:
        return self.block(self.cross(self.start, memory))

    def reference(self, memory: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.start + h[0] * self.cross.read(self.start, memory)
        return self.block.reference(x, h[1])


@trap
class LatentsWithAnAxisForTheBatch(LatentsSpreadOverTheBatch):
    latents = (1, 3, DIM)


@trap
class Ladder(Trap):
    """Ladder residual: each branch begins one block earlier, beside what the block between has added."""

    expected = (Expected(kind="parallel", calls=3, depth=3),)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        before = x
        for layer in self.layers:
            before, x = x, x + torch.relu(layer(before))
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        before = x
        for layer in self.layers:
            before, x = x, x + h[0] * torch.relu(layer(before))
        return x


@trap
class TheLastSumIsNotRead(Trap):
    """WaveNet, with convolutions that shorten: the skips are cropped, and only the branches lead on from the last."""

    keyed = True
    shape = (2, DIM, 24)
    expected = tuple(Expected(f"r.{i}", "projection", depth=3) for i in range(3))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(DIM, DIM, 1)
        self.f = nn.ModuleList(nn.Conv1d(DIM, 2 * DIM, 2, dilation=2**i) for i in range(3))
        self.r, self.s = (nn.ModuleList(nn.Conv1d(DIM, DIM, 1) for _ in range(3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.stem(x), []
        for f, r, s in zip(self.f, self.r, self.s, strict=True):
            a, b = f(x).chunk(2, 1)
            y = torch.tanh(a) * torch.sigmoid(b)
            skips.append(s(y)[..., -8:])
            y = r(y)
            x = y + x[..., -y.size(2) :]
        return torch.cat(skips, 1)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x, skips = self.stem(x), []
        for factor, f, r, s in zip(h, self.f, self.r, self.s, strict=True):
            a, b = f(x).chunk(2, 1)
            y = torch.tanh(a) * torch.sigmoid(b)
            skips.append(s(y)[..., -8:])
            x = factor * r(y) + x[..., -y.size(2) :]
        return torch.cat(skips, 1)


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shortcut, self.a = linear(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.a(x)

    def reference(self, x: Tensor, h: float) -> Tensor:
        return self.shortcut(x) + h * self.a(x)


@trap
class ASkipAroundProjections(Trap):
    """TiDE: a linear skip around blocks that are all projections is long."""

    expected = tuple(Expected(f"blocks.{i}", "projection", depth=3) for i in range(3))
    long = ("<root>",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.skip = nn.Sequential(*(Projected() for _ in range(3))), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x) + self.skip(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        *inner, long = h if len(h) > 3 else (*h, 1.0)
        y = x
        for factor, block in zip(inner, self.blocks, strict=True):
            y = block.reference(y, factor)
        return long * y + self.skip(x)


@trap
class ALongSkipAroundACondition(Trap):
    """What blocks have changed is a stream: a condition that is added to it there does not make its start one."""

    expected = each(*(f"blocks.{i}" for i in range(4)))
    long = ("<root>",)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.time = linear(), linear()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def inputs(self) -> tuple[Any, ...]:
        return torch.randn(self.shape), torch.randn(self.shape)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        start = self.stem(x)
        x = self.blocks[1](self.blocks[0](start))
        x = x + self.time(c)
        return start + self.blocks[3](self.blocks[2](x))

    def reference(self, x: Tensor, c: Tensor, *, h: Sequence[float]) -> Tensor:
        *inner, long = h if len(h) > 4 else (*h, 1.0)
        start = y = self.stem(x)
        for i, factor in enumerate(inner):
            y = self.blocks[i].reference(y + self.time(c) if i == 2 else y, factor)
        return start + long * y


@trap
class AnImageGivenAgain(Trap):
    """Behind a stem and its blocks a map of the image is added: with the blocks cut no shallower, so long."""

    expected = tuple(Expected(f"blocks.{i}", depth=1) for i in range(2))
    long = ("<root>:0", "<root>:1")

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = linear(), nn.ModuleList(Block() for _ in range(2))
        self.k, self.m = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks[0](self.stem(x))
        y = y + self.k(x)
        y = self.blocks[1](y)
        return y + self.m(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        first, second, *long = h if len(h) > 2 else (*h, 1.0, 1.0)
        y = long[0] * self.blocks[0].reference(self.stem(x), first) + self.k(x)
        return long[1] * self.blocks[1].reference(y, second) + self.m(x)


@trap
class AnImageGivenToEachStage(Trap):
    """ESPNet v2: behind each stage another map of the image is added to what a map makes of the stream."""

    expected = each(*(f"blocks.{i}" for i in range(4)))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = linear(), nn.ModuleList(Block() for _ in range(4))
        self.down, self.k = (nn.ModuleList(linear() for _ in range(3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks[0](self.stem(x))
        y = torch.relu(self.down[0](y)) + self.k[0](x)
        y = self.blocks[1](y)
        y = torch.relu(self.down[1](y)) + self.k[1](x)
        y = self.blocks[2](y)
        y = torch.relu(self.down[2](y)) + self.k[2](x)
        return self.blocks[3](y)  # type: ignore[no-any-return]

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        y = self.blocks[0].reference(self.stem(x), h[0])
        for down, k, block, factor in zip(self.down, self.k, self.blocks[1:], h[1:], strict=True):
            y = block.reference(torch.relu(down(y)) + k(x), factor)
        return y


@trap
class NoiseThatMultiplies(Trap):
    """A factor of 1 + noise leaves a branch what it is; a state may begin as a draw."""

    expected = each("<root>:0", "<root>:1")

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.randn_like(x) * 0.0
        y = y + self.a(y + x)
        return y + self.b(y) * (1 + 0.0 * torch.randn_like(y))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        y = torch.randn_like(x) * 0.0 + h[0] * self.a(x)
        return y + h[1] * self.b(y) * (1 + 0.0 * torch.randn_like(y))
