"""Fig. 6: accuracy over h, the share of failed trainings, and where rules for h would have landed.

h is chosen on training samples held out, never on the test set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
from matplotlib.figure import Figure

from reproductions.evidence.claims import (
    NOT_RUN,
    POINT,
    REFUTED,
    SUPPORTED,
    UNDECIDED,
    Pair,
    Results,
    Row,
    compare,
    compare_spreads,
    describe,
    fails_often,
    failures,
    network,
)
from reproductions.evidence.statistics import Estimate
from reproductions.evidence.style import (
    BLUE,
    GREY,
    VERMILLION,
    by_preset,
    chance,
    finish,
    points,
    ran,
    row_of_panels,
    ticks,
)
from reproductions.presets import IMAGES, TEXTS, Part
from reproductions.trial import CALIBRATE, RULES, Trial

TITLE = "Fig. 6: the choice of h"
IMAGE_H = (0.001, 0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
TEXT_H = (0.001, 0.01, 0.1, 0.3, 0.5, 0.8, 1.0)
NETWORKS: dict[str, tuple[tuple[str, int], ...]] = {
    "smoke": (("resnet", 20),),
    "cpu": (("resnet", 20), ("resnet", 56)),
    "small": (("resnet", 20), ("resnet", 56)),
    "paper": (("resnet", 110), ("resnet", 20), ("vdcnn", 49), ("vdcnn", 17), ("resnet", 218)),
    "gpu": (("resnet", 110),),
}
HELD_OUT = {"smoke": 64, "cpu": 500, "small": 5000, "paper": 5000, "gpu": 5000}
ALSO = ("gpu",)
# What chooses h without any training. In VDCNN gradients grow more than twofold by its pooling, at any h: there is
# nothing to calibrate by.
CHOICES: dict[str, tuple[str, ...]] = {"resnet": (*RULES, CALIBRATE), "vdcnn": (*RULES,)}
FAILURE_SEEDS, FAILURE_EPOCHS = 10, 3
# The paper's best h, as ranges; "near" is read as within a factor of 2.
CLAIMED = {
    ("resnet", 20): (0.1, 2.0),
    ("resnet", 110): (0.05, 0.2),
    ("resnet", 218): (0.05, 0.2),
    ("vdcnn", 17): (0.25, 1.0),
    ("vdcnn", 49): (0.15, 0.6),
}
# The claims of the paper that the report begins with.
PRIMARY = {
    ("resnet", 110, "best"): "Fig. 6: the best h of ResNet-110 lies near 0.1",
    ("resnet", 20, "best"): "Fig. 6: the best h of ResNet-20 lies within 0.1 to 2",
    ("resnet", 110, "failures"): "Fig. 6: trainings of ResNet-110 fail often at h of 5 and more",
}


def grid_of(preset: str, model: str) -> tuple[float | str, ...]:
    values = TEXT_H if model == "vdcnn" else IMAGE_H
    return ((0.01, 0.1, 1.0) if preset == "smoke" else values) + CHOICES[model]


def cell(preset: str, model: str, depth: int, h: float | str) -> Trial:
    scale: Part = (TEXTS if model == "vdcnn" else IMAGES)[preset]
    return Trial(**{**scale, "depth": depth, "h": h, "held_out": HELD_OUT[preset]})


def short(preset: str, model: str, depth: int, h: float | str) -> Trial:
    """Three epochs, to see whether the training fails."""
    scale: Part = (TEXTS if model == "vdcnn" else IMAGES)[preset]
    epochs = 1 if preset == "smoke" else FAILURE_EPOCHS
    return Trial(**{**scale, "depth": depth, "h": h, "epochs": epochs, "milestones": (), "probes": ()})


def trials(preset: str, seeds: int) -> list[Trial]:
    """The grid of h in full, and the short trainings in which failures are counted."""
    full = [
        Trial(**{**vars(cell(preset, model, depth, h)), "seed": seed})
        for model, depth in NETWORKS[preset]
        for h, seed in product(grid_of(preset, model), range(seeds))
    ]
    counted = [
        Trial(**{**vars(short(preset, model, depth, h)), "seed": seed})
        for model, depth in NETWORKS[preset]
        for h, seed in product(grid_of(preset, model), range(1 if preset == "smoke" else FAILURE_SEEDS))
        if not isinstance(h, str)
    ]
    return counted + full


def best(results: Results, preset: str, model: str, depth: int) -> float | None:
    """The number with the best median validation accuracy; ties go to the smaller one."""
    numbers = [h for h in grid_of(preset, model) if not isinstance(h, str)]
    medians = {h: np.median(found) for h in numbers if (found := _validation(results, preset, model, depth, h))}
    return max(medians, key=lambda h: (medians[h], -h)) if len(medians) > 1 else None


def _validation(results: Results, preset: str, model: str, depth: int, h: float | str) -> list[float]:
    return results.column(cell(preset, model, depth, h), "validation_accuracy")


def claims(results: Results, preset: str) -> list[Row]:
    rows = []
    for model, depth in NETWORKS[preset]:
        chosen = best(results, preset, model, depth)
        if (model, depth) in CLAIMED:
            rows.append(_place(results, preset, model, depth, chosen))
        if chosen is not None:
            rows += _beside(results, preset, model, depth, chosen)
        rows.append(_failures(results, preset, model, depth))
    for model in dict.fromkeys(model for model, _ in NETWORKS[preset]):
        depths = sorted(depth for other, depth in NETWORKS[preset] if other == model)
        if len(depths) > 1:
            rows.append(_smaller_with_depth(results, preset, model, depths))
    return rows


def _beside(results: Results, preset: str, model: str, depth: int, chosen: float) -> list[Row]:
    """The h that held-out samples choose beside others: 1, very small ones, a large one, those of rules."""

    def against(h: float | str) -> list[Pair]:
        return [(cell(preset, model, depth, h), cell(preset, model, depth, chosen))]

    start = f"{model} {depth}: "
    claim = f"{start}the h chosen on held-out samples ({chosen:g}) tests better than h = 1"
    rows = [compare(results, claim, against(1.0), "test_accuracy")]
    for small in (0.001, 0.01):
        rows.append(compare(results, f"{start}h = {small:g} tests worse than that", against(small), "test_accuracy"))
    if depth == 20:
        claim = f"{start}h = 2 is tolerated: it tests less than a point worse than that"
        pair = [(cell(preset, model, depth, chosen), cell(preset, model, depth, 2.0))]
        rows.append(compare(results, claim, pair, "test_accuracy", margin=POINT))
    numbers = [h for h in grid_of(preset, model) if not isinstance(h, str)]
    steady = [(cell(preset, model, depth, 1.0), cell(preset, model, depth, h)) for h in numbers if h <= 0.1]
    claim = f"{start}at small h (up to 0.1) accuracy varies less over seeds than at h = 1"
    rows.append(compare_spreads(results, claim, steady, "test_accuracy"))
    for rule in CHOICES[model]:
        pair = [(cell(preset, model, depth, chosen), cell(preset, model, depth, rule))]
        landed = [h for h in results.column(pair[0][1], "h") if np.isfinite(h)]
        shown = f"{rule} ({np.median(landed):.3g})" if landed else rule
        claim = f"{start}h = {shown} tests less than a point worse than that (beyond the paper)"
        rows.append(compare(results, claim, pair, "test_accuracy", margin=POINT))
    return rows


def _failures(results: Results, preset: str, model: str, depth: int) -> Row:
    """Whether more than a fifth of the trainings fail at large h, of those that were run.

    It is not judged by fewer than all seeds of each.
    """
    large: tuple[float, ...] = (0.8, 1.0) if model == "vdcnn" else (5.0, 10.0, 20.0)
    counts = {h: failures(results, short(preset, model, depth, h)) for h in large}
    counts = {h: count for h, count in counts.items() if count[1]} or counts
    large = tuple(counts)
    claim = f"{model} {depth}: trainings fail often at h of {', '.join(f'{h:g}' for h in large)} (more than a fifth)"
    primary = PRIMARY.get((model, depth, "failures"), "")
    seeds = min(total for _, total in counts.values())
    run = describe([short(preset, model, depth, 1.0)], seeds, results)
    if not seeds:
        return Row(claim, run, "", NOT_RUN, primary=primary)
    row = fails_often(claim, run, counts, 0.2, primary)
    failed, total = failures(results, short(preset, model, depth, 0.1))
    if total:
        row = replace(row, outcome=f"h = 0.1: {failed} of {total} fail; {row.outcome}")
    return row if seeds == FAILURE_SEEDS else replace(row, verdict=UNDECIDED, p=None)


def _smaller_with_depth(results: Results, preset: str, model: str, depths: list[int]) -> Row:
    """Whether the best h falls with depth; medians choose it once a depth, so that nothing says how sure that is."""
    claim = f"{model}: a deeper network wants a smaller h"
    run = describe([cell(preset, model, depth, 1.0) for depth in depths], 0)
    chosen = {depth: best(results, preset, model, depth) for depth in depths}
    if any(h is None for h in chosen.values()):
        return Row(claim, run, "", NOT_RUN)
    outcome = "best h on held-out samples " + ", ".join(f"{h:g} at {depth}" for depth, h in chosen.items())
    falls = (chosen[depths[0]] or 0.0) > (chosen[depths[-1]] or 0.0)
    return Row(claim, run, outcome, UNDECIDED if falls else REFUTED)


def _place(results: Results, preset: str, model: str, depth: int, chosen: float | None) -> Row:
    """Whether the best h lies where the paper says: no h outside of its range is as good."""
    low, high = CLAIMED[model, depth]
    claim = f"{model} {depth}: the best h lies within {low:g} to {high:g}"
    run = describe([cell(preset, model, depth, 1.0)], len(_validation(results, preset, model, depth, 1.0)))
    primary = PRIMARY.get((model, depth, "best"), "")
    if chosen is None:
        return Row(claim, run, "", NOT_RUN, primary=primary)
    inside = low <= chosen <= high
    doubtful = False
    numbers = [h for h in grid_of(preset, model) if not isinstance(h, str)]
    for h in numbers:
        if (low <= h <= high) != inside:
            a, b = (results.values(cell(preset, model, depth, value), "validation_accuracy") for value in (h, chosen))
            gaps = [b[seed] - a[seed] for seed in a.keys() & b.keys()]
            doubtful |= bool(gaps) and Estimate.of(gaps).low <= 0
    outcome = f"best median on held-out samples at h = {chosen:g}" + (", others as good" if doubtful else "")
    word = UNDECIDED if doubtful else SUPPORTED if inside else REFUTED
    return Row(claim, run, outcome, word, primary=primary)


def figures(results: Results) -> Iterator[tuple[str, Figure]]:
    return by_preset("select", results, _figure, ALSO)


def _figure(results: Results, preset: str) -> Figure | None:
    networks = [
        (model, n)
        for model, n in NETWORKS[preset]
        if results.has(one(preset, model, n, h) for h in grid_of(preset, model) for one in (cell, short))
    ]
    if not networks:
        return None
    figure, panels = row_of_panels(len(networks), 4.0)
    rights = [axes.twinx() for axes in panels]
    drawn: list[Trial] = []
    for axes, right, (model, n) in zip(panels, rights, networks, strict=True):
        grid = [h for h in grid_of(preset, model) if not isinstance(h, str)]
        cells = {float(x): cell(preset, model, n, h) for x, h in enumerate(grid)}
        points(axes, results, cells, "test_accuracy", "test accuracy (left)", (BLUE, "s", "-"))
        drawn += [*cells.values(), *(short(preset, model, n, h) for h in grid)]
        chance(axes, cells[0.0], "test_accuracy")
        counts = [failures(results, short(preset, model, n, h)) for h in grid]
        shares = [failed / total if total else np.nan for failed, total in counts]
        label = "share of failed trainings (right)"
        right.bar(range(len(grid)), shares, color=VERMILLION, alpha=0.25, hatch="//", edgecolor=VERMILLION, label=label)
        uncounted = [x for x, share in enumerate(shares) if np.isnan(share)]
        if uncounted:
            right.scatter(uncounted, [0.03] * len(uncounted), color=GREY, marker="$?$", label="failures not counted")
        for rule in CHOICES[model]:
            landed = [h for h in results.column(cell(preset, model, n, rule), "h") if np.isfinite(h)]
            if landed:
                x = float(np.interp(np.log(np.median(landed)), np.log(grid), range(len(grid))))
                axes.axvline(x, color=GREY, linewidth=0.8, linestyle=":")
                axes.text(x, 0.99, f" {rule}", rotation=90, ha="right", va="top", fontsize=7, color=GREY,
                          transform=axes.get_xaxis_transform())  # fmt: skip
        ticks(axes, grid)
        axes.tick_params(axis="x", labelrotation=60)
        axes.set(xlabel="h", ylabel="test accuracy, last epoch", ylim=(0, None), zorder=2)
        axes.patch.set_visible(False)
        right.set(ylabel="failed, of short trainings", ylim=(0, 1.05))
        right.spines["right"].set_visible(True)
        axes.set_title(f"{network(cells[0.0])}", loc="left")
    return finish(figure, [*panels, *rights], ran(results, dict.fromkeys(drawn)))
