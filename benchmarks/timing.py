"""Ratios that a busy machine disturbs least: interleaved runs, CPU time of one thread, medians over the rounds."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping


class Interleaved:
    """Runs every candidate once a round, in an order that rotates, and keeps each one's CPU time.

    >>> race = Interleaved({"one": lambda: sum(range(1000)), "same": lambda: sum(range(1000))})
    >>> for _ in range(3):
    ...     race.round()
    >>> sorted(race.ratio("same", "one")), len(race.seconds["one"])
    (['high', 'low', 'median'], 3)
    """

    def __init__(self, candidates: Mapping[str, Callable[[], object]]) -> None:
        self.candidates = list(candidates.items())
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def round(self) -> None:
        for name, run in self.candidates:
            start = time.process_time()
            run()
            self.seconds[name].append(time.process_time() - start)
        self.candidates.append(self.candidates.pop(0))

    def warm_up(self, rounds: int, least: int, seconds: float = 20.0) -> int:
        """Rounds that do not count; returns how many more take `seconds`, as the last one went, or `least`."""
        for _ in range(rounds):
            self.round()
        last = sum(times[-1] for times in self.seconds.values())
        self.seconds.clear()
        return max(least, round(seconds / last))

    def ratio(self, name: str, baseline: str) -> dict[str, float]:
        """Median over the rounds of time(name) / time(baseline), with the quartiles (`low`, `high`)."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[baseline], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return {"low": low, "median": median, "high": high}
