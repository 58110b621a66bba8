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
            return [_save(_euler(records), folder / "euler.png")]
        if study == "two-moon":
            return [
                _save(_features(two_moon.load_networks(folder)), folder / "features.png"),
                _save(_learning_rates(records), folder / "learning_rates.png"),
            ]
    return []


def _save(figure: Figure, path: Path) -> Path:
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
