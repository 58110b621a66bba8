"""What stands beside a stream: sums over its layers, skips that are joined, branches that begin earlier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.traps.base import DIM, Block, Expected, Trap, each, linear, mlp, trap, two


class ReadOut(Trap):
    """Beside the blocks something of each state is summed up; what, a subclass says."""

    expected = each("blocks.0", "blocks.1", "blocks.2")

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.weights = nn.ModuleList(Block() for _ in range(3)), nn.Parameter(torch.rand(4))

    def part(self, x: Tensor, n: int) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out = self.part(x, 0)
        for n, block in enumerate(self.blocks, 1):
            x = block(x)
            out = out + self.part(x, n)
        return out

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        out = self.part(x, 0)
        for n, (block, factor) in enumerate(zip(self.blocks, h, strict=True), 1):
            x = block.reference(x, factor)
            out = out + self.part(x, n)
        return out


@trap
class PooledReadOut(ReadOut):
    """Jumping knowledge of a graph network."""

    def part(self, x: Tensor, n: int) -> Tensor:
        return x.mean(1)


@trap
class WeightedReadOut(ReadOut):
    """ELMo's scalar mix."""

    def part(self, x: Tensor, n: int) -> Tensor:
        return self.weights[n] * x


@trap
class LastTokens(ReadOut):
    def part(self, x: Tensor, n: int) -> Tensor:
        return x[:, -1]


