"""The pictures, each drawn from stored results alone. Okabe and Ito's colours, safe for the colour-blind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from reproductions import euler, two_moon
from reproductions.data import two_moons
from reproductions.models import ResidualMLP
from reproductions.records import Record, read_records

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


def draw(folder: Path) -> list[Path]:
    """Draw the figures of the study whose records lie in `folder`, beside them; returns their paths."""
    records = read_records(folder)
    study = records[0]["study"]
    with plt.rc_context(STYLE):
        if study == "euler":
            return [save(_euler(records), folder / "euler.png")]
        if study == "two-moon":
            return [
                save(_features(two_moon.load_networks(folder)), folder / "features.png"),
                save(_learning_rates(records), folder / "learning_rates.png"),
                save(_at_a_glance(records), folder / "at_a_glance.png"),
            ]
        if study == "dynamics-init":
            return [save(_start(records), folder / "start.png")]
        if study == "bounds":
            return [save(_bounds(records), folder / "bounds.png")]
    if study == "trials":
        from reproductions import grid_figures

        return grid_figures.draw(records, folder)
    return []


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return path


# ---- Fig. 1
def _euler(records: Sequence[Record]) -> Figure:
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    t = np.linspace(0, euler.END, 400)
    axes.plot(t, np.exp(euler.RATE * t), color="black", linewidth=2.5, label="exp(-2.3 t)", zorder=1)
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
    axes.set(xlabel="t", ylabel="x", xlim=(0, euler.END), title="Euler's method on x' = -2.3 x, x(0) = 1")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


# ---- Fig. 4
POINTS = 400
POINTS_SEED = 1000  # no training has it
COLUMNS = 6


def _features(networks: dict[str, tuple[ResidualMLP, dict[str, Any]]]) -> Figure:
    """A row a network: the planes of its features, and where the rest of the network draws the boundary in them."""
    figure, grid = plt.subplots(len(networks), COLUMNS, figsize=(2.0 * COLUMNS, 4.3))
    for number, (name, (network, config)) in enumerate(networks.items()):
        x, labels = two_moons(POINTS, config["noise"], torch.Generator().manual_seed(POINTS_SEED))
        row = grid[number]
        shown = np.linspace(0, len(network.blocks), COLUMNS).round().astype(int)
        for axes, after in zip(row, shown, strict=True):
            with torch.no_grad():
                _plane(axes, network, network.blocks[:after](x), labels, after)
            if number == 0:
                axes.set_title("input" if after == 0 else f"after block {after}")
        row[0].set_ylabel(f"{name}\n", fontsize=14, fontweight="bold")
        rate = f"learning rate {config['learning_rate']:g}"
        row[0].annotate(rate, (-0.31, 0.5), xycoords="axes fraction", rotation=90, va="center")
    figure.tight_layout(w_pad=0.4, h_pad=0.6)
    return figure


def _plane(axes: Axes, network: ResidualMLP, features: Tensor, labels: Tensor, after: int) -> None:
    low, high = features.amin(dim=0), features.amax(dim=0)
    middle, half = (low + high) / 2, 0.55 * (high - low).max()
    side = torch.linspace(-1, 1, 201) * half
    plane = torch.stack(torch.meshgrid(side + middle[0], side + middle[1], indexing="xy"), dim=-1)
    logits = network.head(network.blocks[after:](plane.reshape(-1, 2)))
    score = (logits[:, 1] - logits[:, 0]).reshape(plane.shape[:2]).numpy()
    x, y = plane[..., 0].numpy(), plane[..., 1].numpy()
    axes.pcolormesh(x, y, score > 0, cmap=ListedColormap(["#FCEBCB", "#D3E6F2"]), rasterized=True, shading="nearest")
    axes.contour(x, y, score, levels=[0.0], colors="black", linewidths=1.0)
    for label, color, marker in ((0, ORANGE, "o"), (1, BLUE, "^")):
        points = features[labels == label]
        axes.scatter(points[:, 0], points[:, 1], s=9, color=color, marker=marker, linewidths=0.2, edgecolors="white")
    axes.set(xlim=(x.min(), x.max()), ylim=(y.min(), y.max()), aspect="equal")
    axes.locator_params(nbins=3)
    axes.tick_params(labelsize=8, length=2)


def _learning_rates(records: Sequence[Record]) -> Figure:
    """Failures, accuracies and noise amplification over the learning rate; each dot is one training."""
    rates = sorted({record["config"]["learning_rate"] for record in records})
    number = len(two_moon.select(records, two_moon.PLAIN, rates[0]))
    panels = (
        ("failed", f"Failed trainings, of {number}"),
        ("test_accuracy", "Test accuracy after the last epoch"),
        ("noise_amplification", "Noise amplification"),
        ("relative_noise_amplification", "Noise amplification relative to the features' spread"),
    )
    looks = zip(two_moon.ARMS, ((VERMILLION, "o"), (BLUE, "s"), (GREY, "^"), (GREEN, "v")), strict=True)
    figure, grid = plt.subplots(2, 2, figsize=(10, 6.6))
    for offset, (arm, (color, marker)) in zip((-0.06, -0.02, 0.02, 0.06), looks, strict=True):
        own, at = two_moon.select(records, arm), np.log10(rates) + offset
        style = {"color": color, "marker": marker, "linestyle": "-" if arm.h != 1 or arm == two_moon.PLAIN else ":"}
        for axes, (quantity, _) in zip(grid.flat, panels, strict=True):
            if quantity == "failed":
                axes.plot(at, [sum(two_moon.values(own, quantity, rate)) for rate in rates], **style, label=str(arm))
                continue
            rows = [two_moon.values(own, quantity, rate, trained="noise" in quantity) for rate in rates]
            axes.plot(at, [np.median(row) if row else math.nan for row in rows], **style)
            for x, row in zip(at, rows, strict=True):
                axes.scatter([x] * len(row), row, s=9, color=color, alpha=0.35, linewidths=0)
    for axes, (_, title) in zip(grid.flat, panels, strict=True):
        axes.set_title(title, loc="left")
        axes.set_xticks(np.log10(rates), [f"{rate:g}" for rate in rates])
        axes.set_xlim(math.log10(rates[0]) - 0.15, math.log10(rates[-1]) + 0.15)
    for axes in grid[1]:
        axes.set_xlabel("learning rate")
    grid[1, 0].set(yscale="log", yticks=(1, 2, 5, 10, 20, 50), yticklabels=("1", "2", "5", "10", "20", "50"))
    grid[1, 0].minorticks_off()
    grid[1, 1].set_ylim(bottom=0)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0.02))
    figure.tight_layout(h_pad=1.5, w_pad=2.0)
    return figure


def _at_a_glance(records: Sequence[Record]) -> Figure:
    """The picture of the README: failures and accuracy over the learning rate, h = 1 against h = 0.1."""
    rates = sorted({record["config"]["learning_rate"] for record in records})
    number = len(two_moon.select(records, two_moon.PLAIN, rates[0]))
    figure, (failures, accuracies) = plt.subplots(1, 2, figsize=(9.6, 3.4))
    looks = ((two_moon.PLAIN, VERMILLION, "o", -0.02), (two_moon.EULER, BLUE, "s", 0.02))
    for arm, color, marker, offset in looks:
        own, at = two_moon.select(records, arm), np.log10(rates) + offset
        style = {"color": color, "marker": marker, "linewidth": 2.5, "markersize": 7, "label": str(arm)}
        failures.plot(at, [sum(two_moon.values(own, "failed", rate)) for rate in rates], **style)
        rows = [two_moon.values(own, "test_accuracy", rate) for rate in rates]
        accuracies.plot(at, [np.median(row) for row in rows], **style)
        for x, row in zip(at, rows, strict=True):
            accuracies.scatter([x] * len(row), row, s=12, color=color, alpha=0.35, linewidths=0)
    failures.set_title(f"Trainings that failed, of {number}", loc="left")
    accuracies.set_title("Test accuracy: each training, and the median", loc="left")
    for axes in (failures, accuracies):
        axes.set_xticks(np.log10(rates), [f"{rate:g}" for rate in rates])
        axes.set_xlabel("learning rate")
    failures.legend(loc="upper left", fontsize=12)
    figure.tight_layout(w_pad=2.5)
    return figure


# ---- Fig. 2 at the first iteration, and the bounds
def _start(records: Sequence[Record]) -> Figure:
    """The gradient of layer 2 before training, over depth."""
    figure, axes = plt.subplots(figsize=(5.4, 3.6))
    for h, color, marker in ((1.0, VERMILLION, "o"), (0.1, BLUE, "s")):
        own = [record for record in records if record["config"]["h"] == h]
        depths = sorted({record["config"]["depth"] for record in own})
        values = [[r["result"]["gradients"]["2"] for r in own if r["config"]["depth"] == depth] for depth in depths]
        axes.plot(depths, [np.median(v) for v in values], color=color, marker=marker, label=f"h = {h:g}")
        for depth, some in zip(depths, values, strict=True):
            axes.scatter([depth] * len(some), some, s=10, color=color, alpha=0.4, linewidths=0)
    axes.set(xscale="log", yscale="log", xlabel="depth")
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()
    axes.set_title("Norm of layer 2's gradient before training", loc="left")
    axes.legend()
    return figure


def _bounds(records: Sequence[Record]) -> Figure:
    """Measured growth of gradients and of noise over the first stage (lines), and the bounds (dotted)."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.8))
    for h, color in zip((1.0, 0.3, 0.1, 0.01), (VERMILLION, ORANGE, BLUE, GREEN), strict=True):
        own = [record for record in records if record["config"]["h"] == h]
        blocks = sorted({record["result"]["blocks"] for record in own})

        def medians(name: str, own: Sequence[Record] = own, blocks: Sequence[int] = blocks) -> list[float]:
            return [float(np.median([r["result"][name] for r in own if r["result"]["blocks"] == n])) for n in blocks]

        growth_bounds = [10**exponent for exponent in medians("log10_growth_bound")]
        pairs = ((medians("growth"), growth_bounds), (medians("noise"), medians("noise_bound")))
        for axes, (measured, bound) in zip(panels, pairs, strict=True):
            axes.plot(blocks, measured, color=color, marker="o", label=f"h = {h:g}")
            axes.plot(blocks, bound, color=color, linestyle=":")
            axes.set(xscale="log", yscale="log", xlabel="blocks")
            axes.set_xticks(blocks, [str(n) for n in blocks])
            axes.minorticks_off()
    panels[0].set_title("Growth of the gradient, and Proposition 1 (dotted)", loc="left")
    panels[1].set_title("Growth of noise, and Proposition 2 (dotted)", loc="left")
    panels[0].legend()
    figure.tight_layout(w_pad=2.0)
    return figure
