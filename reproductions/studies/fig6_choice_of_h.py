"""Fig. 6: accuracy over h, the share of failed trainings, and where rules for h would have landed.

h is chosen on training samples held out, never on the test set.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
from matplotlib.figure import Figure

from reproductions.evidence.claims import (
    NOT_RUN,
    POINT,
    REFUTED,
    SUPPORTED,
    UNDECIDED,
    Results,
    Row,
    compare,
    compare_spreads,
    describe,
    failures,
)
from reproductions.evidence.statistics import mean_interval
from reproductions.evidence.style import BLUE, GREY, VERMILLION, by_preset, finish, points, row_of_panels, ticks
from reproductions.presets import IMAGES, TEXTS, Part
from reproductions.trial import CALIBRATE, RULES, Trial

TITLE = "Fig. 6: the choice of h"
IMAGE_H = (0.001, 0.01, 0.03, 0.1, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
TEXT_H = (0.001, 0.01, 0.1, 0.3, 0.5, 0.8, 1.0)
NETWORKS: dict[str, tuple[tuple[str, int], ...]] = {
    "smoke": (("resnet", 20),),
    "cpu": (("resnet", 20), ("resnet", 56)),
    "small": (("resnet", 20), ("resnet", 56)),
    "paper": (("resnet", 110), ("resnet", 20), ("vdcnn", 49), ("vdcnn", 17), ("resnet", 218)),
}
HELD_OUT = {"smoke": 64, "cpu": 500, "small": 5000, "paper": 5000}
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
        cells = [cell(preset, model, depth, h) for h in grid_of(preset, model)]
        chosen = best(results, preset, model, depth)
        if (model, depth) in CLAIMED:
            rows.append(_place(results, preset, model, depth, chosen))
        if chosen is not None:
            pair = [(cell(preset, model, depth, 1.0), cell(preset, model, depth, chosen))]
            claim = f"{model} {depth}: the h chosen on held-out samples ({chosen:g}) tests better than h = 1"
            rows.append(compare(results, claim, pair, "test_accuracy"))
            for small in (0.001, 0.01):
                low = [(cell(preset, model, depth, small), cell(preset, model, depth, chosen))]
                claim = f"{model} {depth}: h = {small:g} tests worse than that"
                rows.append(compare(results, claim, low, "test_accuracy"))
            if depth == 20:
                large = [(cell(preset, model, depth, chosen), cell(preset, model, depth, 2.0))]
                claim = f"{model} {depth}: h = 2 is tolerated: it tests less than a point worse than that"
                rows.append(compare(results, claim, large, "test_accuracy", margin=POINT))
            numbers = [h for h in grid_of(preset, model) if not isinstance(h, str)]
            steady = [(cell(preset, model, depth, 1.0), cell(preset, model, depth, h)) for h in numbers if h <= 0.1]
            claim = f"{model} {depth}: at small h (up to 0.1) accuracy varies less over seeds than at h = 1"
            rows.append(compare_spreads(results, claim, steady, "test_accuracy"))
            for rule in CHOICES[model]:
                pair = [(cell(preset, model, depth, chosen), cell(preset, model, depth, rule))]
                landed = results.column(pair[0][1], "h")
                shown = f"{rule} ({np.median(landed):.3g})" if landed else rule
                claim = f"{model} {depth}: h = {shown} tests worse than that"
                rows.append(compare(results, claim, pair, "test_accuracy", higher=False))
        large = (1.0, 0.8) if model == "vdcnn" else (5.0, 10.0, 20.0)
        counts = {h: failures(results, short(preset, model, depth, h)) for h in (*large, 0.1)}
        claim = f"{model} {depth}: trainings fail often at h of {', '.join(f'{h:g}' for h in sorted(large))}"
        seeds = min(counts[h][1] for h in large)
        if not seeds:
            rows.append(Row(claim, describe(cells, 0), "", NOT_RUN))
            continue
        failed = sum(counts[h][0] for h in large) / sum(counts[h][1] for h in large)
        outcome = "; ".join(f"h = {h:g}: {n} of {total} fail" for h, (n, total) in sorted(counts.items()) if total)
        many = [1.0] * sum(counts[h][0] for h in large) + [0.0] * sum(counts[h][1] - counts[h][0] for h in large)
        _, low_end, high_end = mean_interval(many)
        word = SUPPORTED if low_end > 0.2 else REFUTED if high_end < 0.2 else UNDECIDED
        word = word if seeds == FAILURE_SEEDS else UNDECIDED
        run = describe([short(preset, model, depth, 1.0)], seeds)
        rows.append(Row(f"{claim} (more than a fifth)", run, f"{outcome}; {failed:.0%} at the large ones", word))
    for model in dict.fromkeys(model for model, _ in NETWORKS[preset]):
        depths = sorted(depth for other, depth in NETWORKS[preset] if other == model)
        if len(depths) > 1:
            rows.append(_smaller_with_depth(results, preset, model, depths))
    return rows


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
    if chosen is None:
        return Row(claim, run, "", NOT_RUN)
    inside = low <= chosen <= high
    doubtful = False
    numbers = [h for h in grid_of(preset, model) if not isinstance(h, str)]
    for h in numbers:
        if (low <= h <= high) != inside:
            a, b = (results.values(cell(preset, model, depth, value), "validation_accuracy") for value in (h, chosen))
            gaps = [b[seed] - a[seed] for seed in a.keys() & b.keys()]
            doubtful |= bool(gaps) and (len(gaps) < 2 or mean_interval(gaps)[1] <= 0)
    outcome = f"best median on held-out samples at h = {chosen:g}" + (", others as good" if doubtful else "")
    return Row(claim, run, outcome, UNDECIDED if doubtful else SUPPORTED if inside else REFUTED)


def figures(results: Results) -> Iterator[tuple[str, Figure]]:
    return by_preset("select", results, _figure)


def _figure(results: Results, preset: str) -> Figure | None:
    networks = [
        (model, n)
        for model, n in NETWORKS[preset]
        if results.has(one(preset, model, n, h) for h in grid_of(preset, model) for one in (cell, short))
    ]
    if not networks:
        return None
    figure, panels = row_of_panels(len(networks))
    for axes, (model, n) in zip(panels, networks, strict=True):
        grid = [h for h in grid_of(preset, model) if not isinstance(h, str)]
        cells = {float(x): cell(preset, model, n, h) for x, h in enumerate(grid)}
        points(axes, results, cells, "test_accuracy", "test accuracy", (BLUE, "s", "-"))
        counts = [failures(results, short(preset, model, n, h)) for h in grid]
        shares = [failed / total if total else np.nan for failed, total in counts]
        axes.bar(range(len(grid)), shares, color=VERMILLION, alpha=0.25, label="share of failed trainings")
        uncounted = [x for x, share in enumerate(shares) if np.isnan(share)]
        if uncounted:
            axes.scatter(uncounted, [0.03] * len(uncounted), color=GREY, marker="$?$", label="failures not counted")
        for rule in CHOICES[model]:
            landed = results.column(cell(preset, model, n, rule), "h")
            if landed:
                x = float(np.interp(np.log(np.median(landed)), np.log(grid), range(len(grid))))
                axes.axvline(x, color=GREY, linewidth=0.8, linestyle=":")
                axes.text(x, 0.99, f" {rule}", rotation=90, ha="right", va="top", fontsize=7, color=GREY)
        ticks(axes, grid)
        axes.tick_params(axis="x", labelrotation=60)
        axes.set(xlabel="h", ylim=(0, 1))
        axes.set_title(f"{model} {n}", loc="left")
    return finish(figure, panels)