@trap
class LogDeterminant(Trap):
    """A flow of affine couplings whose networks have residual blocks: beside them the sum of logarithms is no step."""

    shape = (3, DIM)
    expected = tuple(Expected(f"layers.{i}.1", depth=3) for i in range(3))

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.a(x))

        def reference(self, x: Tensor, h: float) -> Tensor:
            return x + h * torch.tanh(self.a(x))

    def __init__(self) -> None:
        super().__init__()
        half = DIM // 2
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(half, DIM), self.Residual(), nn.ReLU(), nn.Linear(DIM, 2 * half)) for _ in range(3)
        )

    def begin(self, x: Tensor) -> Any:
        return torch.zeros(len(x), dtype=x.dtype)

    def couple(self, x: Tensor, made: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        scale, shift = layer[3](layer[2](made)).chunk(2, 1)
        scale = torch.tanh(scale)
        return torch.cat((b * torch.exp(scale) + shift, a), 1), scale.sum(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = self.begin(x)
        for layer in self.layers:
            made = layer[1](layer[0](x.chunk(2, 1)[0]))
            x, log = self.couple(x, made, layer)
            total = total + log
        return x, total

    def reference(self, x: Tensor, *, h: Sequence[float]) -> tuple[Tensor, Tensor]:
        total = self.begin(x)
        for layer, factor in zip(self.layers, h, strict=True):
            made = layer[1].reference(layer[0](x.chunk(2, 1)[0]), factor)
            x, log = self.couple(x, made, layer)
            total = total + log
        return x, total


@trap
class TwoLogDeterminants(LogDeterminant):
    """Of two couplings the second logarithm alone is made of the state of the first one."""

    expected = tuple(Expected(f"layers.{i}.1", depth=2) for i in range(2))

    def __init__(self) -> None:
        super().__init__()
        del self.layers[2]


@trap
class TwoLogDeterminantsFromZero(TwoLogDeterminants):
    def begin(self, x: Tensor) -> Any:
        return 0


@trap
class JoinedSkip(Trap):
    """TimeSformer: the skip is joined of a token as it was and of others that a step has changed."""

    expected = tuple(Expected(f"layers.{i}:{n}", depth=6) for i in range(2) for n in range(3))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time, self.space, self.mlp = linear(), nn.MultiheadAttention(DIM, 1, batch_first=True), mlp()

        def attended(self, token: Tensor, others: Tensor) -> Tensor:
            batch, length = others.shape[:2]
            rows = others.reshape(batch * length, 1, DIM)
            rows = torch.cat((token.repeat(1, length, 1).reshape(batch * length, 1, DIM), rows), 1)
            made = self.space(rows, rows, rows)[0]
            first = made[:, 0].reshape(batch, length, DIM).mean(1, keepdim=True)
            return torch.cat((first, made[:, 1:].reshape(batch, length, DIM)), 1)

        def forward(self, x: Tensor) -> Tensor:
            token, others = x[:, :1], x[:, 1:]
            others = others + torch.tanh(self.time(others))
            x = torch.cat((token, others), 1) + self.attended(token, others)
            return x + self.mlp(x)

        def reference(self, x: Tensor, h: Sequence[float]) -> Tensor:
            token, others = x[:, :1], x[:, 1:]
            others = others + h[0] * torch.tanh(self.time(others))
            x = torch.cat((token, others), 1) + h[1] * self.attended(token, others)
            return x + h[2] * self.mlp(x)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for n, layer in enumerate(self.layers):
            x = layer.reference(x, h[3 * n : 3 * n + 3])
        return x


@trap
class JoinedOfTwoInputs(Trap):
    """Text and images, joined in the sum, each with a map of its own."""

    expected = each("<root>")

    def __init__(self) -> None:
        super().__init__()
        self.stems, self.maps = (nn.ModuleList(linear() for _ in range(2)) for _ in range(2))

    def inputs(self) -> tuple[Any, ...]:
        return torch.randn(self.shape), torch.randn(self.shape)

    def parts(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.stems[0](x), self.stems[1](y)
        return torch.cat((x, y), 1), torch.cat((torch.tanh(self.maps[0](x)), torch.tanh(self.maps[1](y))), 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.stems[0](x), self.stems[1](y)
        return torch.cat((x, y), 1) + torch.cat((torch.tanh(self.maps[0](x)), torch.tanh(self.maps[1](y))), 1)

    def reference(self, x: Tensor, y: Tensor, *, h: Sequence[float]) -> Tensor:
        skip, branch = self.parts(x, y)
        return skip + h[0] * branch


@trap
class TwoStepsEarlier(Trap):
    """LongCat: a branch that begins two steps before it is added."""

    expected = tuple(
        Expected(f"layers.{i}:{n}", "parallel" if n == 0 else "identity", depth=4, places=2 if n == 0 else 1)
        for i in range(2)
        for n in range(2)
    )

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.experts = linear(), linear(), mlp()

        def forward(self, x: Tensor) -> Tensor:
            early = self.experts(x)
            x = x + torch.tanh(self.a(x))
            x = x + torch.tanh(self.b(x))
            return x + early

        def reference(self, x: Tensor, h: Sequence[float]) -> Tensor:
            early = self.experts(x)
            x = x + h[0] * torch.tanh(self.a(x))
            x = x + h[1] * torch.tanh(self.b(x))
            return x + h[0] * early

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for n, layer in enumerate(self.layers):
            x = layer.reference(x, h[2 * n : 2 * n + 2])
        return x


@trap
class PooledByUnfold(Trap):
    """Granite Speech: a skip whose windows `unfold` makes."""

    expected = (Expected(kind="projection", depth=1),)
    shape = (2, 6, DIM)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(DIM, DIM, 3, 2, 1), nn.SiLU(), nn.Conv1d(DIM, DIM, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x.unfold(1, 2, 2).mean(-1) + self.body(x.transpose(1, 2)).transpose(1, 2)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x.unfold(1, 2, 2).mean(-1) + h[0] * self.body(x.transpose(1, 2)).transpose(1, 2)


@trap
class DiagonalInside(Trap):
    """S4: `x + gelu(convolution(x) + D * x)`, where the inner sum is a part of the branch."""

    expected = each("layers.0", "layers.1", "layers.2")

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.d = nn.Parameter(torch.randn(DIM, 5)), nn.Parameter(torch.randn(DIM))

        def branch(self, x: Tensor) -> Tensor:
            length, u = x.shape[1], x.transpose(1, 2).float()
            made = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(self.kernel.float(), n=2 * length)
            made = torch.fft.irfft(made, n=2 * length)[..., :length].transpose(1, 2).to(x.dtype)
            return F.gelu(made + x * self.d)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(x)

        def reference(self, x: Tensor, h: float) -> Tensor:
            return x + h * self.branch(x)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for layer, factor in zip(self.layers, h, strict=True):
            x = layer.reference(x, factor)
        return x


@trap
class GatheredSums(Trap):
    """GatedGCN: what edges gather from their nodes is added to, and is no second stream."""

    autocast = False  # index_add takes one dtype
    expected = tuple(Expected(f"layers.{i}:{n}", depth=2) for i in range(2) for n in range(2))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.u, self.v = (linear() for _ in range(5))

        def branches(self, x: Tensor, e: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
            t = self.a(x)[i] + self.b(x)[j]
            t = t + self.c(e)
            made = torch.zeros_like(x).index_add(0, i, torch.sigmoid(t) * self.v(x)[j])
            return torch.relu(self.u(x) + made), torch.relu(t)

        def forward(self, x: Tensor, e: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
            t = self.a(x)[i] + self.b(x)[j]
            t = t + self.c(e)
            made = torch.zeros_like(x).index_add(0, i, torch.sigmoid(t) * self.v(x)[j])
            x = x + torch.relu(self.u(x) + made)
            return x, e + torch.relu(t)

        def reference(self, x: Tensor, e: Tensor, i: Tensor, j: Tensor, h: Sequence[float]) -> tuple[Tensor, Tensor]:
            of_nodes, of_edges = self.branches(x, e, i, j)
            return x + h[0] * of_nodes, e + h[1] * of_edges

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))

    def inputs(self) -> tuple[Any, ...]:
        i, j = torch.tensor([0, 1, 2, 3, 4, 0, 1]), torch.tensor([1, 2, 3, 4, 0, 2, 3])
        return torch.randn(5, DIM), torch.randn(7, DIM), i, j

    def forward(self, x: Tensor, e: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x, e = layer(x, e, i, j)
        return x, e

    def reference(self, x: Tensor, e: Tensor, i: Tensor, j: Tensor, *, h: Sequence[float]) -> tuple[Tensor, Tensor]:
        for n, layer in enumerate(self.layers):
            x, e = layer.reference(x, e, i, j, h[2 * n : 2 * n + 2])
        return x, e


@trap
class BegunAtZero(Trap):
    """Each branch is added in the next turn of the loop, the first time a number."""

    keyed = True
    expected = each("layers.0", "layers.1", "layers.2")

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(mlp() for _ in range(4)), linear()

    def forward(self, x: Tensor) -> Tensor:
        out: Any = 0
        for layer in self.layers:
            x = x + out
            out = layer(x)
        return self.head(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, layer in zip(h, self.layers, strict=False):
            x = x + factor * layer(x)
        return self.head(x)


@trap
class BegunAtZeroInPlace(BegunAtZero):
    """Written into the state, of which each branch has a copy."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        out: Any = 0
        for layer in self.layers:
            x += out
            out = layer(x.clone())
        return self.head(x)


class Gained(nn.Module):
    """A block whose skip has a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.a = nn.Parameter(torch.rand(DIM)), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x + self.a(x)

    def reference(self, x: Tensor, h: float) -> Tensor:
        return self.gain * x + h * self.a(x)


@trap
class GroupsOfGained(Trap):
    """Residual groups of blocks whose skips have gains: the groups are long, as without gains."""

    expected = tuple(Expected(f"groups.{i}.{n}", "projection", depth=2) for i in range(2) for n in range(2))
    long = ("groups.0", "groups.1")

    class Group(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.Sequential(*(self.Group(Gained(), Gained()) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.groups(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        inner, long = h[:4], [*h[4:], 1.0, 1.0][:2]
        for i, group in enumerate(self.groups):
            y = x
            for n in range(2):
                y = group[n].reference(y, inner[2 * i + n])  # type: ignore[index]
            x = x + long[i] * y
        return x


@trap
class ASecondBranchOfBoth(Trap):
    """The second branch is made of the state and of the first one."""

    expected = (Expected(kind="parallel", places=2),)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp(), nn.Sequential(nn.Linear(2 * DIM, DIM), nn.GELU(), linear())

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return x + y + self.b(torch.cat((x, y), -1))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        y = self.a(x)
        return x + h[0] * y + h[0] * self.b(torch.cat((x, y), -1))


@trap
class LargestAlone(Trap):
    """Beside a mapped skip a mask by comparison makes a branch of two maps that is not linear."""

    expected = (Expected(kind="projection"),)

    def __init__(self) -> None:
        super().__init__()
        self.shortcut, self.a, self.b = linear(), linear(), linear()

    def branch(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y * (y >= y.topk(3).values[..., -1:]))

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return h[0] * self.branch(x) + self.shortcut(x)


@trap
class LadderOfBlocks(Trap):
    """Ladder residual as published: each block adds what the two layers of the one before it made, and makes two."""

    expected = (
        *(Expected(f"blocks.{i}:{n}", depth=6) for i in (1, 2) for n in (0, 1)),
        *two(depth=6),
    )

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.norm2, self.b = nn.LayerNorm(DIM), linear(), nn.LayerNorm(DIM), mlp()

        def forward(self, x: Tensor, a: Any, b: Any) -> tuple[Tensor, Tensor, Tensor]:
            x = x + a
            made = self.a(self.norm(x))
            x = x + b
            return x, made, self.b(self.norm2(x))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a: Any = 0
        b: Any = 0
        for block in self.blocks:
            x, a, b = block(x, a, b)
        return x + a + b

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        a: Any = 0
        b: Any = 0
        for i, block in enumerate(self.blocks):
            factors = h[2 * i - 2 : 2 * i] if i else (1.0, 1.0)
            x = x + factors[0] * a
            a = block.a(block.norm(x))  # type: ignore[operator]
            x = x + factors[1] * b
            b = block.b(block.norm2(x))  # type: ignore[operator]
        return x + h[4] * a + h[5] * b


@trap
class TwoStreamsOfTheSameLayers(Trap):
    """ResiDual: each layer is added to a stream that is normed and to one that is not."""

    expected = tuple(Expected(f"layers.{i}", "parallel", depth=3, places=2) for i in range(3))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = mlp(), nn.LayerNorm(DIM)

        def forward(self, x: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
            made = self.a(x)
            return self.norm(x + made), dual + made

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(self.Layer() for _ in range(3)), nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        dual = x
        for layer in self.layers:
            x, dual = layer(x, dual)
        return x + self.norm(dual)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        dual = x
        for layer, factor in zip(self.layers, h, strict=True):
            made = layer.a(x)  # type: ignore[operator]
            x, dual = layer.norm(x + factor * made), dual + factor * made  # type: ignore[operator]
        return x + self.norm(dual)


@trap
class HandedToTheNextBlock(Trap):
    """A third branch that each block makes of the state between, and the next one adds behind its own two."""

    expected = (
        *two("blocks.0", depth=6),
        *(
            Expected(f"blocks.{i}:{n}", ("identity", "identity", "parallel")[n], depth=6)
            for i in (1, 2)
            for n in range(3)
        ),
        Expected(kind="parallel", depth=6),
    )

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = mlp(), mlp(), mlp()

        def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
            x = x + self.a(x)
            made = self.c(x)
            x = x + self.b(x)
            if before is not None:
                x = x + before
            return x, made

        def reference(self, x: Tensor, before: Tensor | None, h: Sequence[float]) -> tuple[Tensor, Tensor]:
            x = x + h[0] * self.a(x)
            made = self.c(x)
            x = x + h[1] * self.b(x)
            return x if before is None else x + h[2] * before, made

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        before: Tensor | None = None
        for block in self.blocks:
            x, before = block(x, before)
        assert before is not None
        return x + before

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        before: Tensor | None = None
        for block, first in zip(self.blocks, (0, 2, 5), strict=True):
            x, before = block.reference(x, before, h[first : first + 3])  # type: ignore[operator]
        assert before is not None
        return x + h[8] * before


class SeveralStates(Trap):
    """Blocks that add a state of before on the line of their step; in which order, a subclass says."""

    expected = each("layers.0", "layers.1", "layers.2")

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.k = mlp(), nn.Parameter(torch.rand(1))

        def reference(self, x: Tensor, before: Tensor, first: Tensor, h: float) -> Tensor:
            raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Sequential(linear(), nn.Tanh()), nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.stem(x)
        before = 0.5 * x
        for layer in self.layers:
            x, before = layer(x, before, first), x
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        first = x = self.stem(x)
        before = 0.5 * x
        for layer, factor in zip(self.layers, h, strict=True):
            x, before = layer.reference(x, before, first, factor), x  # type: ignore[operator]
        return x


@trap
class TheFirstStateAgain(SeveralStates):
    class Layer(SeveralStates.Layer):
        def forward(self, x: Tensor, before: Tensor, first: Tensor) -> Tensor:
            return x + first + self.a(x)

        def reference(self, x: Tensor, before: Tensor, first: Tensor, h: float) -> Tensor:
            return x + first + h * self.a(x)


@trap
class TheFirstStateBehind(SeveralStates):
    """GCNII's initial residual."""

    class Layer(SeveralStates.Layer):
        def forward(self, x: Tensor, before: Tensor, first: Tensor) -> Tensor:
            return 0.9 * x + self.a(x) + 0.1 * first

        def reference(self, x: Tensor, before: Tensor, first: Tensor, h: float) -> Tensor:
            return 0.9 * x + h * self.a(x) + 0.1 * first


@trap
class TheFirstStateInBrackets(SeveralStates):
    class Layer(SeveralStates.Layer):
        def forward(self, x: Tensor, before: Tensor, first: Tensor) -> Tensor:
            return x + (first + self.a(x))

        def reference(self, x: Tensor, before: Tensor, first: Tensor, h: float) -> Tensor:
            return x + (first + h * self.a(x))


@trap
class TheFirstStateInANorm(SeveralStates):
    class Layer(SeveralStates.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(DIM)

        def forward(self, x: Tensor, before: Tensor, first: Tensor) -> Tensor:
            return self.norm(x + first + self.a(x))

        def reference(self, x: Tensor, before: Tensor, first: Tensor, h: float) -> Tensor:
            return self.norm(x + first + h * self.a(x))


@trap
class TheStateComesLast(SeveralStates):
    """LM-ResNet (Lu et al., 2018) in its authors' order."""

    class Layer(SeveralStates.Layer):
        def forward(self, x: Tensor, before: Tensor, first: Tensor) -> Tensor:
            return self.a(x) + self.k * before + (1 - self.k) * x

        def reference(self, x: Tensor, before: Tensor, first: Tensor, h: float) -> Tensor:
            return h * self.a(x) + self.k * before + (1 - self.k) * x


@trap
class LeapfrogBackwards(SeveralStates):
    class Layer(SeveralStates.Layer):
        def forward(self, x: Tensor, before: Tensor, first: Tensor) -> Tensor:
            return self.a(x) + (-before) + 2 * x

        def reference(self, x: Tensor, before: Tensor, first: Tensor, h: float) -> Tensor:
            return h * self.a(x) + (-before) + 2 * x


@trap
class TheInputAgain(SeveralStates):
    """The state was made of the input by a map, and no step: the first block is told by the others."""

    def forward(self, x: Tensor) -> Tensor:
        given, x = x, self.stem(x)
        for layer in self.layers:
            x = x + given + layer.a(x)  # type: ignore[operator]
        return x

    keyed = True
    expected = each("layers.0.a", "layers.1.a", "layers.2.a")

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        given, x = x, self.stem(x)
        for layer, factor in zip(self.layers, h, strict=True):
            x = x + given + factor * layer.a(x)  # type: ignore[operator]
        return x


@trap
class SkipByABilinearMap(Trap):
    """MACE's self-connection: the skip is mapped by a matrix that attributes make."""

    expected = (Expected("layers.0", "projection", depth=2), Expected("layers.1", "projection", depth=2))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.skip = mlp(), nn.Bilinear(DIM, 3, DIM, bias=False)

        def forward(self, x: Tensor, attributes: Tensor) -> Tensor:
            return self.a(x) + self.skip(x, attributes)

        def reference(self, x: Tensor, attributes: Tensor, h: float) -> Tensor:
            return h * self.a(x) + self.skip(x, attributes)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))

    def inputs(self) -> tuple[Any, ...]:
        return torch.randn(5, DIM), torch.randn(5, 3)

    def forward(self, x: Tensor, attributes: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, attributes)
        return x

    def reference(self, x: Tensor, attributes: Tensor, *, h: Sequence[float]) -> Tensor:
        for layer, factor in zip(self.layers, h, strict=True):
            x = layer.reference(x, attributes, factor)  # type: ignore[operator]
        return x


@trap
class DetachedBetweenItsSteps(Trap):
    """Estimates that are refined and cut off in between; each branch has a residual of its own inside."""

    keyed = True
    expected = tuple(Expected(f"out.{i}") for i in range(2))

    def __init__(self) -> None:
        super().__init__()
        self.stem = linear()
        self.into, self.a, self.out = (nn.ModuleList(linear() for _ in range(2)) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        x, outputs = self.stem(x), []
        for into, a, out in zip(self.into, self.a, self.out, strict=True):
            x = x.detach()
            y = torch.relu(into(x))
            y = y + torch.relu(a(y))
            x = x + out(y)
            outputs.append(x)
        return outputs

    def reference(self, x: Tensor, *, h: Sequence[float]) -> list[Tensor]:
        x, outputs = self.stem(x), []
        for into, a, out, factor in zip(self.into, self.a, self.out, h, strict=True):
            x = x.detach()
            y = torch.relu(into(x))
            y = y + torch.relu(a(y))
            x = x + factor * out(y)
            outputs.append(x)
        return outputs


@trap
class DrivenByAGate(Trap):
    """A learned optimizer: a cell reads the parameters, and they are changed by its state alone."""

    expected = (Expected(calls=3, depth=3),)

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.a = nn.GRUCell(DIM, DIM), linear()

    shape = (4, DIM)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x)
        for _ in range(3):
            state = self.cell(x, state)
            x = x + self.a(state)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        state = torch.zeros_like(x)
        for _ in range(3):
            state = self.cell(x, state)
            x = x + h[0] * self.a(state)
        return x


@trap
class AnEarlierStateInEachBranch(Trap):
    """The skip is normed, the branch begins at a sum with the first state, and another map of it is read out."""

    expected = tuple(Expected(f"layers.{i}", "projection", depth=4) for i in range(4))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.out, self.skip = nn.LayerNorm(DIM), mlp(), linear(), linear()

        def forward(self, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.tanh(self.a(x + first))
            return (self.norm(x) + self.out(y)) * 0.5**0.5, self.skip(y)

        def reference(self, x: Tensor, first: Tensor, h: float) -> tuple[Tensor, Tensor]:
            y = torch.tanh(self.a(x + first))
            return (self.norm(x) + h * self.out(y)) * 0.5**0.5, self.skip(y)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = linear(), nn.ModuleList(self.Layer() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.stem(x)
        total = torch.zeros_like(x)
        for layer in self.layers:
            x, out = layer(x, first)
            total = total + out
        return total

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        first = x = self.stem(x)
        total = torch.zeros_like(x)
        for layer, factor in zip(self.layers, h, strict=True):
            x, out = layer.reference(x, first, factor)  # type: ignore[operator]
            total = total + out
        return total


@trap
class AnEarlierStateInEachBranchByHand(AnEarlierStateInEachBranch):
    """With the norm of the skip written out."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(DIM))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.norm = self.Norm()


@trap
class AWeightedSkipAroundTheBlock(Trap):
    """RGT: behind both steps, in a line of its own, the block's input is added once more, and is a long skip."""

    expected = tuple(Expected(f"blocks.{i}:{n}", depth=2) for i in range(2) for n in (0, 1))
    long = ("blocks.0:2", "blocks.1:2")

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.gamma = mlp(), mlp(), nn.Parameter(torch.rand(DIM))

        def forward(self, x: Tensor) -> Tensor:
            given = x
            x = x + self.a(x)
            x = x + self.b(x)
            x = x + given * self.gamma
            return x

        def reference(self, x: Tensor, h: Sequence[float]) -> Tensor:
            y = x + h[0] * self.a(x)
            return h[2] * (y + h[1] * self.b(y)) + x * self.gamma

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(self.Layer(), self.Layer())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        steps, long = h[:4], [*h[4:], 1.0, 1.0][:2]
        for i, block in enumerate(self.blocks):
            x = block.reference(x, [*steps[2 * i : 2 * i + 2], long[i]])  # type: ignore[operator]
        return x
