"""The vanilla residual network for TWO-MOON."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """`x + W2 relu(W1 x + b1) + b2`: two affine maps and no normalisation."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.second(torch.relu(self.first(x)))
        return y


class ResidualMLP(nn.Module):
    """A vanilla residual network on points in the plane, for TWO-MOON.

    The residual stream has the width of the input, so the features after any block can be drawn as they are, and the
    decision boundary in the last of these planes is a straight line.

    Args:
        steps: the number of residual blocks.
        hidden: the width between the two affine maps of a block.
        width: the width of the residual stream, which is that of the input.
        classes: the number of logits.

    Example:
        >>> network = ResidualMLP(steps=3)
        >>> network(torch.zeros(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(self, steps: int, hidden: int = 16, width: int = 2, classes: int = 2) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualBlock(width, hidden) for _ in range(steps)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (points, classes) for points of shape (points, width)."""
        logits: Tensor = self.head(self.blocks(x))
        return logits
