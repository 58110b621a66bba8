"""Fig. 5: training on noisy inputs, tested on clean ones; beyond the paper noisy labels, and tests on noisy inputs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from matplotlib.figure import Figure

from reproductions.evidence.claims import Results, Row, compare, compare_spreads
from reproductions.evidence.style import BOTH, LOOKS, by_preset, finish, points, row_of_panels, ticks
from reproductions.presets import EULER, IMAGES, PLAIN, TEXTS, Part
from reproductions.trial import Trial

TITLE = "Fig. 5: noise"
# Five levels each, clean first: sides of tiles in pixels, standard deviations as shares of the range, shares.
LEVELS: dict[str, tuple[float, ...]] = {
    "mosaic": (0, 2, 4, 8, 16),
    "gaussian": (0, 0.05, 0.1, 0.2, 0.4),
    "labels": (0, 0.1, 0.2, 0.4, 0.6),
    "letters": (0, 0.1, 0.3, 0.5, 0.8),
}
PROBES = (("mosaic", 2.0), ("mosaic", 4.0), ("gaussian", 0.05), ("gaussian", 0.1), ("gaussian", 0.2))
TEXT_PROBES = (("letters", 0.1), ("letters", 0.3), ("letters", 0.5))
DEPTH = {"smoke": (20, 9), "cpu": (56, 9), "small": (56, 17), "paper": (218, 49)}
SHOWN = {"smoke": 2, "cpu": 3, "small": 3, "paper": 5}  # levels of each kind


def cell(preset: str, kind: str, level: float, arm: Part) -> Trial:
    """Training on one kind of noise; the clean cells of all kinds are one."""
    text = kind == "letters"
    scale: Part = {**TEXTS[preset], "learning_rate": 0.01} if text else IMAGES[preset]
    noise: Part = {"noise": kind, "level": float(level)} if level else {}
    probes = TEXT_PROBES if text else PROBES
    return Trial(**{**scale, **arm, **noise, "depth": DEPTH[preset][text], "probes": probes})


def kinds(preset: str) -> dict[str, tuple[float, ...]]:
    return {kind: levels[: SHOWN[preset]] for kind, levels in LEVELS.items()}


def trials(preset: str, seeds: int) -> list[Trial]:
    """The grid: each kind, level and arm."""
    grid: dict[Trial, None] = {}
    for seed, (kind, levels) in product(range(seeds), kinds(preset).items()):
        for level, arm in product(levels, (PLAIN, EULER)):
            grid[Trial(**{**vars(cell(preset, kind, level, arm)), "seed": seed})] = None
    return list(grid)


def claims(results: Results, preset: str) -> list[Row]:
    rows = []
    for kind, levels in kinds(preset).items():
        what = "noisy labels (beyond the paper)" if kind == "labels" else f"inputs with noise ({kind})"
        for level in levels:
            pair = [(cell(preset, kind, level, PLAIN), cell(preset, kind, level, EULER))]
            claim = f"Trained on {what} at level {level:g}, h = 0.1 tests better on clean data"
            rows.append(compare(results, claim, pair, "test_accuracy"))
        pairs = [(cell(preset, kind, level, PLAIN), cell(preset, kind, level, EULER)) for level in levels]
        rows.append(
            compare_spreads(results, f"With h = 0.1 it varies less over seeds ({kind})", pairs, "test_accuracy")
        )
    for kind, level in (*PROBES, *TEXT_PROBES):
        clean = "letters" if kind == "letters" else "mosaic"
        pair = [(cell(preset, clean, 0, PLAIN), cell(preset, clean, 0, EULER))]
        claim = f"Trained on clean data, h = 0.1 tests better on inputs with {kind} {level:g} (beyond the paper)"
        rows.append(compare(results, claim, pair, f"{kind} {level:g}"))
    return rows


def figures(results: Results) -> Iterator[tuple[str, Figure]]:
    return by_preset("noise", results, _figure)


def _figure(results: Results, preset: str) -> Figure | None:
    shown = {
        kind: levels
        for kind, levels in kinds(preset).items()
        if results.has(cell(preset, kind, level, EULER) for level in levels[1:])
    }
    if not shown:
        return None
    figure, panels = row_of_panels(len(shown))
    for axes, (kind, levels) in zip(panels, shown.items(), strict=True):
        for number, label in enumerate(BOTH):
            arm, look = LOOKS[label]
            cells = {float(x): cell(preset, kind, level, arm) for x, level in enumerate(levels)}
            points(axes, results, cells, "test_accuracy", label, look, shift=0.06 * (number - 0.5))
        ticks(axes, levels)
        axes.set_title(f"trained with {kind}: test accuracy", loc="left")
        axes.set_xlabel("level")
    return finish(figure, panels)
