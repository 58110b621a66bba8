"""Two noisy moons, made here."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def two_moons(points: int, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points on two interleaving half circles of radius 1, centred at the origin, with Gaussian noise.

    The half circles are those of scikit-learn's `make_moons`, with angles drawn at random.

    Args:
        points: how many; the classes alternate.
        noise: standard deviation of the noise of each coordinate.
        generator: where the randomness comes from.

    Returns:
        The points, float32 of shape (points, 2), and their classes 0 and 1, int64 of shape (points,).

    Example:
        >>> x, y = two_moons(4, noise=0.0, generator=torch.Generator().manual_seed(0))
        >>> x.shape, y.tolist()
        (torch.Size([4, 2]), [0, 1, 0, 1])
    """
    angle = math.pi * torch.rand(points, generator=generator)
    labels = torch.arange(points) % 2
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
    moons = torch.where(labels[:, None] == 0, upper, -upper)
    return moons + noise * torch.randn(points, 2, generator=generator), labels
