"""Steps without an addition to rewrite: the expression that gives the sum becomes s + h * (sum - s)."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.traps.base import DIM, PROJECTION, Expected, Form, Trap, each, linear, mlp, trap, two


@trap
class SumOfATuple(Form):
    """The builtin ``sum``, which begins with ``0 + x``."""

    def forward(self, x: Tensor) -> Tensor:
        return sum((x, self.a(x)))  # type: ignore[return-value]


@trap
class SumOfAMappedSkip(Trap):
    """The skip has no name: it is the first entry of the list."""

    expected = PROJECTION

    def __init__(self) -> None:
        super().__init__()
        self.a, self.p = mlp(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(sum([self.p(x), self.a(x)]))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return torch.relu(self.p(x) + h[0] * self.a(x))


@trap
class Reduced(Form):
    """``functools.reduce`` with ``operator.add``."""

    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(operator.add, (x, self.a(x)))


@trap
class SumOfAStack(Form):
    """Skip and branch are stacked, and summed over the stack."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack((x, self.a(x))).sum(0)


@trap
class SumOfAStackInADeeperExpression(Trap):
    """The skip is made in the expression itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sum(torch.stack([x.view(*x.shape), self.a(x)], dim=-1), dim=-1) * 2

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return (x + h[0] * self.a(x)) * 2


@trap
class Addcmul(Trap):
    """A fused product and sum."""

    autocast = False  # which it does not take operands of two dtypes under

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gamma = mlp(), nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, self.a(x), self.gamma, value=0.5)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * 0.5 * self.a(x) * self.gamma


@trap
class SubtractedTheOtherWayRound(Form):
    """The state is the second argument."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.rsub(self.a(x), x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x - h[0] * self.a(x)


@trap
class ReducedIntoPlaces(Form):
    """As tokens that were routed come back."""

    autocast = False  # as above

    def forward(self, x: Tensor) -> Tensor:
        places = torch.tensor([0, 2, 3], device=x.device)[None, :, None].expand(x.shape[0], -1, DIM)
        return x.scatter_reduce(1, places, self.a(x.gather(1, places)), reduce="sum")

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        branch = torch.zeros_like(x).index_add(1, torch.tensor([0, 2, 3]), self.a(x[:, [0, 2, 3]]))
        return x + h[0] * branch


@trap
class IndexAdd(Trap):
    """As in DINOv2's training, where the branch is given a part of the batch."""

    autocast = False  # as above

    def __init__(self) -> None:
        super().__init__()
        self.a = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return add_to_a_part(x, self.a)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return torch.cat((x[:1] + h[0] * 2 * self.a(x[:1]), x[1:]))


def add_to_a_part(x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
    flat = x.flatten(1)
    part = branch(x[:1]).flatten(1)
    return torch.index_add(flat, 0, torch.arange(1, device=x.device), part, alpha=2.0).view_as(x)


def plain_sum(x: Tensor, y: Tensor) -> Tensor:
    return x + y


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    scripted_sum = torch.jit.script(plain_sum)


@trap
class ScriptedSum(Form):
    """The addition is compiled by TorchScript, and has no frame."""

    def forward(self, x: Tensor) -> Tensor:
        return scripted_sum(x, self.a(x))


@trap
class LambdaInAnAttribute(Form):
    """A lambda is an expression: there is no statement to rewrite."""

    def __init__(self) -> None:
        super().__init__()
        self.add: Callable[[Tensor, nn.Module], Tensor] = lambda x, f: x + f(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.a)


@trap
class LambdasInADict(Form):
    """One of several, chosen by a key."""

    def __init__(self) -> None:
        super().__init__()
        self.ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "plus": lambda x, y: x + y,
            "minus": lambda x, y: x - y,
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.ways["plus"](x, self.a(x))


@trap
class OneMethodForAStepAndForPositions(Form):
    """The method adds a residual here and positions there: the call of it tells them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(2, 5, DIM))

    def plus(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def forward(self, x: Tensor) -> Tensor:
        x = self.plus(x, self.position)
        return self.plus(x, self.a(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = x + self.position
        return x + h[0] * self.a(x)


class ByHand(torch.autograd.Function):
    """A sum with a backward of its own, which keeps no activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, grad


@trap
class InAnAutogradFunction(Form):
    """The addition is in the forward of an autograd function, whose backward does not know of h."""

    def forward(self, x: Tensor) -> Tensor:
        return ByHand.apply(x, self.a(x))  # type: ignore[no-untyped-call]


@trap
class InAnAutogradFunctionThatIsRunAgain(Trap):
    """A checkpoint around the function runs its forward again, which is no backward that knows of h."""

    expected = two()

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp(), mlp()
        self.plus = self.added

    def added(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch

    def both(self, x: Tensor) -> Tensor:
        x = ByHand.apply(x, self.a(x))  # type: ignore[no-untyped-call]
        return self.plus(x, self.b(x))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.both, x, use_reentrant=False) if self.training else self.both(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = x + h[0] * self.a(x)
        return x + h[1] * self.b(x)


class Rerun(torch.autograd.Function):
    """A checkpoint as in OpenAI's guided-diffusion: the backward runs the function again."""

    @staticmethod
    def forward(ctx: Any, run: Any, n: int, *args: Tensor) -> Any:
        ctx.run, ctx.inputs, ctx.parameters = run, args[:n], args[n:]
        with torch.no_grad():
            return run(*ctx.inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # type: ignore[override]
        inputs = [x.detach().requires_grad_() for x in ctx.inputs]
        with torch.enable_grad():
            output = ctx.run(*inputs)
        found = torch.autograd.grad(output, (*inputs, *ctx.parameters), gradients, allow_unused=True)
        return (None, None, *found)


@trap
class RunAgainInItsBackward(Trap):
    """Two sums in a function of which the backward runs it again: each is a step."""

    expected = two()
    autocast = False  # its backward runs outside of autocast

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return Rerun.apply(self.both, 1, x, *self.parameters())  # type: ignore[no-untyped-call, no-any-return]

    def both(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return (x + self.b(x)) / 2

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = x + h[0] * self.a(x)
        return (x + h[1] * self.b(x)) / 2


@trap
class SumsInALoop(Trap):
    """One ``sum`` for every layer, each with an h of its own."""

    expected = each("layers.0", "layers.1", "layers.2")
    keyed = True

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = sum((x, layer(x)))  # type: ignore[assignment]
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, layer in zip(h, self.layers, strict=True):
            x = x + factor * layer(x)
        return x


@trap
class PartOfTheWay(Trap):
    """``lerp`` by a number: x + h * 0.25 * (a(x) - x)."""

    autocast = False  # operands of two dtypes

    def __init__(self) -> None:
        super().__init__()
        self.a = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.a(x), 0.25)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * 0.25 * (self.a(x) - x)


@trap
class PartOfTheWayFromTheCandidate(Trap):
    """The same, written from the other end."""

    def __init__(self) -> None:
        super().__init__()
        self.a = mlp()

    def forward(self, x: Tensor) -> Tensor:
        n = self.a(x)
        return n + 0.75 * (x - n)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        n = self.a(x)
        return x + h[0] * (n + 0.75 * (x - n) - x)


@trap
class ByDifferenceAndByName(Trap):
    """Both ways in one method."""

    expected = (Expected("<root>:0", depth=2), Expected("<root>:1", depth=2))

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = sum((x, self.a(x)))  # type: ignore[assignment]
        return self.b(x) + x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = x + h[0] * self.a(x)
        return x + h[1] * self.b(x)
