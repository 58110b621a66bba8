"""Which stream a sum belongs to: stages, states that are positions as well, two streams, parts and contexts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.traps.base import DIM, Expected, Trap, WithABlock, body, conv, each, linear, mlp, trap, two


class Decoded(nn.Module):
    """A layer of SAM's mask decoder: the queries read the keys, and the keys the queries, both with their positions."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.own, self.read, self.ff, self.back = mlp(), mlp(), mlp(), mlp()
        self.norm, self.norm_of_keys = nn.LayerNorm(DIM), nn.LayerNorm(DIM)

    def run(self, q: Tensor, k: Tensor, p: Tensor, add: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        q = self.own(q) if self.first else add(q, self.own(q + p))
        q = self.norm(q)
        q = add(q, self.read(q + p) * k.mean(1, keepdim=True))
        q = self.norm(add(q, self.ff(q)))
        k = self.norm_of_keys(add(k, self.back((q + p).mean(1, keepdim=True) * k)))
        return q, k

    def forward(self, q: Tensor, k: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        q = self.own(q) if self.first else q + self.own(q + p)
        q = self.norm(q)
        q = q + self.read(q + p) * k.mean(1, keepdim=True)
        q = self.norm(q + self.ff(q))
        k = self.norm_of_keys(k + self.back((q + p).mean(1, keepdim=True) * k))
        return q, k


@trap
class TheStateIsThePosition(Trap):
    """SAM: what the queries begin with is added to them again in each branch, as their position."""

    expected = (
        *(Expected("layers.0:0", depth=6), Expected("layers.0:1", depth=6), Expected("layers.0:2", depth=2)),
        *(Expected("layers.1:0", depth=6), Expected("layers.1:1", depth=6), Expected("layers.1:2", depth=6)),
        *(Expected("layers.1:3", depth=2), Expected(depth=6)),
    )

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList((Decoded(True), Decoded(False)))
        self.last = mlp()

    def inputs(self) -> tuple[Any, ...]:
        return torch.randn(2, 5, DIM), torch.randn(2, 7, DIM)

    def forward(self, p: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q = p
        for layer in self.layers:
            q, k = layer(q, k, p)
        q = q + self.last(q + p) * k.mean(1, keepdim=True)
        return q, k

    def reference(self, p: Tensor, k: Tensor, *, h: Sequence[float]) -> tuple[Tensor, Tensor]:
        factors, q = iter(h), p
        for layer in self.layers:
            q, k = layer.run(q, k, p, lambda s, f: s + next(factors) * f)
        return q + next(factors) * self.last(q + p) * k.mean(1, keepdim=True), k


@trap
class OneStepOfRungeKutta(Trap):
    """Its stages begin at the state that the step is added to: they belong to the step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.f, self.head = linear(), mlp(), linear()

    def slope(self, x: Tensor) -> Tensor:
        k1 = self.f(x)
        k2 = self.f(x + 0.5 * k1)
        k3 = self.f(x + 0.5 * k2)
        k4 = self.f(x + k3)
        return (k1 + 2 * k2 + 2 * k3 + k4) / 6

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.slope(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.stem(x)
        return self.head(x + h[0] * self.slope(x))


@trap
class ShiftBehindAMap(Trap):
    """Glow: one convolution mixes the halves, one of which is then shifted by a map of the other, which stays."""

    shape = (2, 2 * DIM, 4, 4)
    expected = each("block")

    def __init__(self) -> None:
        super().__init__()
        self.block = ImageBlock()
        self.mix, self.f = nn.Conv2d(2 * DIM, 2 * DIM, 1, bias=False), conv()

    def flow(self, x: Tensor) -> Tensor:
        a, b = (2 * self.mix(x) + 1).chunk(2, dim=1)
        return torch.cat((a, b + self.f(torch.tanh(a))), dim=1).unflatten(1, (2, DIM)).amax(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.flow(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(self.flow(x), h[0])


class ImageBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = body()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)

    def reference(self, x: Tensor, h: float) -> Tensor:
        return x + h * self.f(x)


@trap
class EvenAndOddPlaces(WithABlock):
    """Polyphase resampling of what a layer gave: a part of the places is no feature of its own."""

    shape = (2, 10, DIM)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.filter = nn.Conv1d(10, 10, 3, padding=1), nn.Conv1d(10, 10, 3, padding=1)

    def halved(self, x: Tensor) -> Tensor:
        x = self.first(torch.cat((x, x), dim=-1))
        return x[..., ::2] + self.filter(x[..., 1::2])

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.halved(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(self.halved(x), h[0])


@trap
class PooledContext(Trap):
    """BiSeNet: a context that was pooled and sized up again is no shortcut of what it is added to."""

    shape = (2, DIM, 8, 8)
    expected = each("block")

    def __init__(self) -> None:
        super().__init__()
        self.block, self.context, self.refined, self.attention = ImageBlock(), conv(1), conv(), conv(1)

    def fused(self, x: Tensor) -> Tensor:
        context = F.interpolate(torch.relu(self.context(F.avg_pool2d(x, 8))), scale_factor=8.0)
        refined = torch.relu(self.refined(x))
        return context + refined * torch.sigmoid(self.attention(F.avg_pool2d(refined, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.fused(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(self.fused(x), h[0])


@trap
class JoinedTwice(Trap):
    """Emformer: both parts are joined where they are normed, and once more where the branch is added."""

    expected = two()

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.ff = nn.LayerNorm(DIM), mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, :2], x[:, 2:]
        normed = self.norm(torch.cat([a, b], dim=1))
        a_normed, b_normed = normed[:, :2], normed[:, 2:]
        y = self.mix(torch.cat([a_normed, b_normed], dim=1)) + torch.cat([a, b], dim=1)
        return y + self.ff(y)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        y = h[0] * self.mix(self.norm(x)) + x
        return y + h[1] * self.ff(y)


@trap
class BehindVmap(WithABlock):
    """What vmap gives has one axis more than what ran inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(torch.func.vmap(self.a)(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(self.a(x), h[0])


@trap
class ABlockUnderVmap(WithABlock):
    """The step is made inside, of one sample after the other, and another one behind it."""

    expected = (Expected(depth=2), Expected("block", depth=2))

    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(torch.func.vmap(self.added)(x))

    def added(self, x: Tensor) -> Tensor:
        return x + self.a(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(x + h[0] * self.a(x), h[1])


@trap
class MeanOfUnequalParts(WithABlock):
    """The mean of what was joined of a channel and of more is no sum of the two."""

    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def scaled(self, x: Tensor) -> Tensor:
        y = x[..., :1]
        return x * torch.cat((y, self.a(y.expand_as(x))), dim=-1).mean(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.scaled(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(self.scaled(x), h[0])


class Talking(nn.Module):
    """Attention whose scores are mixed over the heads twice, by a residual each time, and masked."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = linear(), linear(), linear(), linear()
        self.talk, self.again = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, DIM // 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2)
        scores = scores + self.talk(scores)
        scores = scores + self.again(scores)
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = self.drop(scores.masked_fill(later, -1e4).softmax(-1))
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class LocalResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return x + self.b(x)


class ResidualInAGate(LocalResidual):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(super().forward(x))


class Around(Trap):
    """A block that stands alone, and what its branch consists of."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.body(x)


@trap
class ScoresBesideALocalResidual(Around):
    """Sums of scores make no stream, and do not count beside another sum: the block is one step."""

    def __init__(self) -> None:
        super().__init__(linear(), Talking(), LocalResidual())


@trap
class ScoresOfTwoAttentions(Around):
    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(DIM), Talking(), nn.LayerNorm(DIM), Talking())


@trap
class AGateBesideALocalResidual(Around):
    def __init__(self) -> None:
        super().__init__(linear(), ResidualInAGate(), nn.GELU(), LocalResidual(), nn.ReLU())


@trap
class SquashedResidualsAreNoGates(Around):
    """Blocks that end in a tanh, far apart, in a network around which its input is added: these are the steps."""

    expected = each("body.0", "body.2")
    long = ("<root>",)

    class Block(LocalResidual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

        def reference(self, x: Tensor, h: float) -> Tensor:
            x = self.a(x)
            return (x + h * self.b(x)).tanh()

    def __init__(self) -> None:
        super().__init__(self.Block(), mlp(), self.Block(), linear())

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        first, middle, second, last = self.body
        y = last(second.reference(middle(first.reference(x, h[0])), h[1]))
        return x + (h[2] if len(h) > 2 else 1.0) * y


class Mixing(nn.Module):
    """A layer whose branch reads the state with the network's first state mixed in (value and embedding residuals)."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = nn.Parameter(torch.tensor([0.75, 0.5]))
        self.norm, self.a, self.b = nn.LayerNorm(DIM), mlp(), mlp()

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        mixed = self.shares[0] * x + self.shares[1] * first
        x = x + 0.5 * self.a(self.norm(mixed))
        return x + 0.5 * self.b(x)

    def reference(self, x: Tensor, first: Tensor, h: Sequence[float]) -> Tensor:
        x = x + h[0] * 0.5 * self.a(self.norm(self.shares[0] * x + self.shares[1] * first))
        return x + h[1] * 0.5 * self.b(x)


@trap
class TheFirstStateIsMixedIntoBranches(Trap):
    """NeoMME: a multiple of the stream and one of where it began are summed, for a branch alone."""

    expected = (*two("layers.0", 6), *two("layers.1", 6), *two("layers.2", 6))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = linear(), nn.ModuleList(Mixing() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.stem(x)
        for layer in self.layers:
            x = layer(x, first)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = first = self.stem(x)
        for i, layer in enumerate(self.layers):
            x = layer.reference(x, first, h[2 * i : 2 * i + 2])
        return x


@trap
class ABranchOfTheDetachedState(Trap):
    """The branch is trained, and hands no gradient on to what the state came from."""

    expected = each("<root>:0", "<root>:1")

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.a, self.b = linear(), nn.LayerNorm(DIM), mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.a(x.detach())
        return x + self.b(self.norm(x).detach())

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.stem(x)
        x = x + h[0] * self.a(x.detach())
        return x + h[1] * self.b(self.norm(x).detach())


@trap
class ADetachedStateBesideItsBranch(Trap):
    """Each block is trained by itself, and hands on no gradient through its skip."""

    expected = each("<root>:0", "<root>:1")

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.a, self.b = linear(), nn.LayerNorm(DIM), mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x.detach() + self.a(x)
        return self.b(self.norm(x)) + x.detach()

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.stem(x)
        x = x.detach() + h[0] * self.a(x)
        return h[1] * self.b(self.norm(x)) + x.detach()


@trap
class StraightThrough(WithABlock):
    """Another value, and the gradient of this one: as codes are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + ((x @ self.codes).round() - x).detach())

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(x + ((x @ self.codes).round() - x).detach(), h[0])
