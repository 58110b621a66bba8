"""Gated updates in every spelling, `s + h * (what it was - s)`, with recurrences, highways, cells and blocks around."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tests.traps.base import DIM, linear

# Each takes the state, the candidate and the gate, and goes from the first to the second by `1 - z`.
SPELLINGS: dict[str, type[nn.Module]] = {}


def spelling(cls: type[nn.Module]) -> type[nn.Module]:
    SPELLINGS[cls.__name__] = cls
    return cls


class Recurrent(nn.Module):
    """A GRU by hand, whose update a subclass spells."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.r, self.o = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, 3 * DIM), linear()

    def parts(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        given, state = self.i(x).chunk(3, -1), self.r(s).chunk(3, -1)
        z, r = torch.sigmoid(given[0] + state[0]), torch.sigmoid(given[1] + state[1])
        return z, torch.tanh(given[2] + r * state[2])

    def run(self, x: Tensor, update: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        s, out = x.new_zeros(x.shape[0], DIM), []
        for t in range(x.shape[1]):
            z, n = self.parts(x[:, t], s)
            s = update(s, n, z)
            out.append(s)
        return self.o(torch.stack(out, 1))

    def update(self, s: Tensor, n: Tensor, z: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.update)

    def reference(self, x: Tensor, h: float) -> Tensor:
        return self.run(x, lambda s, n, z: s + h * (self.update(s, n, z) - s))


@spelling
class Mix(Recurrent):
    def update(self, s: Tensor, n: Tensor, z: Tensor) -> Tensor:
        return (1 - z) * n + z * s


@spelling
class MixInAnotherOrder(Recurrent):
    def update(self, s: Tensor, n: Tensor, z: Tensor) -> Tensor:
        return s * z + n * (1.0 - z)


@spelling
class MixByMethods(Recurrent):
    def update(self, s: Tensor, n: Tensor, z: Tensor) -> Tensor:
        return z.mul(s).add(torch.mul(torch.ones_like(z) - z, n))


@spelling
class MixByAddcmul(Recurrent):
    def update(self, s: Tensor, n: Tensor, z: Tensor) -> Tensor:
        return torch.addcmul((1 - z) * n, z, s)


@spelling
class FromTheState(Recurrent):
    def update(self, s: Tensor, n: Tensor, z: Tensor) -> Tensor:
        return s + (1 - z) * (n - s)


@spelling
class FromTheStateSubtracted(Recurrent):
    def update(self, s: Tensor, n: Tensor, z: Tensor) -> Tensor:
        return s - (1 - z) * (s - n)


@spelling
class FromTheStateByAddcmul(Recurrent):
    def update(self, s: Tensor, n: Tensor, z: Tensor) -> Tensor:
        return torch.addcmul(s, 1 - z, n - s)


@spelling
class FromTheCandidate(Recurrent):
    def update(self, s: Tensor, n: Tensor, z: Tensor) -> Tensor:
        return n + z * (s - n)


@spelling
class FromTheCandidateSubtracted(Recurrent):
    def update(self, s: Tensor, n: Tensor, z: Tensor) -> Tensor:
        return n - (n - s) * z


@spelling
class ProductFirst(Recurrent):
    def update(self, s: Tensor, n: Tensor, z: Tensor) -> Tensor:
        return (s - n) * z + n


@spelling
class InPlaceOfTheCandidate(Recurrent):
    def update(self, s: Tensor, n: Tensor, z: Tensor) -> Tensor:
        n = n.clone()
        n += z * (s - n)
        return n


@spelling
class InPlaceOfTheProduct(Recurrent):
    def update(self, s: Tensor, n: Tensor, z: Tensor) -> Tensor:
        new = z * s
        new += (1 - z) * n
        return new


@spelling
class Lerp(Recurrent):
    def update(self, s: Tensor, n: Tensor, z: Tensor) -> Tensor:
        return torch.lerp(n, s, z)


@spelling
class LerpMethod(Recurrent):
    def update(self, s: Tensor, n: Tensor, z: Tensor) -> Tensor:
        return s.lerp(n, weight=1 - z)


def mix(s: Tensor, n: Tensor, z: Tensor) -> Tensor:
    return (1 - z) * n + z * s


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    scripted = torch.jit.script(mix)


@spelling
class Scripted(Recurrent):
    def update(self, s: Tensor, n: Tensor, z: Tensor) -> Tensor:
        return scripted(s, n, z)


class Cell(nn.Module):
    """`nn.GRUCell` over time: the update is fused, and one step of the cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.o = nn.GRUCell(DIM, DIM), linear()

    def forward(self, x: Tensor) -> Tensor:
        s = x.new_zeros(x.shape[0], DIM)
        for t in range(x.shape[1]):
            s = self.cell(x[:, t], s)
        return self.o(s)

    def reference(self, x: Tensor, h: float) -> Tensor:
        s = x.new_zeros(x.shape[0], DIM)
        for t in range(x.shape[1]):
            s = s + h * (self.cell(x[:, t], s) - s)
        return self.o(s)


class Normalized(nn.Module):
    """nGPT: from the state on the sphere towards the block's output there, by a learned rate each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.alpha = nn.Sequential(linear(), nn.GELU(), linear()), nn.Parameter(torch.rand(DIM))

    def forward(self, x: Tensor) -> Tensor:
        before, after = self.on_sphere(x), self.on_sphere(self.f(x))
        return self.on_sphere(before + self.alpha.abs() * (after - before))

    @staticmethod
    def on_sphere(x: Tensor) -> Tensor:
        return x / x.norm(p=2, dim=-1, keepdim=True)

    def reference(self, x: Tensor, h: float) -> Tensor:
        before, after = self.on_sphere(x), self.on_sphere(self.f(x))
        return self.on_sphere(before + h * (self.alpha.abs() * (after - before)))


class Highway(nn.Module):
    """`t * F(x) + (1 - t) * x`, of Srivastava et al.; the gate may be a parameter."""

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        self.f, self.t = linear(), nn.Parameter(torch.rand(DIM)) if learned else linear()

    def update(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.t(x)) if isinstance(self.t, nn.Module) else self.t
        return t * torch.relu(self.f(x)) + (1 - t) * x

    def forward(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.t(x)) if isinstance(self.t, nn.Module) else self.t
        return t * torch.relu(self.f(x)) + (1 - t) * x

    def reference(self, x: Tensor, h: float) -> Tensor:
        return x + h * (self.update(x) - x)


class ByANumber(nn.Module):
    """A fixed part of the way is a step like any other."""

    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.f(x), 0.5)


class ResidualBesideGated(nn.Module):
    """A residual step, a highway, and a residual step around a GRU by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.highway, self.gru = linear(), Highway(), Mix()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        x = self.highway(x)
        return x + self.gru(x)

    def reference(self, x: Tensor, h: Sequence[float]) -> Tensor:
        x = x + h[0] * self.f(x)
        x = self.highway(x)
        return x + h[1] * self.gru(x)


class NoGates(nn.Module):
    """Sums of the same forms that are none: a mask, a fusion of siblings, a moving mean, a shift in time."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.t, self.out = linear(), linear(), linear(), linear()
        self.shift = nn.Parameter(torch.rand(DIM))

    def forward(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.t(x))
        fused = t * self.a(x) + (1 - t) * self.b(x)
        shifted = torch.roll(x, 1, 1)
        mixed = torch.lerp(x, shifted, self.shift)
        mean = torch.zeros_like(x[:, 0])
        for i in range(x.shape[1]):
            mean = torch.lerp(mean, x[:, i], 0.1)
        return self.out(torch.cat((fused, mixed, mean[:, None].expand_as(x)), -1)[..., :DIM])
