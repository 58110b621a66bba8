"""A network of two blocks, and a module that is written to a file."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x)


class Net(nn.Module):
    """Three steps: layer.0, layer.1 and layer.10 (to tell components from prefixes)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleDict({name: Block() for name in ("0", "1", "10")})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layer.values():
            x = block(x)
        return x


X = torch.linspace(-1, 1, 12).view(2, 6)
