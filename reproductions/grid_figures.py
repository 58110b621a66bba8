"""The pictures of the trials, in the paper's form: medians, standard deviations over seeds, and each training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reproductions import depth, dynamics, noise, robust, select
from reproductions.claims import Results, failures, network
from reproductions.figures import BLUE, GREEN, GREY, ORANGE, STYLE, VERMILLION, save
from reproductions.records import Record
from reproductions.scales import AUTO, EULER, PLAIN, PRESETS, RATE, START, Part
from reproductions.trial import Trial

Look = tuple[str, str, str]  # colour, marker, line
LOOKS: dict[str, tuple[Part, Look]] = {
    "h = 1": (PLAIN, (VERMILLION, "o", "-")),
    "h = 0.1": (EULER, (BLUE, "s", "-")),
    "h = auto, 1/sqrt(D)": (AUTO, (ORANGE, "D", "-")),
    "h = 1, last maps start x 0.1": (START, (GREY, "^", ":")),
    "h = 1, last maps learn x 0.01": (RATE, (GREEN, "v", ":")),
}
BOTH = ("h = 1", "h = 0.1")


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw what there are records for; returns the paths of the pictures."""
    results = Results(records)
    drawn: dict[str, Figure | None] = {}
    with plt.rc_context(STYLE):
        for preset in PRESETS:
            drawn[f"depth-{preset}"] = _depth(results, preset)
            for name, cells in dynamics.cells(preset, EULER).items():
                drawn[f"{name}-{preset}"] = _dynamics(results, cells)
            drawn[f"noise-{preset}"] = _noise(results, preset)
            drawn[f"select-{preset}"] = _select(results, preset)
            drawn[f"robust-{preset}"] = _robust(results, preset)
        return [save(figure, folder / f"{name}.png") for name, figure in drawn.items() if figure is not None]


def points(
    axes: Axes, results: Results, cells: Mapping[float, Trial], name: str, label: str, look: Look, shift: float = 0.0
) -> int:
    """Medians with the standard deviation over seeds, and each training as a dot; returns how many there are.

    A training whose number is not finite has no part in these, and is a cross at the top.
    """
    color, marker, line = look
    found = {x: [v for v in results.column(cell, name) if np.isfinite(v)] for x, cell in cells.items()}
    lost = [
        x + shift + 0.04 * number
        for x, cell in cells.items()
        for number in range(len(results.column(cell, name)) - len(found[x]))
    ]
    if lost:
        axes.scatter(lost, [0.98] * len(lost), color=color, marker="x", s=40, transform=axes.get_xaxis_transform())
        axes.scatter([], [], color="black", marker="x", label="diverged: not finite")
    found = {x: values for x, values in found.items() if values}
    if not found:
        return 0
    at = np.array(list(found)) + shift
    medians = [float(np.median(values)) for values in found.values()]
    spreads = [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for values in found.values()]
    style: dict[str, Any] = {"color": color, "marker": marker, "linestyle": line, "markersize": 5, "capsize": 3}
    axes.errorbar(at, medians, spreads, label=label, **style)
    for x, values in zip(at, found.values(), strict=True):
        axes.scatter([x] * len(values), values, s=14, color=color, alpha=0.5, linewidths=0, zorder=3)
    return sum(map(len, found.values()))


def _panels(number: int, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    figure, grid = plt.subplots(1, number, figsize=(4.6 * number, height), squeeze=False)
    return figure, list(grid[0])


def _finish(figure: Figure, panels: Sequence[Axes]) -> Figure:
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.tight_layout(w_pad=2.0)
    place: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}
    figure.legend(list(handles.values()), list(handles), ncols=len(handles) if len(handles) < 6 else 3, **place)
    return figure


def _ticks(axes: Axes, values: Sequence[float | str]) -> None:
    axes.set_xticks(range(len(values)), [f"{v:g}" if isinstance(v, float | int) else v for v in values])
    axes.set_xlim(-0.4, len(values) - 0.6)


