"""The look of the pictures: medians, deviations over seeds, and each training. Okabe and Ito's colours."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reproductions.evidence.claims import Results, describe
from reproductions.presets import AUTO, EULER, PLAIN, PRESETS, RATE, START, Part
from reproductions.trial import Trial

BLUE, ORANGE, VERMILLION, GREEN, SKY, GREY = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#56B4E9", "#6B6B6B"
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "black",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.dpi": 130,
}
Look = tuple[str, str, str]  # colour, marker, line
LOOKS: dict[str, tuple[Part, Look]] = {
    "h = 1": (PLAIN, (VERMILLION, "o", "-")),
    "h = 0.1": (EULER, (BLUE, "s", "-")),
    "h = auto, 1/sqrt(D)": (AUTO, (ORANGE, "D", "-")),
    "h = 1, last maps start x 0.1": (START, (GREY, "^", ":")),
    "h = 1, last maps learn x 0.01": (RATE, (GREEN, "v", ":")),
}
BOTH = ("h = 1", "h = 0.1")


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return path


def by_preset(
    name: str, results: Results, draw: Callable[[Results, str], Figure | None], also: Sequence[str] = ()
) -> Iterator[tuple[str, Figure]]:
    """The figures of a study, `name-preset` each, of the presets that there are records of."""
    for preset in (*PRESETS, *also):
        figure = draw(results, preset)
        if figure is not None:
            yield f"{name}-{preset}", figure


def points(axes: Axes, results: Results, cells: Mapping[float, Trial], name: str, label: str, look: Look) -> int:
    """Medians with the standard deviation over seeds, and each training as a dot; returns how many there are.

    A training that has failed is a small cross at its number. One whose number is not finite is a cross at the top, and
    has no part in the medians.
    """
    color, marker, line = look
    number = {x: results.values(cell, name) for x, cell in cells.items()}
    found = {x: [v for v in values.values() if np.isfinite(v)] for x, values in number.items()}
    lost = [x + 0.04 * n for x, values in number.items() for n in range(len(values) - len(found[x]))]
    if lost:
        axes.scatter(lost, [0.98] * len(lost), color=color, marker="x", s=40, transform=axes.get_xaxis_transform())
        axes.scatter([], [], color="black", marker="x", label="diverged: not finite")
    found = {x: values for x, values in found.items() if values}
    if not found:
        return 0
    medians = [float(np.median(values)) for values in found.values()]
    spreads = [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for values in found.values()]
    style: dict[str, Any] = {"color": color, "marker": marker, "linestyle": line, "markersize": 5, "capsize": 3}
    axes.errorbar(list(found), medians, spreads, label=label, **style)
    for x, cell in cells.items():
        failed = results.values(cell, "failed")
        for seed, value in number[x].items():
            if failed.get(seed) == 1:
                axes.scatter(x, value, s=22, color=color, marker="x", linewidths=0.9, zorder=3)
            else:
                axes.scatter(x, value, s=14, color=color, alpha=0.5, linewidths=0, zorder=3)
    if any(1 in results.values(cell, "failed").values() for cell in cells.values()):
        axes.scatter([], [], color="black", marker="x", s=22, linewidths=0.9, label="failed training (small cross)")
    return sum(map(len, found.values()))


def chance(axes: Axes, cell: Trial, name: str) -> None:
    """The level of guessing."""
    level = math.log(cell.class_count) if "loss" in name else 1 / cell.class_count
    axes.axhline(level, color=GREY, linewidth=0.9, linestyle="--", zorder=0, label="chance")


def row_of_panels(number: int, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    figure, grid = plt.subplots(1, number, figsize=(4.8 * number, height), squeeze=False)
    return figure, list(grid[0])


def finish(figure: Figure, panels: Sequence[Axes], run: str = "") -> Figure:
    """One legend below the panels, and above them what was run."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.tight_layout(w_pad=2.0)
    place: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}
    figure.legend(list(handles.values()), list(handles), ncols=len(handles) if len(handles) < 6 else 3, **place)
    return subtitled(figure, run)


def subtitled(figure: Figure, run: str) -> Figure:
    """What was run, above the panels."""
    width = int(figure.get_figwidth() * 17)
    figure.text(0.01, 1.005, textwrap.fill(run, width), ha="left", va="bottom", fontsize=8, color=GREY)
    return figure


def ran(results: Results, cells: Iterable[Trial]) -> str:
    """What was run of some cells, in words: networks and data, epochs, seeds."""
    there = [cell for cell in cells if results.records_of(cell)]
    seeds = [len(results.records_of(cell)) for cell in there]
    if not there:
        return ""
    few, many = min(seeds), max(seeds)
    return describe(there, few if few == many else 0, results) + (f", {few} to {many} seeds" if few < many else "")


def ticks(axes: Axes, values: Sequence[float | str]) -> None:
    axes.set_xticks(range(len(values)), [f"{v:g}" if isinstance(v, float | int) else v for v in values])
    axes.set_xlim(-0.4, len(values) - 0.6)
