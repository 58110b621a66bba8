"""Depth transfer: a rate tuned at depth 4, used at depth 64. Does the learning rate still fit, and does depth pay?

A pre-norm GPT of Hugging Face, patched in one line, reads the bytes of AG-NEWS. A depth is a number of blocks, which
add twice each; the base has 4. All that is claimed below, and what decides it, was written before any of it was run.

**Three numbers decide**, each by arm, at the rate that is best (mean over seeds, on the grid) at the arm's base depth:

1. *Loss at depth*: held-out loss deep minus at base, paired by seed. Below 0, depth pays.
2. *Regret*: held-out loss at that rate minus at the deep network's own best rate on the grid, paired by seed. What is
   below 0.01 nats is small: in a pilot (two seeds of other data) seeds differed by 0.004 to 0.008.
3. *Shift* of the best rate in octaves, deep minus base, by seed: the vertex of the parabola through the best rate of
   the grid and its two neighbours. Within half an octave it is small.

With them stands the *edge of trainability*: the largest rate of the grid up to which no training fails. A training
fails when its held-out loss is not finite, or less than 0.05 nats below what the frequencies of the labels give.

**Hypotheses, primary** (AdamW, initial weights of width^-0.5, 150 iterations, depth 4 against 64): with h = 4/D the
loss falls with depth; with h = 1 it rises; at depth 64 h = 4/D ends below h = 1, each at the rate of depth 4; its
regret is small, and its shift is; those of h = 1 are not. *Secondary*: h = 4/D ends below zero-initialised output
projections, below GPT-2's own initialisation, and below Depth-muP's 1/sqrt(D). The pilot speaks against what concerns
the shift and the regret of h = 1.

**The title**: "Train deeper with the learning rate you have", if regret and shift of 4/D are small, and regret or shift
of h = 1 is not; else "Depth that pays", if with 4/D the loss falls and ends below that of h = 1; else neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reproductions.evidence.claims import HOLDS, NOT_RUN, REFUTED, SUPPORTED, UNDECIDED, VIOLATED, Results, Row
from reproductions.evidence.statistics import Estimate
from reproductions.evidence.style import BLUE, GREEN, GREY, ORANGE, VERMILLION
from reproductions.training.depth_cells import BASE, Cell

TITLE = "Beyond the paper: the learning rate of a shallow network in a deep one"
DEEP = {"smoke": 8, "desk": 64, "gpu": 64}
DEPTHS = (2, 4, 8, 16, 32, 64)
SMALL_REGRET, SMALL_SHIFT = 0.01, 0.5  # nats, octaves
SEEDS = 3


# ---- what is compared: how depth changes a cell of the base depth
ARMS = ("h = 1", "4/D", "zero", "gpt2", "Depth-muP", "2/sqrt(D)")
AFTERWARDS = "4/D, zero"  # both: added when the others had been seen, so it decides nothing
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"optimizer": "sgd"},
    "0.02": {"initial": 0.02},
    "long": {"iterations": 1000},
    "vit": {"model": "vit", "iterations": 300},
    "wide": {"width": 256, "initial": 256**-0.5, "texts": 32, "context": 128, "iterations": 300, "precision": "tf32"},
}
GRIDS: dict[str, tuple[float, ...]] = {
    "adamw": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "sgd": (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8),
    "0.02": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "long": (4e-3,),
    "vit": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "wide": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
}
HALVES = (1.4e-3, 2.8e-3, 5.7e-3, 1.13e-2)  # between those of `adamw`, near the best
TUNED = {"0.02": 1e-3, "sgd": 0.05, "vit": 5e-4}  # the rate of each grid that was best at the base


def cell(arm: str, depth: int, learning_rate: float, setting: str = "adamw", seed: int = 0) -> Cell:
    """A training of an arm. At the base depth the arms of h are one.

    m is how many times deeper than the base it is. `4/D` is CompleteP (arXiv:2505.01618, Table 1 and Eq. 40: epsilon
    of the blocks / m; under SGD their rate x m, by the same condition); `Depth-muP` (arXiv:2310.02244) is 1/sqrt(m)
    with, under Adam, the rate of the blocks / sqrt(m); `2/sqrt(D)` is its factor alone.
    """
    m = depth / BASE
    plain = Cell(depth=depth, learning_rate=learning_rate, seed=seed, **SETTINGS[setting])
    adam = plain.optimizer == "adamw"
    if arm in ("zero", "gpt2"):
        return replace(plain, projections="zero" if arm == "zero" else "gpt2")
    if arm == AFTERWARDS:
        return replace(cell("4/D", depth, learning_rate, setting, seed), projections="zero")
    if arm == "4/D":
        return replace(plain, h=1 / m, hidden_rate=1.0 if adam else m, hidden_epsilon=1 / m if adam else 1.0)
    if arm == "Depth-muP":
        rate, epsilon = (m**-0.5, m**-0.5) if adam else (1.0, 1.0)
        return replace(plain, h=m**-0.5, hidden_rate=rate, hidden_epsilon=epsilon)
    return replace(plain, h=m**-0.5) if arm == "2/sqrt(D)" else plain


def cells(preset: str, seeds: int = SEEDS) -> list[Cell]:
    """The cells, those that tell most first; a seed of all comes before the next only within a part."""

    def part(
        arms: Iterable[str], depths: Iterable[int], rates: Iterable[float], setting: str = "adamw", more: int = 0
    ) -> list[Cell]:
        grid = product(range(seeds + more), depths, rates, arms)
        return [cell(arm, depth, rate, setting, seed) for seed, depth, rate, arm in grid]

    deep, adamw = DEEP[preset], GRIDS["adamw"]
    if preset == "smoke":
        one = part(("h = 1", "4/D"), (BASE, deep), (2e-3, 4e-3, 8e-3))
        return list(dict.fromkeys(replace(each, iterations=5) for each in one))
    five, ends, sgd = ARMS[:5], ("h = 1", "4/D"), ("h = 1", "4/D", "Depth-muP")
    if preset == "gpu":  # each rate of the base, of which the middle ones at depth: the best is expected among them
        four, wide = ("h = 1", "4/D", "Depth-muP", "zero"), GRIDS["wide"]
        some = part(("h = 1", "zero"), (BASE,), wide, "wide") + part(four, (deep,), wide[1:4], "wide")
        return list(dict.fromkeys(some + part(four, (deep,), wide[4:5], "wide")))
    parts = [
        part(ARMS[:4], (BASE,), adamw),
        part(five, (deep,), adamw[2:5]),  # the primary hypotheses: around the best rate of the base
        part(five, (deep,), (adamw[1], adamw[5])),
        part(ends, (16,), adamw[1:6]),
        part(sgd, (BASE, 16), GRIDS["sgd"], "sgd"),
        part(ends, (BASE, 16), GRIDS["long"], "long"),
        part(ends, (BASE, 16), GRIDS["0.02"], "0.02"),
        part(ARMS[:3], (BASE, 16), GRIDS["vit"], "vit"),
        part(five, (2, 8), adamw[1:6]),
        part(five, (16,), adamw[1:6]),
        part(five, (deep,), (adamw[0], adamw[6])),
        part(ends, (BASE, 16), HALVES),
        part(five, (32,), adamw[1:6]),
        part(ARMS, (deep,), adamw[2:5]),
        part(ends, (BASE, deep), (4e-3,), more=2),
        # Added when the rest had been seen: half octaves at depth too, and the other settings at 64 blocks, each at the
        # rate that was best at its base.
        part(ends, (deep,), HALVES[:3]),
        *(part(ends, (BASE, 16, deep), (rate,), setting, more=2) for setting, rate in TUNED.items()),
    ]
    return list(dict.fromkeys(each for some in parts for each in some))


# ---- the three numbers, and the edge
Losses = dict[float, dict[int, float]]  # by learning rate and seed


def losses(results: Results, arm: str, depth: int, setting: str) -> Losses:
    """The held-out losses there are of an arm at a depth; a training that diverged is infinitely bad."""
    rates = sorted({*GRIDS[setting], *(HALVES if setting == "adamw" else ())})
    found = {rate: results.values(cell(arm, depth, rate, setting), "test_loss") for rate in rates}
    return {
        rate: {seed: value if math.isfinite(value) else math.inf for seed, value in by_seed.items()}
        for rate, by_seed in found.items()
        if by_seed
    }


def best_rate(some: Losses) -> float:
    """The learning rate with the smallest mean loss over the seeds of the grid, of those that most were run at."""
    grid = {rate: [loss for seed, loss in of.items() if seed < SEEDS] for rate, of in some.items()}
    most = max(map(len, grid.values()))
    return min((rate for rate in grid if len(grid[rate]) == most), key=lambda rate: float(np.mean(grid[rate])))


def vertex(some: Losses, seed: int) -> tuple[float, bool]:
    """Of one seed, log2 of the learning rate at which the parabola through the best and its neighbours is lowest.

    Where the best one is the first or the last that was run it is that one, and the second value is False.

    Example:
        >>> vertex({1.0: {0: 2.0}, 2.0: {0: 1.0}, 4.0: {0: 2.0}}, 0), vertex({1.0: {0: 1.0}, 2.0: {0: 2.0}}, 0)
        ((1.0, True), (0.0, False))
    """
    rates = sorted(rate for rate in some if seed in some[rate])
    values = [some[rate][seed] for rate in rates]
    at = int(np.argmin(values))
    if at in (0, len(rates) - 1):
        return math.log2(rates[at]), False
    x = [math.log2(rate) for rate in rates[at - 1 : at + 2]]
    a, b, _ = np.polyfit(x, values[at - 1 : at + 2], 2)
    return (float(-b / (2 * a)), True) if math.isfinite(a) and a > 0 else (x[1], True)


def three_numbers(results: Results, arm: str, depth: int, setting: str) -> dict[str, list[float]] | None:
    """By seed: loss at depth, regret, shift; and, as 1 and 0, whether a shift is no more than a bound."""
    base, deep = losses(results, arm, BASE, setting), losses(results, arm, depth, setting)
    if not base or not deep or (rate := best_rate(base)) not in deep:
        return None
    own = best_rate(deep)
    seeds = sorted(deep[rate].keys() & deep[own].keys() & base[rate].keys() & set(range(SEEDS)))
    vertices = [(vertex(base, seed), vertex(deep, seed)) for seed in seeds]
    return {
        "loss at depth": [
            deep[rate][seed] - base[rate][seed] for seed in sorted(base[rate].keys() & deep[rate].keys())
        ],
        "regret": [deep[rate][seed] - deep[own][seed] for seed in seeds],
        "shift": [found[0] - before[0] for before, found in vertices],
        "bounded": [float(not (before[1] and found[1])) for before, found in vertices],
    }


def edge(results: Results, arm: str, depth: int, setting: str) -> float:
    """The largest learning rate up to which no training failed, from the smallest on; 0 where that one does."""
    reached = 0.0
    for rate in GRIDS[setting]:
        failed = results.column(cell(arm, depth, rate, setting), "failed")
        if any(failed):
            break
        reached = rate if failed else reached
    return reached


# ---- what is claimed
def claims(results: Results, preset: str) -> list[Row]:
    rows = [
        _number(results, "with h = 4/D the loss falls with depth", "4/D", "loss at depth", below=0.0),
        _number(results, "with h = 1 the loss rises with depth", "h = 1", "loss at depth", above=0.0),
        _against(results, "4/D ends below h = 1", "h = 1"),
        _number(results, "with h = 4/D the regret is small", "4/D", "regret", below=SMALL_REGRET),
        _number(results, "with h = 1 the regret is not small", "h = 1", "regret", above=SMALL_REGRET),
        _number(results, "with h = 4/D the best rate hardly shifts", "4/D", "shift", within=SMALL_SHIFT),
        _number(results, "with h = 1 the best rate shifts", "h = 1", "shift", beyond=SMALL_SHIFT),
        _against(results, "4/D ends below zero-initialised projections (secondary)", "zero"),
        _against(results, "4/D ends below GPT-2's own initialisation (secondary)", "gpt2"),
        _against(results, "4/D ends below Depth-muP (secondary)", "Depth-muP"),
    ]
    for arm in ("zero", "gpt2", "Depth-muP"):
        rows.append(_number(results, f"{arm}: the loss falls with depth (beside)", arm, "loss at depth", below=0.0))
    rows += [_edges(results, arm) for arm in LOOKS]
    deep = DEEP["desk"]
    for setting, words, depth in (
        ("long", "1,000 iterations", 16),
        *(("sgd", "SGD", depth) for depth in (16, deep)),
        *(("0.02", "initial weights of 0.02", depth) for depth in (16, deep)),
        *(("vit", "a ViT on CIFAR-10", depth) for depth in (16, deep)),
        ("wide", "width 256, on a GPU", DEEP["gpu"]),
    ):
        claim = f"{words}, depth {depth}: with h = 4/D the loss falls with depth (beside)"
        rows.append(_number(results, claim, "4/D", "loss at depth", depth, setting, below=0.0))
        rows.append(
            _against(results, f"{words}, depth {depth}: 4/D ends below h = 1 (beside)", "h = 1", depth, setting)
        )
    return rows


def title(rows: Sequence[Row]) -> str:
    """The title that the rule written above gives."""
    verdicts = {row.claim: row.verdict for row in rows}

    def holds(part: str) -> bool:
        return any(part in claim and verdict == SUPPORTED for claim, verdict in verdicts.items())

    small = holds("4/D the regret is small") and holds("4/D the best rate hardly shifts")
    if small and (holds("h = 1 the regret is not small") or holds("h = 1 the best rate shifts")):
        return "Train deeper with the learning rate you have"
    if holds("with h = 4/D the loss falls with depth") and holds("4/D ends below h = 1"):
        return "Depth that pays"
    return "A factor that falls with depth"


def _run(arms: str, depth: int, setting: str, seeds: int) -> str:
    what = "ViT" if setting == "vit" else "GPT"
    return f"{what}, {setting}, {arms}, depths {BASE} and {depth}, {seeds} seed{'s' if seeds != 1 else ''}"


def _number(
    results: Results,
    claim: str,
    arm: str,
    name: str,
    depth: int = DEEP["desk"],
    setting: str = "adamw",
    *,
    below: float | None = None,
    above: float | None = None,
    within: float | None = None,
    beyond: float | None = None,
) -> Row:
    """Whether the interval of one of the numbers lies below or above something, or within it on both sides."""
    found = three_numbers(results, arm, depth, setting)
    if found is None or not found[name]:
        return Row(claim, _run(arm, depth, setting, 0), "", NOT_RUN)
    one = Estimate.of(found[name])
    mean, low, high = one.mean, one.low, one.high
    outcome = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
    if name == "shift":
        outcome += " octaves"
        if any(found["bounded"]):
            outcome += f"; of {sum(found['bounded']):.0f} seeds the best rate is the first or last that was run"
    if within is not None:
        yes, no = -within < low and high < within, high < -within or low > within
        yes = yes and not any(found["bounded"])
    elif beyond is not None:
        yes, no = high < -beyond or low > beyond, -beyond < low and high < beyond and not any(found["bounded"])
    elif below is not None:
        yes, no = high < below, low > below
    else:
        assert above is not None
        yes, no = low > above, high < above
    word = SUPPORTED if yes else REFUTED if no else UNDECIDED
    return Row(claim, _run(arm, depth, setting, len(found[name])), outcome, word if len(found[name]) > 1 else UNDECIDED)


def _edges(results: Results, arm: str, setting: str = "adamw") -> Row:
    """Whether a deep network still trains at all rates up to the largest at which the base does."""
    claim = f"{arm}: trainings fail at no lower rate than at the base (beside)"
    base, deep = (edge(results, arm, depth, setting) for depth in (BASE, DEEP["desk"]))
    if not base or not losses(results, arm, DEEP["desk"], setting):
        return Row(claim, _run(arm, DEEP["desk"], setting, 0), "", NOT_RUN)
    outcome = f"none up to {base:g} -> up to {deep:g}, of {max(GRIDS[setting]):g}"
    return Row(claim, _run(arm, DEEP["desk"], setting, SEEDS), outcome, HOLDS if deep >= base else VIOLATED)


def _against(results: Results, claim: str, other: str, depth: int = DEEP["desk"], setting: str = "adamw") -> Row:
    """Whether 4/D ends below another arm, each at the rate that is best at its base."""
    ends = []
    for arm in (other, "4/D"):
        base = losses(results, arm, BASE, setting)
        deep = losses(results, arm, depth, setting)
        ends.append(deep.get(best_rate(base), {}) if base else {})
    seeds = sorted(ends[0].keys() & ends[1].keys())
    if not seeds:
        return Row(claim, _run(f"{other} -> 4/D", depth, setting, 0), "", NOT_RUN)
    one = Estimate.of([ends[1][seed] - ends[0][seed] for seed in seeds])
    levels = " -> ".join(f"{np.mean([end[seed] for seed in seeds]):.3f}" for end in ends)
    word = SUPPORTED if one.high < 0 else REFUTED if one.low > 0 else UNDECIDED
    run = _run(f"{other} -> 4/D", depth, setting, len(seeds))
    return Row(claim, run, f"{levels}; {one.mean:+.3f} ({one.low:+.3f} to {one.high:+.3f})", word)


# ---- the pictures
LOOKS = {
    "h = 1": (VERMILLION, "o"),
    "4/D": (BLUE, "s"),
    "zero": (ORANGE, "^"),
    "gpt2": (GREY, "v"),
    "Depth-muP": (GREEN, "D"),
}
NAMES = {
    "zero": "h = 1, output projections start at 0",
    "gpt2": "h = 1, GPT-2's start, 1/sqrt(2 depth)",
    "4/D": "h = 4/D",
}


def figures(results: Results) -> Iterator[tuple[str, Figure]]:
    if any(losses(results, arm, DEEP["desk"], "adamw") for arm in LOOKS):
        yield "transfer", _picture(results)


def _picture(results: Results) -> Figure:
    """Loss over the learning rate for each depth, a panel an arm; and over depth, at the rate of the base."""
    figure, grid = plt.subplots(2, 3, figsize=(11.5, 6.6))
    panels = [axes for axes in grid.flat]
    for axes, arm in zip(panels, LOOKS, strict=False):
        _rates(axes, results, arm)
    low, high = zip(*(axes.get_ylim() for axes in panels[:5]), strict=True)
    for axes in panels[:5]:
        axes.set_ylim(min(low), max(high))
    _over_depth(panels[5], results)
    panels[0].legend(title="depth", fontsize=8, title_fontsize=8, ncols=2, loc="upper left")
    for axes in (panels[0], panels[3]):
        axes.set_ylabel("held-out loss, nats a byte")
    figure.tight_layout(h_pad=1.5, w_pad=1.5)
    return figure


def _rates(axes: Axes, results: Results, arm: str) -> None:
    shades = plt.get_cmap("viridis_r")(np.linspace(0.15, 1.0, len(DEPTHS)))
    for depth, color in zip(DEPTHS, shades, strict=True):
        found = {  # the seeds that all rates have
            rate: [loss for seed, loss in by_seed.items() if seed < SEEDS]
            for rate, by_seed in losses(results, arm, depth, "adamw").items()
        }
        if len(found) > 2:
            axes.plot(list(found), [np.mean(v) for v in found.values()], ".-", color=color, label=str(depth))
            for rate, values in found.items():
                axes.scatter([rate] * len(values), values, s=7, color=color, alpha=0.4, linewidths=0)
    if base := losses(results, arm, BASE, "adamw"):
        axes.axvline(best_rate(base), color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="learning rate")
    axes.set_title(NAMES.get(arm, arm), loc="left")


def _over_depth(axes: Axes, results: Results) -> None:
    for arm, (color, marker) in LOOKS.items():
        base = losses(results, arm, BASE, "adamw")
        if not base:
            continue
        at = {d: losses(results, arm, d, "adamw").get(best_rate(base), {}) for d in DEPTHS}
        found = {depth: list(values.values()) for depth, values in at.items() if values}
        axes.plot(list(found), [np.mean(v) for v in found.values()], marker=marker, color=color, label=arm)
        for depth, values in found.items():
            axes.scatter([depth] * len(values), values, s=7, color=color, alpha=0.4, linewidths=0)
    axes.set(xscale="log", xlabel="depth, in blocks")
    axes.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
    axes.minorticks_off()
    axes.set_title("At the best rate of depth 4", loc="left")
    axes.legend(fontsize=8)
