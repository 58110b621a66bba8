"""Kinds of steps: parallel, with a projection, in streams, around several others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.traps.base import DIM, PROJECTION, Block, Expected, Trap, body, conv, each, linear, mlp, trap, two


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
class ParallelFromTheLeft(Parallel):
    """``a(x) + (x + b(x))``: what is a single map beside a deeper branch is a branch as well, and no mapped skip."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.a(y) + (x + self.b(y))


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
