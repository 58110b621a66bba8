"""Sums inside sums, and sums beside the stream: gates, scores, positions, accumulators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.traps.base import DIM, PROJECTION, Block, Expected, Trap, WithABlock, conv, each, linear, mlp, trap, two


class HandNorm(nn.Module):
    """A layer norm written out."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.ones(DIM)), nn.Parameter(torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(-1, keepdim=True)
        s = (x - u).pow(2).mean(-1, keepdim=True)
        return self.w * ((x - u) / torch.sqrt(s + 1e-5)) + self.b


class LocalResidual(nn.Module):
    """A block whose branch holds a residual of its own: a local convolution, a position encoding."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.a, self.b, self.c = linear(), linear(), linear()

    def branch(self, x: Tensor) -> Tensor:
        u = self.a(self.norm(x))
        u = u + torch.tanh(self.b(u))
        return self.c(u)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@trap
class ALocalResidualBelongsToTheBranch(Trap):
    """One rule for a layer norm and for the same norm written by hand."""

    expected = each("blocks.0", "blocks.1", "blocks.2", "blocks.3")

    def __init__(self) -> None:
        super().__init__()
        norms = nn.LayerNorm(DIM), nn.LayerNorm(DIM), HandNorm(), HandNorm()
        self.blocks = nn.Sequential(*map(LocalResidual, norms))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, block in zip(h, self.blocks, strict=True):
            x = x + factor * block.branch(x)
        return x


class EndsInANorm(nn.Module):
    """Parallel branches behind a norm by hand, of which the second ends in a norm, with a gate or without one."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.before, self.a, self.b, self.norm = HandNorm(), mlp(), linear(), nn.LayerNorm(DIM)
        self.gate = linear() if gated else None

    def second(self, y: Tensor) -> Tensor:
        b = self.norm(self.b(y))
        return b if self.gate is None else torch.tanh(self.gate(y)) * b

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        return x + self.a(y) + self.second(y)


