"""Branches and skips that are written otherwise: products by hand, parts, joins, running sums, several branches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.traps.base import DIM, PROJECTION, Expected, Form, Trap, each, linear, mlp, trap, two
from tests.traps.nested import HandNorm


@trap
class SumOfAJoin(Form):
    """Skip and branch get one more axis, and are joined along it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x[None], self.a(x).unsqueeze(0))).sum(0)


@trap
class MixedWithAMappedSkip(Trap):
    """EDM2: ``lerp`` of a projected skip and a branch."""

    expected = PROJECTION
    autocast = False  # operands of two dtypes

    def __init__(self) -> None:
        super().__init__()
        self.p, self.a = linear(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        skip = self.p(x)
        return torch.lerp(skip, self.a(x), 0.25)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.p(x) + h[0] * 0.25 * (self.a(x) - self.p(x))


class TwoBranches(Trap):
    expected = (Expected(kind="parallel", places=2),)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(DIM), mlp(), mlp()


@trap
class TwoBranchesOfANormBesideAMultiple(TwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return 0.5 * x + self.a(y) + self.b(y)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        y = self.norm(x)
        return 0.5 * x + h[0] * (self.a(y) + self.b(y))


@trap
class TheSecondBranchBehindAMultiple(TwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        y = 0.75 * (x + self.a(x))
        return y + self.b(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        y = 0.75 * (x + h[0] * self.a(x))
        return y + h[0] * self.b(x)


@trap
class BranchesInALoopFromZero(Trap):
    """The first of them is the state itself: nothing is added to a state there."""

    expected = (Expected(kind="parallel", places=1),)

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList((nn.Identity(), mlp(), mlp()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor | int = 0
        for branch in self.branches:
            y = y + branch(x)
        return torch.relu(y)  # type: ignore[arg-type]

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return torch.relu(x + h[0] * self.branches[1](x) + h[0] * self.branches[2](x))


@trap
class ALinearMapBesideARecurrentLayer(Trap):
    """DeepSleepNet: a recurrent layer is deeper than a linear one."""

    expected = PROJECTION

    def __init__(self) -> None:
        super().__init__()
        self.p, self.a = linear(), nn.LSTM(DIM, DIM // 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.p(x) + self.a(x)[0]

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.p(x) + h[0] * self.a(x)[0]


@trap
class APlanarFlow(Trap):
    """The product with a vector is written as a product and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.w = nn.Parameter(torch.randn(DIM)), nn.Parameter(torch.randn(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.u * torch.tanh((self.w * x).sum(-1, keepdim=True))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.u * torch.tanh((x @ self.w)[..., None])


@trap
class AMemoryReadByHand(Trap):
    """MemN2N: the scores and what is read are products and sums."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Parameter(torch.randn(3, DIM)), nn.Parameter(torch.randn(3, DIM))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.softmax((self.keys * x.unsqueeze(-2)).sum(-1), -1)
        return x + (scores.unsqueeze(-1) * self.values).sum(-2)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * torch.softmax(x @ self.keys.mT, -1) @ self.values


@trap
class TheBranchIsAddedOneTurnLater(Trap):
    """As kernels that add and norm at once want it: the layer's output waits for the next turn of the loop."""

    expected = each("layers.0", "layers.1")
    keyed = True

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layers = nn.LayerNorm(DIM), nn.ModuleList(mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        waits = None
        for layer in self.layers:
            if waits is not None:
                x = x + waits
            waits = layer(self.norm(x))
        return torch.cat((x, waits), -1)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, layer in zip(h, self.layers, strict=False):
            x = x + factor * layer(self.norm(x))
        return torch.cat((x, self.layers[2](self.norm(x))), -1)


@trap
class LowRankUpdatesEverywhere(Trap):
    """LoRA: the sum of a map and its update is one map, at the stem, in the shortcut and in the branch."""

    expected = (Expected(kind="projection"),)

    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.down, self.up = linear(), nn.Linear(DIM, 2, bias=False), nn.Linear(2, DIM, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.base(x)
            return y + self.up(self.down(x)) * 2.0

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shortcut, self.a, self.b, self.head = (self.Lora() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(self.shortcut(x) + self.b(torch.relu(self.a(x))))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(self.shortcut(x) + h[0] * self.b(torch.relu(self.a(x))))


@trap
class SkipAndBranchAreRounded(Trap):
    """As where a network is trained for integers; and masked."""

    expected = each("<root>:0", "<root>:1")

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        mask = x.new_zeros(x.shape[1], 1, dtype=torch.bool)
        y = x.nan_to_num() + self.a(x)
        return y.masked_fill(mask, 0.0) + self.b(y).masked_fill(mask, 0.0)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        y = x + h[0] * self.a(x)
        return y + h[1] * self.b(y)


@trap
class ACopiedSkipBesideALinearBranch(Trap):
    """The copy and the map of it are no two maps of what the stem was given; behind them a norm written by hand."""

    expected = two()

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.norm = linear(), linear(), mlp(), HandNorm()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x.clone()
        y -= self.a(x)
        x = self.norm(y)
        return torch.tanh(x) + self.b(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.stem(x)
        x = self.norm(x - h[0] * self.a(x))
        return torch.tanh(x) + h[1] * self.b(x)
