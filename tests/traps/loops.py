"""One line of a loop that adds for every layer: each layer is a step of its own, named by what made its branch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.traps.base import DIM, Block, Expected, Trap, each, linear, mlp, trap


class PreNorm(nn.Module):
    """A norm and the layer behind it."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(DIM), f

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.f(self.norm(x if context is None else x + context))


@trap
class TransformerLoop(Trap):
    """Pairs of layers without a class of their own (vit-pytorch)."""

    keyed = True
    expected = each(*(f"layers.{i}.{j}" for i in range(3) for j in range(2)))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([PreNorm(linear()), PreNorm(mlp())]) for _ in range(3))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        for attn, ff in self.layers:  # type: ignore[misc, has-type]
            x = attn(x) + x  # type: ignore[has-type]
            x = ff(x) + x  # type: ignore[has-type]
        return self.norm(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        factors = iter(h)
        for pair in self.layers:
            for layer in pair.children():
                x = x + next(factors) * layer(x)
        return self.norm(x)


@trap
class LoopOverNumbers(Trap):
    """The layer is fetched by its number, its branch kept in a variable, and dropped in training."""

    keyed = True
    expected = each(*(f"blocks.{i}" for i in range(3)))

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.drop = nn.ModuleList(linear() for _ in range(3)), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        i = 0
        while i < len(self.blocks):
            branch = self.blocks[i](torch.relu(x))
            x = self.drop(branch).add(x)
            i += 1
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, block in zip(h, self.blocks, strict=True):
            x = x + factor * self.drop(block(torch.relu(x)))
        return x


@trap
class LoopOfTwoConvolutions(Trap):
    """HiFi-GAN: two lists run through together; the second of each pair makes the branch."""

    keyed = True
    expected = each("second.0", "second.1")
    shape = (2, DIM, 6)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Conv1d(DIM, DIM, 3, padding=d, dilation=d) for d in (1, 2))
        self.second = nn.ModuleList(nn.Conv1d(DIM, DIM, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for c1, c2 in zip(self.first, self.second, strict=True):
            xt = c1(nn.functional.leaky_relu(x, 0.1))
            xt = c2(nn.functional.leaky_relu(xt, 0.1))
            x = xt + x
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, c1, c2 in zip(h, self.first, self.second, strict=True):
            x = x + factor * c2(nn.functional.leaky_relu(c1(nn.functional.leaky_relu(x, 0.1)), 0.1))
        return x


@trap
class LoopWithAnOtherHalf(Trap):
    """The same layer is called in both halves of an `if`, of which a run takes one."""

    keyed = True
    expected = each("layers.0", "layers.1")

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PreNorm(mlp()) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            if context is None:  # noqa: SIM108 (two statements is what is tested)
                y = layer(x)
            else:
                y = layer(x, context=context)
            x = x + y
        return x

    def reference(self, x: Tensor, context: Tensor | None = None, *, h: Sequence[float]) -> Tensor:
        for factor, layer in zip(h, self.layers, strict=True):
            x = x + factor * layer(x, context)
        return x


@trap
class LoopOverTheSame(Trap):
    """ALBERT in groups: a layer that runs three times is one step, two of them are two."""

    keyed = True
    expected = (Expected("groups.0", calls=3, depth=6), Expected("groups.1", calls=3, depth=6))

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.ModuleList(PreNorm(mlp()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(6):
            x = x + self.groups[i // 3](x)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for i in range(6):
            x = x + h[i // 3] * self.groups[i // 3](x)
        return x


@trap
class LoopTwice(Trap):
    """The same layers in two loops of one forward: two steps each."""

    keyed = True
    expected = tuple(Expected(f"f.{i}:{j}", depth=4) for j in range(2) for i in range(2))

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(linear() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for f in self.f:
            x = torch.add(x, torch.tanh(f(x)))
        for f in self.f:
            x = x - torch.sin(f(x))
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        factors = iter(h)
        for f in self.f:
            x = x + next(factors) * torch.tanh(f(x))
        for f in self.f:
            x = x - next(factors) * torch.sin(f(x))
        return x


@trap
class LoopWithoutModules(Trap):
    """The branch is made by no module: one step, which runs for each of the weights."""

    expected = (Expected(calls=3, depth=3),)

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(DIM, DIM)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x + torch.tanh(x @ weight)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for weight in self.weights:
            x = x + h[0] * torch.tanh(x @ weight)
        return x


@trap
class LoopInAComprehension(Trap):
    """What a comprehension runs over cannot set a variable, what it computes can."""

    keyed = True
    expected = each("heads.0", "heads.1", depth=1)

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(PreNorm(linear()) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple([x + head(x) for head in self.heads])

    def reference(self, x: Tensor, *, h: Sequence[float]) -> tuple[Tensor, ...]:
        return tuple([x + factor * head(x) for factor, head in zip(h, self.heads, strict=True)])


class OfTwo(nn.Module):
    """What a parent calls by a method, past the module's own call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(DIM), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.norm(x))


@trap
class LoopOverForwards(Trap):
    """HoVerNet: `layer.forward(x)` is no call of the layer, whose parts are called one by one."""

    keyed = True
    expected = each("layers.0", "layers.1", "last")

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last = nn.Sequential(OfTwo(), OfTwo()), OfTwo()

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.last):
            y = layer.forward(x)
            x = x + y
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, layer in zip(h, (*self.layers, self.last), strict=True):
            x = x + factor * layer(x)
        return x


@trap
class LoopOverMethods(Trap):
    """A method of another name, of a layer that is fetched by its number; its last part does nothing in eval mode."""

    keyed = True
    expected = each("layers.0", "layers.1")

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.drop = mlp(), nn.Dropout(0.3)

        def branch(self, x: Tensor) -> Tensor:
            return self.drop(self.f(x))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for i in range(len(self.layers)):
            x += self.layers[i].branch(torch.relu(x))  # type: ignore[operator]
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, layer in zip(h, self.layers, strict=True):
            x = x + factor * layer.branch(torch.relu(x))  # type: ignore[operator]
        return x


def apply(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


@trap
class LoopOverAFunction(Trap):
    """A function that is handed the layer is no method of it: one step for all."""

    expected = (Expected(calls=2, depth=2),)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PreNorm(mlp()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + apply(layer, x)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for layer in self.layers:
            x = x + h[0] * layer(x)
        return x


@trap
class Leapfrog(Trap):
    """``2 x - x_before + f(x)``: the skip is made of the states of two moments (Chang et al., 2018)."""

    keyed = True
    expected = each("layers.0", "layers.1", "layers.2")

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        before = x
        for layer in self.layers:
            x, before = 2 * x - before + layer(x), x
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        before = x
        for factor, layer in zip(h, self.layers, strict=True):
            x, before = 2 * x - before + factor * layer(x), x
        return x


@trap
class SumOfTwoIsNoState(Trap):
    """A sum of siblings that a map of one of them is added to: it belongs to the branch around it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = linear(), linear(), linear()

    def branch(self, x: Tensor) -> Tensor:
        one = torch.relu(self.a(x))
        return one + self.b(x) + self.c(one)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.branch(x)


@trap
class SkipsThatOneLoopAdds(Trap):
    """A graph U-Net: one line adds all skips, the inner ones in the branches of the outer, so it is long."""

    expected = (Expected("block"),)
    long = ("<root>",)

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.down = nn.ModuleList(linear() for _ in range(3))
        self.up = nn.ModuleList(linear() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        skips = [x := torch.relu(down(x)) for down in self.down]
        for skip, up in zip(skips[-2::-1], self.up, strict=True):
            x = torch.tanh(up(skip + x))
        return self.block(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        skips = [x := torch.relu(down(x)) for down in self.down]
        for skip, up in zip(skips[-2::-1], self.up, strict=True):
            x = torch.tanh(up(skip + (h[1] if len(h) > 1 else 1.0) * x))
        return self.block.reference(x, h[0])
