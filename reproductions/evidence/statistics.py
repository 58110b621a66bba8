"""Means and their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of independent values, and the ends of its 95 % interval by Student's t; of one value it is infinite.

    Example:
        >>> mean, low, high = mean_interval([1.0, 2.0, 3.0])
        >>> round(mean, 3), round(low, 3), round(high, 3)
        (2.0, -0.484, 4.484)
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = t_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def t_quantile(freedom: int, level: float = 0.95) -> float:
    """The t that a Student variable of `freedom` degrees stays within, on both sides, with probability `level`.

    The distribution function is integrated over the angle arctan(t / sqrt(freedom)), in which it is smooth and bounded.
    """
    angle = np.linspace(0.0, math.pi / 2, 100_001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.tan(float(np.interp(level, mass / mass[-1], angle))) * math.sqrt(freedom)