# ---- Fig. 3
def _depth(results: Results, preset: str) -> Figure | None:
    data = [("resnet", "CIFAR-10", depth.RESNETS[preset]), ("vdcnn", "AG-NEWS", depth.VDCNNS[preset])]
    quantities = (("test_accuracy", "test accuracy"), ("train_loss", "train loss"))
    data = [d for d in data if results.has(depth.cell(preset, d[0], n, EULER) for n in d[2])]
    if not data:
        return None
    figure, grid = plt.subplots(len(data), 2, figsize=(9.6, 3.6 * len(data)), squeeze=False)
    panels = list(grid.flat)
    for index, axes in enumerate(panels):
        model, title, depths = data[index // 2]
        name, words = quantities[index % 2]
        for number, (label, (arm, look)) in enumerate(LOOKS.items()):
            cells = {float(x): depth.cell(preset, model, n, arm) for x, n in enumerate(depths)}
            points(axes, results, cells, name, label, look, shift=0.06 * (number - 2))
        _ticks(axes, depths)
        axes.set_title(f"{title}: {words}, last epoch", loc="left")
        axes.set_xlabel("depth")
    return _finish(figure, panels)


# ---- Fig. 2
def _dynamics(results: Results, cells: Sequence[Trial]) -> Figure | None:
    cells = [cell for cell in cells if results.has([cell])]
    if not cells:
        return None
    figure, grid = plt.subplots(2, len(cells), figsize=(4.6 * len(cells), 6.0), squeeze=False, sharex="col")
    for column, cell in enumerate(cells):
        for label in BOTH:
            arm, (color, _, _) = LOOKS[label]
            for seed, key in _keys(Trial(**{**vars(cell), **arm})):
                log = results.records.get(key, {}).get("result", {}).get("log")
                if log:
                    at = np.array(log["iterations"]) + 1
                    for row, name in enumerate(("weight", "gradient")):
                        values = [np.nan if v is None else v for v in log["layer 2"][name]]
                        style = {"color": color, "alpha": 0.8, "linewidth": 1.1}
                        grid[row, column].plot(at, values, label=label if not seed else None, **style)
        grid[0, column].set_title(f"{network(cell)}: weights of layer 2, norm", loc="left")
        grid[1, column].set_title("gradients of layer 2, norm", loc="left")
        grid[1, column].set_xlabel("iteration")
        grid[0, column].set(xscale="log", ylim=(0, None))
        grid[1, column].set(xscale="log", yscale="log")
    return _finish(figure, list(grid.flat))


def _keys(cell: Trial) -> list[tuple[int, str]]:
    from reproductions.claims import SEEDS

    return [(seed, Trial(**{**vars(cell), "seed": seed}).key) for seed in SEEDS]


# ---- Fig. 5
def _noise(results: Results, preset: str) -> Figure | None:
    kinds = {
        kind: levels
        for kind, levels in noise.kinds(preset).items()
        if results.has(noise.cell(preset, kind, level, EULER) for level in levels[1:])
    }
    if not kinds:
        return None
    figure, panels = _panels(len(kinds))
    for axes, (kind, levels) in zip(panels, kinds.items(), strict=True):
        for number, label in enumerate(BOTH):
            arm, look = LOOKS[label]
            cells = {float(x): noise.cell(preset, kind, level, arm) for x, level in enumerate(levels)}
            points(axes, results, cells, "test_accuracy", label, look, shift=0.06 * (number - 0.5))
        _ticks(axes, levels)
        axes.set_title(f"trained with {kind}: test accuracy", loc="left")
        axes.set_xlabel("level")
    return _finish(figure, panels)


# ---- Fig. 6
def _select(results: Results, preset: str) -> Figure | None:
    networks = [
        (model, n)
        for model, n in select.NETWORKS[preset]
        if results.has(
            one(preset, model, n, h) for h in select.grid_of(preset, model) for one in (select.cell, select.short)
        )
    ]
    if not networks:
        return None
    figure, panels = _panels(len(networks))
    for axes, (model, n) in zip(panels, networks, strict=True):
        grid = [h for h in select.grid_of(preset, model) if not isinstance(h, str)]
        cells = {float(x): select.cell(preset, model, n, h) for x, h in enumerate(grid)}
        points(axes, results, cells, "test_accuracy", "test accuracy", (BLUE, "s", "-"))
        counts = [failures(results, select.short(preset, model, n, h)) for h in grid]
        shares = [failed / total if total else np.nan for failed, total in counts]
        axes.bar(range(len(grid)), shares, color=VERMILLION, alpha=0.25, label="share of failed trainings")
        uncounted = [x for x, share in enumerate(shares) if np.isnan(share)]
        if uncounted:
            axes.scatter(uncounted, [0.03] * len(uncounted), color=GREY, marker="$?$", label="failures not counted")
        for rule in select.CHOICES[model]:
            landed = results.column(select.cell(preset, model, n, rule), "h")
            if landed:
                x = float(np.interp(np.log(np.median(landed)), np.log(grid), range(len(grid))))
                axes.axvline(x, color=GREY, linewidth=0.8, linestyle=":")
                axes.text(x, 0.99, f" {rule}", rotation=90, ha="right", va="top", fontsize=7, color=GREY)
        _ticks(axes, grid)
        axes.tick_params(axis="x", labelrotation=60)
        axes.set(xlabel="h", ylim=(0, 1))
        axes.set_title(f"{model} {n}", loc="left")
    return _finish(figure, panels)


# ---- in passing
def _robust(results: Results, preset: str) -> Figure | None:
    rates = robust.RATES[preset]
    panels_of = {"with BN": (), "without BN": (robust.NO_NORM,)}
    shown = {
        title: changes
        for title, changes in panels_of.items()
        if results.has(robust.cell(preset, EULER, *changes, {"learning_rate": rate}) for rate in rates)
    }
    if not shown:
        return None
    figure, panels = _panels(len(shown))
    for axes, (title, changes) in zip(panels, shown.items(), strict=True):
        for number, label in enumerate(BOTH):
            arm, look = LOOKS[label]
            cells = {float(x): robust.cell(preset, arm, *changes, {"learning_rate": r}) for x, r in enumerate(rates)}
            points(axes, results, cells, "test_accuracy", label, look, shift=0.06 * (number - 0.5))
        _ticks(axes, rates)
        axes.set_title(f"ResNet-{robust.DEPTH[preset]} {title}: test accuracy", loc="left")
        axes.set_xlabel("learning rate")
    return _finish(figure, panels)
