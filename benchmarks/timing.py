"""Times that can be compared: candidates run in turn, in one process; medians and quartiles over the rounds."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping

Run = Callable[[], object]


def cpu_seconds(run: Run) -> float:
    """CPU time of one call, which does not count what else the machine does."""
    start = time.process_time()
    run()
    return time.process_time() - start


class Interleaved:
    """Times every candidate once a round, in an order that rotates.

    Args:
        candidates: what to run, by name.
        seconds: how one candidate is timed.

    Example:
        >>> race = Interleaved({"one": lambda: sum(range(1000)), "same": lambda: sum(range(1000))})
        >>> for _ in range(3):
        ...     race.round()
        >>> sorted(race.ratio("same", "one")), len(race.seconds["one"])
        (['high', 'low', 'median'], 3)
    """

    def __init__(self, candidates: Mapping[str, Run], seconds: Callable[[Run], float] = cpu_seconds) -> None:
        self.candidates = list(candidates.items())
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._time = seconds

    def round(self) -> None:
        for name, run in self.candidates:
            self.seconds[name].append(self._time(run))
        self.candidates.append(self.candidates.pop(0))

    def warm_up(self, rounds: int, least: int, seconds: float = 20.0, most: int | None = None) -> int:
        """Rounds that do not count; returns how many more take `seconds`, as the last one went, from least to most."""
        for _ in range(rounds):
            self.round()
        last = sum(times[-1] for times in self.seconds.values())
        self.seconds.clear()
        fitting = max(least, round(seconds / max(last, 1e-9)))
        return fitting if most is None else min(most, fitting)

    def median(self, name: str) -> float:
        """The median of the seconds of one candidate."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, baseline: str) -> dict[str, float]:
        """Median over the rounds of time(name) / time(baseline), with the quartiles (`low`, `high`)."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[baseline], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return {"low": low, "median": median, "high": high}
