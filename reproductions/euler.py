"""Fig. 1: Euler's method on x' = -2.3 x, x(0) = 1, for several step sizes.

One Euler step is one residual block: the state plus h times what the right-hand side makes of it.
"""

from __future__ import annotations

import time

import torch

from eulernet.functional import euler_step
from reproductions.records import Record, environment

RATE, END = -2.3, 5.0
STEP_SIZES = (0.1, 0.3, 0.7, 0.9)


def run() -> list[Record]:
    """One record a step size, with the times, the states, and the largest distance from the solution at these times."""
    records = []
    for h in STEP_SIZES:
        started = time.perf_counter()
        states = solve(h)
        times = [h * n for n in range(len(states))]
        exact = (RATE * torch.tensor(times, dtype=torch.float64)).exp()
        error = (torch.tensor(states, dtype=torch.float64) - exact).abs().max().item()
        records.append(
            {
                "study": "euler",
                "config": {"h": h, "rate": RATE, "start": 1.0, "end": END},
                "result": {"times": times, "states": states, "largest_error": error},
                "seconds": time.perf_counter() - started,
                "environment": environment(),
            }
        )
    return records


def solve(h: float) -> list[float]:
    """The states at the times 0, h, 2h, ... up to `END`.

    Example:
        >>> [round(x, 4) for x in solve(0.9)[:3]]
        [1.0, -1.07, 1.1449]
    """
    x = torch.ones((), dtype=torch.float64)
    states = [x.item()]
    for _ in range(int(END / h + 1e-9)):
        x = euler_step(x, RATE * x, h)
        states.append(x.item())
    return states


def statements(records: list[Record]) -> list[str]:
    """What was measured, in words."""
    lines = []
    for record in records:
        h, result = record["config"]["h"], record["result"]
        last = abs(result["states"][-1])
        trend = "grows" if last > abs(result["states"][0]) else "decays"
        lines.append(f"h = {h:g}: largest error {result['largest_error']:.3f}; |x| {trend} from 1 to {last:.2g}.")
    return lines
