"""Fig. 4: a residual network without normalisation on noisy two-moon points, with h = 1 and with h = 0.1.

What the paper does not say (width, depth, noise, optimiser) is chosen in `Protocol`, and the learning rate is swept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from reproductions.data.two_moons import two_moons
from reproductions.errors import DataError
from reproductions.evidence.claims import AT_CHANCE, NOT_RUN, Results, Row, judge, judge_failures
from reproductions.evidence.statistics import Estimate
from reproductions.evidence.style import BLUE, GREEN, GREY, ORANGE, VERMILLION, finish, subtitled
from reproductions.models import ResidualMLP
from reproductions.records import Record, environment
from reproductions.training.two_moon import Arm, Protocol, Trial, build, train

TITLE = "Fig. 4: noisy points"
NETWORKS = "networks.pt"
LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
PICTURED_SEED = 0

PRESETS = {
    "smoke": Protocol(steps=10, hidden=8, train_points=64, test_points=100, epochs=8, batch_size=32),
    "small": Protocol(),
}

BEST = "at each h's best learning rate"
# The claims of the paper that the report begins with.
PRIMARY = {
    "noise_amplification": "Fig. 4: with h = 0.1 noise is amplified less over the blocks",
    "test_accuracy": "Fig. 4: with h = 0.1 noisy points are classified better",
}
PLAIN, EULER = Arm(), Arm(h=0.1)
ARMS = (PLAIN, EULER, Arm(initial=0.1), Arm(rate=0.01))


def trainings(seeds: int) -> list[Trial]:
    """All trainings of the study."""
    return [Trial(*choice) for choice in product(ARMS, LEARNING_RATES, range(seeds))]


def run(
    protocol: Protocol, seeds: int, progress: Callable[[str, float], None] = lambda label, share: None
) -> tuple[list[Record], dict[str, Any]]:
    """All trainings, and the networks of the picture.

    Args:
        protocol: what is the same in all trainings.
        seeds: how many trainings an arm and learning rate get.
        progress: called with what is being trained and the share of it that is done.

    Returns:
        The records, one a training, and by the arm's name the pictured networks: for h = 1 and for h = 0.1 that of seed
        0 at the arm's best learning rate.
    """
    records: dict[Trial, Record] = {}
    pictures: dict[Trial, Tensor] = {}
    for h, together in groupby(sorted(trainings(seeds), key=lambda trial: -trial.arm.h), key=lambda trial: trial.arm.h):
        group = list(together)
        started = time.perf_counter()
        results, parameters = train(group, protocol, lambda share, h=h: progress(f"h = {h:g}", share))  # type: ignore[misc]
        seconds = (time.perf_counter() - started) / len(group)
        for index, (trial, result) in enumerate(zip(group, results, strict=True)):
            config = {**asdict(trial.arm), "learning_rate": trial.learning_rate, "seed": trial.seed, **asdict(protocol)}
            records[trial] = {
                "study": "two-moon",
                "config": config,
                "result": result,
                "seconds": seconds,
                "environment": environment(),
            }
            if trial.arm in (PLAIN, EULER) and trial.seed == PICTURED_SEED:
                pictures[trial] = parameters_to_vector(value[index] for value in parameters.values())
    ordered = [records[trial] for trial in trainings(seeds)]
    pictured = {}
    for arm in (PLAIN, EULER):
        trial = Trial(arm, best_learning_rate(select(ordered, arm)), PICTURED_SEED)
        pictured[str(arm)] = {"config": records[trial]["config"], "parameters": pictures[trial]}
    return ordered, pictured


# ---- what came out
def select(records: Sequence[Record], arm: Arm, learning_rate: float | None = None) -> list[Record]:
    """The records of an arm, at all learning rates or at one."""
    return [
        record
        for record in records
        if Arm(*(record["config"][name] for name in ("h", "initial", "rate"))) == arm
        and learning_rate in (None, record["config"]["learning_rate"])
    ]


def best_learning_rate(records: Sequence[Record]) -> float:
    """The learning rate with the highest median validation accuracy; the test points have no part in it."""
    rates: list[float] = sorted({record["config"]["learning_rate"] for record in records})
    return max(rates, key=lambda rate: float(np.median(values(records, "validation_accuracy", rate))))


def values(
    records: Sequence[Record], name: str, learning_rate: float | None = None, trained: bool = False
) -> list[float]:
    """One number of each record, at one learning rate, of the trainings that did not fail if `trained`."""
    return [
        math.nan if record["result"][name] is None else record["result"][name]
        for record in records
        if learning_rate in (None, record["config"]["learning_rate"]) and not (trained and record["result"]["failed"])
    ]


def statements(records: Sequence[Record]) -> list[str | Table]:
    """What was measured."""
    rates = sorted({record["config"]["learning_rate"] for record in records})
    number = len(select(records, PLAIN, rates[0]))
    failures = _table(f"Failed trainings of {number}, by learning rate", [f"{rate:g}" for rate in rates])
    for arm in ARMS:
        failures.add_row(str(arm), *(str(sum(values(select(records, arm), "failed", rate))) for rate in rates))

    names = ("test_accuracy", "noise_amplification", "relative_noise_amplification")
    best = {arm: select(records, arm, best_learning_rate(select(records, arm))) for arm in ARMS}
    summary = _table(
        "At the learning rate with the best median validation accuracy: median, quartiles",
        ["learning\nrate", "test\naccuracy", "noise\namplification", "relative noise\namplification"],
    )
    for arm, own in best.items():
        spreads = [_spread(values(own, name, trained="noise" in name)) for name in names]
        summary.add_row(str(arm), f"{own[0]['config']['learning_rate']:g}", *spreads)
    differences = [f"  {name.replace('_', ' ')}: {_difference(best[PLAIN], best[EULER], name)}" for name in names]
    heading = f"\n{EULER} minus {PLAIN}, each at that rate, paired by seed: mean (95 % interval)"
    return [failures, summary, heading, *differences]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(
        title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1)
    )
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _difference(plain: Sequence[Record], euler: Sequence[Record], name: str) -> str:
    """Whether the second is higher, over the seeds for which neither training failed."""
    pairs = [
        (a["result"][name], b["result"][name])
        for a, b in zip(plain, euler, strict=True)
        if not a["result"]["failed"] and not b["result"]["failed"]
    ]
    if len(pairs) < 2:
        return "fewer than two seeds to compare"
    found = Estimate.of([b - a for a, b in pairs])
    word = "higher" if found.low > 0 else "lower" if found.high < 0 else "no difference shown"
    return f"{found.mean:+.3g} ({found.low:+.3g} to {found.high:+.3g}), {word}"


def _spread(numbers: Sequence[float]) -> str:
    """Median and quartiles."""
    if not numbers:
        return "not measured"
    low, middle, high = np.quantile(numbers, [0.25, 0.5, 0.75])
    return f"{middle:.3g}\n{low:.3g}-{high:.3g}"


# ---- the picture's networks
def save_networks(folder: Path, networks: dict[str, Any]) -> Path:
    torch.save(networks, folder / NETWORKS)
    return folder / NETWORKS


def load_networks(folder: Path) -> dict[str, tuple[ResidualMLP, dict[str, Any]]]:
    """The pictured networks by the name of their arm, each with its configuration."""
    networks = {}
    try:
        stored = torch.load(folder / NETWORKS, weights_only=True)
    except Exception as error:  # a damaged file raises almost anything
        raise DataError(
            f"{folder / NETWORKS} is damaged ({type(error).__name__}); make it anew with two-moon --out {folder}"
        ) from error
    for name, saved in stored.items():
        config = saved["config"]
        protocol = Protocol(**{field: config[field] for field in asdict(Protocol())})
        network = build(Arm(h=config["h"]), protocol)
        vector_to_parameters(saved["parameters"], network.parameters())
        networks[name] = network, config
    return networks


def claims(results: Results, preset: str) -> list[Row]:
    records = results.of("two-moon")
    wanted = (
        ("noise_amplification", "Noise is amplified less over the blocks with h = 0.1", False),
        ("relative_noise_amplification", "The same, relative to how far the features spread (beyond the paper)", False),
        ("feature_step", "With h = 0.1 features move less from block to block", False),
        ("weight", "With h = 0.1 the weights are smaller", False),
        ("test_accuracy", "h = 0.1 classifies noisy points better", True),
    )
    if not records:
        return [Row(claim, "", "", NOT_RUN, primary=PRIMARY.get(name, "")) for name, claim, _ in wanted]
    plain, small = (select(records, arm) for arm in (PLAIN, EULER))
    rows = []
    rates = {BEST: [best_learning_rate(side) for side in (plain, small)]}
    rates |= {f"at learning rate {rate:g}": [rate, rate] for rate in (0.01, 0.1)}
    blocks = records[0]["config"]["steps"]
    for where, chosen in rates.items():
        sides = [select(records, a, r) for a, r in zip((PLAIN, EULER), chosen, strict=True)]
        failed = [sum(record["result"]["failed"] for record in side) for side in sides]
        run = f"{blocks} blocks without BN, {where} ({chosen[0]:g}, {chosen[1]:g}), {len(sides[0])} seeds"
        best = where == BEST
        first, second = ((n, len(side)) for n, side in zip(failed, sides, strict=True))
        rows.append(judge_failures("With h = 0.1 trainings fail less often", run, first, second))
        for name, claim, higher in wanted:
            if name != "test_accuracy" and any(failed):
                continue
            if any(name not in record["result"] for side in sides for record in side):
                rows.append(Row(f"{claim} (not recorded)", run, "", NOT_RUN))
                continue
            gaps = [b["result"][name] - a["result"][name] for a, b in zip(*sides, strict=True)]
            medians = " -> ".join(f"{np.median([r['result'][name] for r in side]):.3g}" for side in sides)
            row = judge(claim, run, Estimate.of(gaps), medians, higher, primary=PRIMARY.get(name, "") if best else "")
            lost = f"{failed[0]} and {failed[1]} of {len(gaps)} trainings failed"
            row = replace(row, outcome=f"{row.outcome}; {lost}") if any(failed) else row
            chance = any(2 * n >= len(gaps) for n in failed)
            rows.append(replace(row, verdict=AT_CHANCE, p=None) if chance else row)
    return rows


def figures(results: Results) -> Iterator[tuple[str, Figure]]:
    if records := results.of("two-moon"):
        if results.folder is not None and (results.folder / NETWORKS).exists():
            yield "features", _features(load_networks(results.folder))
        yield "learning_rates", _learning_rates(records)
        yield "at_a_glance", _at_a_glance(records)


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
    number = len(select(records, PLAIN, rates[0]))
    panels = (
        ("failed", f"failed trainings, of {number}"),
        ("test_accuracy", "test accuracy, last epoch"),
        ("noise_amplification", "noise amplification (times),\nof what did not fail"),
        ("relative_noise_amplification", "the same, relative to\nthe features' spread (times)"),
    )
    looks = zip(ARMS, ((VERMILLION, "o"), (BLUE, "s"), (GREY, "^"), (GREEN, "v")), strict=True)
    figure, grid = plt.subplots(2, 2, figsize=(10, 6.6))
    for arm, (color, marker) in looks:
        own, at = select(records, arm), np.log10(rates)
        style = {"color": color, "marker": marker, "linestyle": "-" if arm.h != 1 or arm == PLAIN else ":"}
        for axes, (quantity, _) in zip(grid.flat, panels, strict=True):
            if quantity == "failed":
                axes.plot(at, [sum(values(own, quantity, rate)) for rate in rates], **style, label=str(arm))
                continue
            rows = [values(own, quantity, rate, trained="noise" in quantity) for rate in rates]
            axes.plot(at, [np.median(row) if row else math.nan for row in rows], **style)
            for x, row in zip(at, rows, strict=True):
                axes.scatter([x] * len(row), row, s=9, color=color, alpha=0.35, linewidths=0)
    grid[0, 1].axhline(0.5, color=GREY, linewidth=0.9, linestyle="--", zorder=0, label="chance")
    for axes, (_, title) in zip(grid.flat, panels, strict=True):
        axes.set_ylabel(title)
        axes.set_xticks(np.log10(rates), [f"{rate:g}" for rate in rates])
        axes.set_xlim(math.log10(rates[0]) - 0.15, math.log10(rates[-1]) + 0.15)
    for axes in grid[1]:
        axes.set_xlabel("learning rate")
    grid[1, 0].set(yscale="log", yticks=(1, 2, 5, 10, 20, 50), yticklabels=("1", "2", "5", "10", "20", "50"))
    grid[1, 0].minorticks_off()
    grid[1, 1].set_ylim(bottom=0)
    config = records[0]["config"]
    run = (
        f"Two moons: {config['steps']} blocks without BN, {config['train_points']} points, {config['epochs']} epochs, "
    )
    return finish(figure, list(grid.flat), f"{run}{number} seeds; medians, and each training as a dot")


def _at_a_glance(records: Sequence[Record]) -> Figure:
    """The picture of the README: failures and accuracy over the learning rate, h = 1 against h = 0.1."""
    rates = sorted({record["config"]["learning_rate"] for record in records})
    number = len(select(records, PLAIN, rates[0]))
    figure, (failures, accuracies) = plt.subplots(1, 2, figsize=(9.6, 3.4))
    for arm, color, marker in ((PLAIN, VERMILLION, "o"), (EULER, BLUE, "s")):
        own, at = select(records, arm), np.log10(rates)
        style = {"color": color, "marker": marker, "linewidth": 2.5, "markersize": 7, "label": str(arm)}
        failures.plot(at, [sum(values(own, "failed", rate)) for rate in rates], **style)
        rows = [values(own, "test_accuracy", rate) for rate in rates]
        accuracies.plot(at, [np.median(row) for row in rows], **style)
        for x, row in zip(at, rows, strict=True):
            accuracies.scatter([x] * len(row), row, s=12, color=color, alpha=0.35, linewidths=0)
    accuracies.axhline(0.5, color=GREY, linewidth=0.9, linestyle="--", zorder=0)
    accuracies.annotate(
        "chance", (1.0, 0.5), (0, 4), ("axes fraction", "data"), "offset points", ha="right", color=GREY
    )
    failures.set_ylabel(f"trainings that failed, of {number}")
    accuracies.set_ylabel("test accuracy: each training, median")
    for axes in (failures, accuracies):
        axes.set_xticks(np.log10(rates), [f"{rate:g}" for rate in rates])
        axes.set_xlabel("learning rate")
    failures.legend(loc="upper left", fontsize=12)
    figure.tight_layout(w_pad=2.5)
    config = records[0]["config"]
    points = f"{config['train_points']} points of two moons, {config['epochs']} epochs, {number} seeds"
    return subtitled(figure, f"{config['steps']} residual blocks without BN; {points}")
