"""The model in `patched_flat_modules.pickle`, which eulernet pickled when its modules lay flat (commit 03857b1).

Keep its source as it is: a patched model loads only where the functions that were rewritten are the same.
"""

import torch
from torch import Tensor, nn


class Relu(nn.Module):
    """Batch norm before the addition, an activation after it."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.map(x)
        y = self.bn(y)
        y += x
        y = self.act(y)
        return y


class Block(nn.Module):
    """Two additions: a LayerScale before each, a norm that is called next after the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.gamma = nn.Parameter(torch.full((4,), 0.5))
        self.norm = nn.LayerNorm(4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma * self.first(x)
        y = self.norm(x)
        y = self.second(y)
        return x + y * self.gamma


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Relu(), Block(), Block()).eval()


def example() -> Tensor:
    return torch.linspace(-1, 1, 12).reshape(3, 4)
