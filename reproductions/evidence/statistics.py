"""Means, differences and shares with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95


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
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def difference_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Second minus first, of independent samples: the difference of means and the ends of Welch's 95 % interval.

    Example:
        >>> mean, low, high = difference_interval([1.0, 2.0, 3.0], [4.0, 5.0, 7.0])
        >>> round(mean, 3), round(low, 3), round(high, 3)
        (3.333, 0.212, 6.454)
    """
    mean = float(np.mean(second) - np.mean(first))
    if min(len(first), len(second)) < 2 or (np.std(first) == 0 and np.std(second) == 0):
        spread = 0.0 if min(len(first), len(second)) >= 2 else math.inf
        return mean, mean - spread, mean + spread
    interval = stats.ttest_ind(second, first, equal_var=False).confidence_interval(LEVEL)
    return mean, float(interval.low), float(interval.high)
