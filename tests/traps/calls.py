"""How the addition is reached: through free functions, scripts, checkpoints, several calls of one block."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.traps.base import DIM, Block, Expected, Form, Trap, each, linear, mlp, trap, two


def dropout_add(x: Tensor, residual: Tensor, p: float, training: bool) -> Tensor:
    return residual + F.dropout(x, p, training)


def add_outer(x: Tensor, residual: Tensor) -> Tensor:
    return add_inner(residual, x)


def add_inner(residual: Tensor, x: Tensor) -> Tensor:
    return residual + x


class operations:
    """A namespace of functions, reached by an attribute."""

    @staticmethod
    def add(residual: Tensor, x: Tensor) -> Tensor:
        return residual + x


@trap
class FreeFunction(Trap):
    """The addition is in a free function that several modules call, one of them not for a step (bloom, falcon)."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return dropout_add(self.a(x), x, 0.5, self.training)

    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(2, 5, DIM))

        def forward(self, x: Tensor) -> Tensor:
            return dropout_add(x, self.position, 0.5, self.training)

    expected = each("attention", "mlp")

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.attention, self.mlp = self.Embedding(), self.Part(), self.Part()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attention(self.embedding(x)))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.embedding.position + F.dropout(x, 0.5, self.training)
        x = x + h[0] * F.dropout(self.attention.a(x), 0.5, self.training)
        return x + h[1] * F.dropout(self.mlp.a(x), 0.5, self.training)


@trap
class FreeFunctionOfAFreeFunction(Form):
    """The addition is two calls away from the module."""

    def forward(self, x: Tensor) -> Tensor:
        return add_outer(self.a(x), x)


@trap
class FunctionOfANamespace(Form):
    """The function that adds is an attribute of something global."""

    def forward(self, x: Tensor) -> Tensor:
        return operations.add(x, self.a(x))


class Dense(nn.Module):
    """BERT's output module: the branch was begun by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = linear(), nn.LayerNorm(DIM)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.norm(self.dense(hidden) + residual)

    def reference(self, hidden: Tensor, residual: Tensor, h: float) -> Tensor:
        return self.norm(residual + h * self.dense(hidden))


@trap
class BranchBegunByTheCaller(Trap):
    """BERT: the skip and the branch come in as two arguments."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.attention_output = linear(), Dense()
            self.intermediate, self.output = nn.Sequential(linear(), nn.GELU()), Dense()

        def forward(self, x: Tensor) -> Tensor:
            x = self.attention_output(self.attention(x), x)
            return self.output(self.intermediate(x), x)

    expected = each(*(f"layers.{i}.{part}" for i in range(2) for part in ("attention_output", "output")))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        factors = iter(h)
        for layer in self.layers:
            x = layer.attention_output.reference(layer.attention(x), x, next(factors))
            x = layer.output.reference(layer.intermediate(x), x, next(factors))
        return x


@trap
class TrainingRunsOtherCode(Form):
    """Stochastic depth in training and not in evaluation (LeViT): one step, at another place in each mode."""

    expected = (Expected(places=2),)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            keep = torch.rand(len(x), 1, 1, dtype=x.dtype).lt(0.5) / 0.5
            return x + self.a(x) * keep
        return x + self.a(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        if self.training:
            keep = torch.rand(len(x), 1, 1, dtype=x.dtype).lt(0.5) / 0.5
            return x + h[0] * (self.a(x) * keep)
        return x + h[0] * self.a(x)


@trap
class TrainingHasMoreSteps(Form):
    """A step that runs in training only."""

    expected = (Expected("block"), Expected("head"))

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), Block()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.block(x)
        return (y, self.head(self.a(x))) if self.training else (y,)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> tuple[Tensor, ...]:
        y = self.block.reference(x, h[0])
        return (y, self.head.reference(self.a(x), h[1])) if self.training else (y,)


@trap
class ScaledOnce(Form):
    """Layer scale and drop path in the branch: h multiplies the whole right-hand side, once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gamma, self.drop = nn.LayerNorm(DIM), nn.Parameter(torch.randn(DIM)), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.gamma * self.a(self.norm(x)))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.drop(self.gamma * self.a(self.norm(x)))


@trap
class CalledThrice(Trap):
    """One block object called several times (ALBERT)."""

    expected = (Expected("block", calls=3, depth=3),)

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for _ in range(3):
            x = self.block.reference(x, h[0])
        return x


@trap
class TwoNamesForOneBlock(Trap):
    """One block object registered under two names: a step of the first, called twice."""

    expected = (Expected("first", calls=2, depth=2),)

    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.first.reference(self.first.reference(x, h[0]), h[0])


@trap
class ForwardCalledByName(Trap):
    """``block.forward(x)``: no hook of the block runs."""

    expected = (Expected("block"),)

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block.forward(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(x, h[0])


@trap
class StructuredArguments(Trap):
    """The state travels in dictionaries and tuples."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = mlp()

        def forward(self, *, state: dict[str, Any]) -> tuple[dict[str, Any], int]:
            return {**state, "x": (state["x"][0] + self.a(state["x"][0]),)}, 1

    expected = each("first", "second")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.Part(), self.Part()

    def forward(self, x: Tensor) -> dict[str, Any]:
        return self.second(state=self.first(state={"x": (x,)})[0])[0]

    def reference(self, x: Tensor, *, h: Sequence[float]) -> dict[str, Any]:
        x = x + h[0] * self.first.a(x)
        return {"x": (x + h[1] * self.second.a(x),)}


def gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(x, weight)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch calls its scripts deprecated; models have them still
    scripted_gelu, scripted_matmul = torch.jit.script(gelu), torch.jit.script(matmul)
    # The first run of a script with a backward is one that profiles, and rounds otherwise than those after it.
    for _ones in (torch.ones(2, 2), torch.ones(2, 2, dtype=torch.float64)):
        for _ in range(2):
            scripted_matmul(scripted_gelu(_ones.requires_grad_()), _ones).sum().backward()


@trap
class ScriptedHelper(Trap):
    """A scripted function within the branch, and one that is the branch."""

    expected = two()

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.weight = linear(), linear(), nn.Parameter(torch.randn(DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(scripted_gelu(self.a(x)))
        return x + scripted_matmul(x, self.weight)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = x + h[0] * self.b(scripted_gelu(self.a(x)))
        return x + h[1] * (x @ self.weight)


class Matmul(torch.autograd.Function):
    """A linear map with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight.mT, x.flatten(0, -2).mT @ grad.flatten(0, -2)


@trap
class CustomAutograd(Trap):
    """The branch is a custom autograd function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x + Matmul.apply(x, self.weight)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * (x @ self.weight)


class Checkpointed(Trap):
    """Activation checkpointing in training, around a block and around a bound method."""

    expected = each("block", "<root>")
    use_reentrant: ClassVar[bool]

    def __init__(self) -> None:
        super().__init__()
        self.block, self.a, self.drop = Block(), mlp(), nn.Dropout(0.5)

    def step(self, x: Tensor) -> Tensor:
        return x + self.drop(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.step(self.block(x))
        x = checkpoint(self.block, x, use_reentrant=self.use_reentrant)
        return checkpoint(self.step, x, use_reentrant=self.use_reentrant)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.block.reference(x, h[0])
        return x + h[1] * self.drop(self.a(x))


@trap
class CheckpointedReentrant(Checkpointed):
    """The reentrant kind runs the forward without grad and again in backward."""

    use_reentrant = True


@trap
class CheckpointedNonReentrant(Checkpointed):
    """The kind that recomputes by saved-tensor hooks."""

    use_reentrant = False
