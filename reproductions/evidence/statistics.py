"""Estimates with their intervals and tests: Student's t, Welch, Clopper and Pearson, Fisher, and Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, and the degrees of freedom of Student's t that it has.

    Example:
        >>> one = Estimate.of([1.0, 2.0, 3.0])
        >>> one.mean, round(one.low, 3), round(one.high, 3), round(one.p(), 3)
        (2.0, -0.484, 4.484, 0.074)
        >>> Estimate.of([1.0]).high
        inf
    """

    mean: float
    error: float
    freedom: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of the mean of independent values; one value says nothing of its error.

        Records have five digits: a difference of 1e-17 that is the same for all seeds is one of rounding, and is none.
        """
        values = np.round(values, 12).tolist()
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
        return cls(float(np.mean(values)), error, len(values) - 1)

    @classmethod
    def of_difference(cls, first: Sequence[float], second: Sequence[float]) -> Estimate:
        """Of second minus first, of samples that no seed pairs (Welch).

        Example:
            >>> one = Estimate.of_difference([1.0, 2.0, 3.0], [4.0, 5.0, 7.0])
            >>> round(one.mean, 3), round(one.low, 3), round(one.high, 3)
            (3.333, 0.212, 6.454)
        """
        mean = float(np.mean(second) - np.mean(first))
        if min(len(first), len(second)) < 2:
            return cls(mean, math.inf, 0)
        parts = [float(np.var(side, ddof=1)) / len(side) for side in (first, second)]
        weights = sum(part**2 / (len(side) - 1) for part, side in zip(parts, (first, second), strict=True))
        return cls(mean, math.sqrt(sum(parts)), sum(parts) ** 2 / weights if weights else math.inf)

    @property
    def low(self) -> float:
        return self.mean - self._half()

    @property
    def high(self) -> float:
        return self.mean + self._half()

    def _half(self) -> float:
        if self.error in (0.0, math.inf):
            return self.error
        return float(stats.t.ppf((1 + LEVEL) / 2, self.freedom)) * self.error

    def p(self, boundary: float = 0.0) -> float:
        """Of the two-sided test that the mean is `boundary`: below 0.05 where the interval leaves it out."""
        if self.error == math.inf:
            return 1.0
        if self.error == 0:
            return float(self.mean == boundary)
        return float(2 * stats.t.sf(abs(self.mean - boundary) / self.error, self.freedom))


def share_interval(count: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Clopper and Pearson.

    Example:
        >>> [round(end, 3) for end in share_interval(10, 10)]
        [0.692, 1.0]
    """
    interval = stats.binomtest(count, total).proportion_ci(LEVEL, "exact")
    return float(interval.low), float(interval.high)


def share_p(count: int, total: int, share: float) -> float:
    """Of the two-sided test that the share is `share`: below 0.05 where `share_interval` leaves it out."""
    sides = ("less", "greater")
    return min(1.0, 2 * min(float(stats.binomtest(count, total, share, side).pvalue) for side in sides))


def shares_p(first: tuple[int, int], second: tuple[int, int]) -> float:
    """Of Fisher's exact test that two shares, each a count and a total, are the same.

    Example:
        >>> round(shares_p((5, 5), (0, 5)), 4)
        0.0079
    """
    return float(stats.fisher_exact([[count, total - count] for count, total in (first, second)]).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """The p of several tests, corrected so that all together err once in twenty (Holm 1979).

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = largest
    return corrected
