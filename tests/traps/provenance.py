"""Models in which it is not easily seen what a tensor was made of, for test_provenance.py."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.traps.base import DIM, linear, mlp


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class LambdaBlock(nn.Module):
    """A function that holds modules in its cells, as minGPT's blocks do; batch norm would show that it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"fc": linear(), "norm": nn.BatchNorm1d(DIM), "proj": linear()})
        m = self.mlp
        self.branch: Callable[[Tensor], Tensor] = lambda x: m["proj"](m["norm"](torch.relu(m["fc"](x))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class LambdaOverBlock(nn.Module):
    """A function that holds a whole residual block."""

    def __init__(self) -> None:
        super().__init__()
        block = self.block = Residual(linear())
        self.run = lambda x: block(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class LooksAtValues(nn.Module):
    """Cannot be traced without values, so that a real copy runs."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.a = block, linear()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum().item() > 1e9:
            return x
        return x + self.a(self.block(x))


def with_older_norm(norm: Any) -> nn.Module:
    """Two blocks, whose weights a hook computes in each forward."""

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.f = norm(linear()), nn.Sequential(norm(linear()), nn.ELU(), norm(linear()))

        def forward(self, x: Tensor) -> Tensor:
            return self.project(x) + self.f(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(Unit(), Unit())


class ThroughNumpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return x + self.g(torch.from_numpy(x.detach().numpy()))


class InAThread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        results: list[Tensor] = []
        thread = threading.Thread(target=lambda: results.append(self.g(x)))
        thread.start()
        thread.join()
        return x + results[0]


def bias_gelu(x: Tensor, b: Tensor) -> Tensor:
    y = x + b
    return y * 0.5 * (1.0 + torch.tanh(0.79788456 * y * (1 + 0.044715 * y * y)))


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    scripted = torch.jit.script(bias_gelu)


class ScriptedBranch(nn.Module):
    """A branch that goes through a scripted function, as Megatron's MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.b, self.down = nn.Linear(DIM, DIM, bias=False), nn.Parameter(torch.zeros(DIM)), linear()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(scripted(self.up(x), self.b))


class Flex(nn.Module):
    """Attention as a higher-order operator."""

    def __init__(self) -> None:
        super().__init__()
        from torch.nn.attention.flex_attention import flex_attention

        self.attend, self.qkv, self.out = flex_attention, nn.Linear(DIM, 3 * DIM), linear()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, DIM // 2)).permute(2, 0, 3, 1, 4)
        return x + self.out(self.attend(q, k, v).transpose(1, 2).reshape(x.shape))


class Uncopyable(nn.Module):
    """A module with what cannot be copied: a lock, an iterator, a generator, the last output, an object with a lock."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()
        self.lock = threading.Lock()
        self.stream = (i for i in range(3))
        self.draws = torch.Generator()
        self.trainer = type("Trainer", (), {})()
        self.trainer.lock, self.trainer.model = threading.RLock(), self
        self.last: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            x = x + self.f(x)
        self.last["output"] = x
        return x