@trap
class ABranchThatEndsInANormModulatesNone(Trap):
    """``s + norm(f(s))`` is no norm that is modulated by ``s``: what comes after goes back to the sum."""

    expected = tuple(Expected(f"blocks.{i}", "parallel", depth=4, places=2) for i in range(4))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*map(EndsInANorm, (False, False, True, True)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, block in zip(h, self.blocks, strict=True):
            y = block.before(x)
            x = x + factor * (block.a(y) + block.second(y))
        return x


class TalkingHeads(nn.Module):
    """Attention whose scores are mixed by a residual over the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = linear(), linear(), linear(), linear()
        self.talk = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, DIM // 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2)
        scores = scores + self.talk(scores)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@trap
class AScoresResidualBelongsToTheBranch(Trap):
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.mlp = TalkingHeads(), mlp()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x)
            return x + self.mlp(x)

    expected = two("layers.0", depth=4) + two("layers.1", depth=4)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(self.Layer(), self.Layer())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + h[2 * i] * layer.attention(x)
            x = x + h[2 * i + 1] * layer.mlp(x)
        return x


@trap
class TheInputIsUsedForASecondResidual(Trap):
    """``x + ff(norm(x + a(x)))``: the stream goes on from ``x``, the inner sum belongs to the branch."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.ff = nn.LayerNorm(DIM), linear(), mlp()

        def branch(self, x: Tensor) -> Tensor:
            return self.ff(self.norm(x + self.a(x)))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(x)

    expected = each("layers.0", "layers.1")

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(self.Layer(), self.Layer())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, layer in zip(h, self.layers, strict=True):
            x = x + factor * layer.branch(x)
        return x


@trap
class AStreamInsideAStream(Trap):
    """A transformer in each block of a diffusion U-Net: both are streams, and both are scaled."""

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.enter, self.leave = nn.LayerNorm(DIM), linear(), linear()
            self.blocks = nn.Sequential(Block(), Block())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.leave(self.blocks(self.enter(self.norm(x))))

        def reference(self, x: Tensor, h: Sequence[float]) -> Tensor:
            y = self.enter(self.norm(x))
            for factor, block in zip(h, self.blocks, strict=False):
                y = block.reference(y, factor)
            return x + h[2] * self.leave(y)

    expected = tuple(
        Expected(name, depth=2)
        for i in range(2)
        for name in (f"parts.{i}.blocks.0", f"parts.{i}.blocks.1", f"parts.{i}")
    )

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(self.Transformer(), self.Transformer())

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for i, part in enumerate(self.parts):
            x = part.reference(x, h[3 * i : 3 * i + 3])
        return x


@trap
class RefinedPositions(Trap):
    """Positions that the caller makes of the layer's own state, as in DETR's relatives: they are no step."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)
            self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
            self.mlp = mlp()

        def attend(self, x: Tensor, positions: Tensor) -> Tensor:
            query = x + positions
            attended: Tensor = self.attention(query, query, x, need_weights=False)[0]
            return attended

        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            x = self.norms[0](x + self.attend(x, positions))
            return self.norms[1](x + self.mlp(x))

    expected = two("layers.0", depth=4) + two("layers.1", depth=4)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Layer(), self.Layer()])
        self.heads = nn.ModuleList(nn.Linear(DIM, 4) for _ in range(2))
        self.embed = nn.Sequential(nn.Linear(4, DIM), nn.ReLU(), nn.Linear(DIM, DIM))

    def inputs(self) -> tuple[Any, ...]:
        return torch.randn(2, 5, DIM), torch.rand(2, 5, 4)

    def forward(self, x: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = layer(x, self.embed(boxes))
            boxes = torch.sigmoid(head(x) + boxes)
        return x, boxes

    def reference(self, x: Tensor, boxes: Tensor, *, h: Sequence[float]) -> tuple[Tensor, Tensor]:
        for i, (layer, head) in enumerate(zip(self.layers, self.heads, strict=True)):
            x = layer.norms[0](x + h[2 * i] * layer.attend(x, self.embed(boxes)))
            x = layer.norms[1](x + h[2 * i + 1] * layer.mlp(x))
            boxes = torch.sigmoid(head(x) + boxes)
        return x, boxes


@trap
class RefinedPositionsAsWideAsTheState(RefinedPositions):
    """No reversible network, whose other half has the state's shape as well: its sums are not squashed."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        self.embed = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM))

    def inputs(self) -> tuple[Any, ...]:
        return torch.randn(2, 5, DIM), torch.rand(2, 5, DIM)


@trap
class ANormByHandInAProjection(Trap):
    """A layer norm written out before the map that fits the shape."""

    expected = PROJECTION

    def __init__(self) -> None:
        super().__init__()
        self.branch = mlp()
        self.shortcut = nn.Sequential(HandNorm(), nn.Linear(DIM, DIM, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.branch(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.shortcut(x) + h[0] * self.branch(x)


@trap
class FrozenBatchNormInAProjection(Trap):
    """``x * scale + bias`` after the map that fits the shape."""

    expected = PROJECTION
    shape = (2, DIM, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fit = conv(), conv(stride=2), conv(1, stride=2)
        self.register_buffer("scale", torch.rand(DIM, 1, 1) + 0.5)
        self.register_buffer("bias", torch.randn(DIM, 1, 1))

    def shortcut(self, x: Tensor) -> Tensor:
        return self.fit(x) * self.get_buffer("scale") + self.get_buffer("bias")

    def branch(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        return (self.shortcut(x) + self.branch(x)).relu()

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return (self.shortcut(x) + h[0] * self.branch(x)).relu()


@trap
class AScaledSkipBesidePooling(Trap):
    """A learned scale on the skip, and a branch that mixes by pooling alone (PoolFormer v2)."""

    expected = PROJECTION
    shape = (2, DIM, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.pool = nn.GroupNorm(1, DIM), nn.AvgPool2d(3, 1, 1)
        self.scale = nn.Parameter(torch.rand(DIM, 1, 1))

    def branch(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.pool(y) - y

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.branch(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x * self.scale + h[0] * self.branch(x)


@trap
class AGateIsNoProjection(WithABlock):
    """``sigmoid(W x + U s)`` where the state ``s`` was computed from ``x``, and goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.w, self.u = linear(), linear(), linear()

    def mixed(self, x: Tensor) -> Tensor:
        s = torch.tanh(self.encode(x))
        z = torch.sigmoid((self.w(x) + self.u(s)) / 2)
        return z * s

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.mixed(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(self.mixed(x), h[0])


@trap
class AScoreIsNoProjection(WithABlock):
    """Additive attention: ``v tanh(W q + U k)``, with keys made of the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.w, self.u, self.v = linear(), linear(), linear(), nn.Linear(DIM, 1)

    def attended(self, x: Tensor) -> Tensor:
        k = torch.relu(self.encode(x))
        scores = self.v(torch.tanh(self.w(x) + self.u(k)))
        return scores.softmax(1) * k

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.attended(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(self.attended(x), h[0])


@trap
class ASumOfExitsIsNoStream(WithABlock):
    """Each layer adds to the output, and reads none of it (the skips of WaveNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear() for _ in range(3))
        self.exits = nn.ModuleList(linear() for _ in range(3))

    def exit(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for layer, exit in zip(self.layers, self.exits, strict=True):
            x = torch.relu(layer(x))
            out = out + exit(x)
        return out

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.block(x)
        return x, self.exit(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> tuple[Tensor, Tensor]:
        x = self.block.reference(x, h[0])
        return x, self.exit(x)


@trap
class ASumOfLayersIsNoStream(WithABlock):
    """Each layer takes what the one before gave, and the output is the sum of all (Polynormer, jumping knowledge)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear() for _ in range(4))

    def total(self, x: Tensor) -> Tensor:
        total: Any = 0
        for layer in self.layers:
            x = torch.relu(layer(x))
            total = total + x
        return total

    def forward(self, x: Tensor) -> Tensor:
        return self.total(self.block(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.total(self.block.reference(x, h[0]))


@trap
class ABranchOfTheBranchBefore(Trap):
    """In a stream such a sum is one step of several branches: the next block reads it."""

    expected = (
        Expected("blocks.0", "parallel", depth=2, places=2),
        Expected("blocks.1", "parallel", depth=2, places=2),
    )

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(DIM), linear(), mlp()

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(self.norm(x))
            x = x + a
            return x + self.b(torch.tanh(a))

        def reference(self, x: Tensor, h: float) -> Tensor:
            a = self.a(self.norm(x))
            return x + h * (a + self.b(torch.tanh(a)))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, block in zip(h, self.blocks, strict=True):
            x = block.reference(x, factor)
        return x


@trap
class SummedAttentionIsNoStream(WithABlock):
    """The attention weights of the steps so far, as in Tacotron."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.place, self.out = nn.Linear(DIM, 5), nn.Conv1d(1, 1, 3, padding=1), nn.Linear(5, DIM)

    def attended(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x[:, 0, :5])
        steps = []
        for t in range(x.shape[1]):
            weights = torch.softmax(self.query(x[:, t]) + self.place(total[:, None])[:, 0], -1)
            total = total + weights
            steps.append(self.out(weights))
        return torch.stack(steps, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.attended(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(self.attended(x), h[0])
