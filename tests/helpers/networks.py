"""Networks to measure: linear ones of which all is known, and small ones of the kinds that the paper trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearStep(nn.Module):
    """x + W x."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.map = nn.Linear(*weight.shape, bias=False, dtype=weight.dtype)
        with torch.no_grad():
            self.map.weight.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.map(x)


def linear(depth: int, w: float, width: int = 4, dtype: torch.dtype = torch.float64) -> nn.Module:
    """x + w x, `depth` times: with h, all that comes in grows (1 + h w)^depth-fold, forwards and backwards."""
    return nn.Sequential(*(LinearStep(w * torch.eye(width, dtype=dtype)) for _ in range(depth)))


class Block(nn.Module):
    """Post-activation, batch normalisation, PyTorch's default initialisation, projection shortcut: as in the paper."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False)).append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return torch.relu(out)


class ResNet(nn.Module):
    """The paper's network of depth 6 n + 2 for CIFAR-10: 3 n steps, two of them projections."""

    def __init__(self, depth: int, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        ends = [width for width in widths for _ in range((depth - 2) // 6)]
        starts = [widths[0], *ends]
        self.blocks = nn.Sequential(*(Block(i, o, 1 if i == o else 2) for i, o in zip(starts, ends, strict=False)))
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class MLPStep(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


def mlp(depth: int, width: int = 8, hidden: int = 32) -> nn.Module:
    """Without normalisation, as for TWO-MOON."""
    return nn.Sequential(*(MLPStep(width, hidden) for _ in range(depth)), nn.Linear(width, 2))


class Tokens(nn.Module):
    """A transformer of tokens: an embedding, pre-norm layers of two steps each, a head."""

    def __init__(self, layers: int, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, 2, 2 * width, dropout, batch_first=True, norm_first=True)
                for _ in range(layers)
            )
        )
        self.head = nn.Linear(width, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens)))
