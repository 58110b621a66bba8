"""Fig. 1: Euler's method on x' = -2.3 x, x(0) = 1, for several step sizes.

One Euler step is one residual block: the state plus h times what the right-hand side makes of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from eulernet.functional import euler_step
from reproductions.evidence.claims import NOT_RUN, REFUTED, SUPPORTED, Results, Row
from reproductions.evidence.style import BLUE, GREEN, GREY, ORANGE, VERMILLION
from reproductions.records import Record, environment

TITLE = "Fig. 1: Euler's method"
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


def claims(results: Results, preset: str) -> list[Row]:
    records = results.of("euler")
    said = ("A smaller step factor approximates the solution better", "Euler's method is unstable beyond h = 2 / 2.3")
    if not records:
        return [Row(claim, "", "", NOT_RUN) for claim in said]
    errors = {record["config"]["h"]: record["result"]["largest_error"] for record in records}
    ordered = [errors[h] for h in sorted(errors)]
    last = {record["config"]["h"]: abs(record["result"]["states"][-1]) for record in records}
    run = f"x' = -2.3 x, t to 5, h = {', '.join(f'{h:g}' for h in sorted(errors))}"
    shown = ", ".join(f"{error:.3f}" for error in ordered)
    growth = all((value > 1) == (h > 2 / 2.3) for h, value in last.items())
    ends = ", ".join(f"{last[h]:.2g}" for h in sorted(last))
    return [
        Row(said[0], run, f"largest error {shown}", SUPPORTED if ordered == sorted(ordered) else REFUTED),
        Row(said[1], run, f"last state {ends}, from 1", SUPPORTED if growth else REFUTED),
    ]


def figures(results: Results) -> Iterator[tuple[str, Figure]]:
    if records := results.of("euler"):
        yield "euler", _figure(records)


# ---- the picture
def _figure(records: Sequence[Record]) -> Figure:
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    t = np.linspace(0, END, 400)
    axes.plot(t, np.exp(RATE * t), color="black", linewidth=2.5, label="exp(-2.3 t)", zorder=1)
    for record, color, marker in zip(records, (BLUE, GREEN, ORANGE, VERMILLION), "osD^", strict=True):
        result = record["result"]
        axes.plot(
            result["times"],
            result["states"],
            color=color,
            marker=marker,
            markersize=4,
            linewidth=1.2,
            label=f"Euler, h = {record['config']['h']:g}",
        )
    axes.axhline(0, color=GREY, linewidth=0.6, zorder=0)
    axes.set(xlabel="t", ylabel="x", xlim=(0, END), title="Euler's method on x' = -2.3 x, x(0) = 1")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
