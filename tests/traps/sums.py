"""What is not a step: sums of siblings, of resolutions, and of what accumulates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.traps.base import DIM, Expected, Trap, WithABlock, body, conv, each, linear, mlp, trap, two


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
class SkipOfZero(WithABlock):
    """``0 * x + f(x)``: without a skip."""

    residual = False

    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.residual * x + self.a(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(self.a(x), h[0])


@trap
class TwoCallsOfABlock(WithABlock):
    """The results of one block for two inputs are siblings (Siamese networks)."""

    expected = (Expected("block", calls=2),)

    def forward(self, x: Tensor) -> Tensor:
        return (self.block(x) - self.block(x.flip(1))).abs()

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return (self.block.reference(x, h[0]) - self.block.reference(x.flip(1), h[0])).abs()


@trap
class BlockOfAConstant(WithABlock):
    """One block is one function, of what is given and of a constant (Chronos-2: future covariates are zeros)."""

    expected = (Expected("block", calls=2),)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.block(x), self.block(torch.zeros_like(x))], dim=1)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return torch.cat([self.block.reference(x, h[0]), self.block.reference(torch.zeros_like(x), h[0])], dim=1)


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
    """A pooled context that is added to every pixel: the branch is broadcast to the state's shape."""

    expected = (Expected(depth=2), Expected("block", depth=2))

    def __init__(self) -> None:
        super().__init__()
        self.context = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + self.context(x.mean(1, keepdim=True)))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(x + h[0] * self.context(x.mean(1, keepdim=True)), h[1])


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


@trap
class WeightedVariance(WithABlock):
    """Attentive statistics of ECAPA-TDNN: what is left without a mean, whose weights are computed, is squared."""

    def __init__(self) -> None:
        super().__init__()
        self.score = mlp()

    def variance(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.score(x), dim=1)
        mean = (weights * x).sum(dim=1, keepdim=True)
        return (weights * (x - mean).pow(2)).sum(dim=1, keepdim=True).clamp(1e-6).sqrt() * torch.ones_like(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.variance(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(self.variance(x), h[0])


@trap
class PowerSeriesOfAWeight(WithABlock):
    """As PEFT's OFT turns a parameter into a rotation: sums of powers of a weight have nothing to do with the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(DIM, DIM))

    def rotation(self) -> Tensor:
        skew = 0.1 * (self.weight - self.weight.t())
        result = torch.eye(DIM, dtype=skew.dtype).add(skew, alpha=2.0)
        power = skew @ skew
        result.add_(power, alpha=2.0)
        for _ in range(2):
            power = power @ skew
            result.add_(power, alpha=2.0)
        return result

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x @ self.rotation())

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(x @ self.rotation(), h[0])


@trap
class ResponseNormBehindASeparableConvolution(Trap):
    """The same gate where what it takes is a depthwise convolution, a norm and a linear map away from the state."""

    shape = (2, DIM, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM), nn.LayerNorm(DIM)
        self.a, self.b, self.scale = nn.Linear(DIM, 16), nn.Linear(16, DIM), nn.Parameter(torch.randn(16))

    def branch(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(self.norm(self.depthwise(x).permute(0, 2, 3, 1))))
        size = y.norm(dim=(1, 2), keepdim=True)
        y = y + self.scale * (y * (size / size.mean(-1, keepdim=True)))
        return self.b(y).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.branch(x)


@trap
class ACandidateIsNoProjection(WithABlock):
    """``tanh(W y + U (r * x))``, where ``y`` comes to the second map through the gate ``r`` alone (GTrXL)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.w, self.u, self.wr, self.ur = (linear() for _ in range(5))

    def candidate(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        r = torch.sigmoid(self.wr(y) + self.ur(x))
        return torch.tanh(self.w(y) + self.u(r * x)) * y

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.candidate(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(self.candidate(x), h[0])
