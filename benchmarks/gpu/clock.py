"""Seconds of one call on the device, and of one call as a user waits for it."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence

import torch

from benchmarks.timing import Run

LONGEST = 1 << 28  # cycles of the sleep, 0.15 s


def rotating(calls: Sequence[Run]) -> Run:
    """One call after the other, each on buffers of its own, for ever.

    Results are kept for a round, so that those of the next call lie elsewhere: a cache holds neither operands nor
    results when they are needed.
    """
    turns, kept = itertools.cycle(calls), deque[object](maxlen=len(calls))
    return lambda: kept.append(next(turns)())


class DeviceClock:
    """Seconds of one call on the device: calls that follow one another without a gap.

    The device sleeps while they are queued. Where the sleep was too short, it is doubled and the time does not count.
    """

    def __init__(self, device: str, calls: int) -> None:
        self.device, self.calls, self.cycles = device, calls, 1 << 21

    def __call__(self, run: Run) -> float:
        if self.device != "cuda":
            return _wall(run, self.calls)
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            torch.cuda._sleep(self.cycles)  # type: ignore[no-untyped-call]
            start.record()
            for _ in range(self.calls):
                run()
            end.record()
            late = bool(start.query())  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            if not late or self.cycles >= LONGEST:
                return float(start.elapsed_time(end)) / 1e3 / self.calls
            self.cycles *= 2


class WallClock:
    """Seconds from a call until the device has done what it asks for."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, run: Run) -> float:
        def whole() -> None:
            run()
            if self.device == "cuda":
                torch.cuda.synchronize()

        return _wall(whole, 1)


def _wall(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls
