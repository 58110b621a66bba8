"""Fig. 5: training on noisy inputs, tested on clean ones; beyond the paper noisy labels, and tests on noisy inputs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from matplotlib.figure import Figure

from reproductions.evidence.claims import Pair, Results, Row, compare, compare_drops, compare_spreads
from reproductions.evidence.style import BOTH, LOOKS, by_preset, chance, finish, points, ran, row_of_panels, ticks
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
UNITS = {
    "mosaic": "side of a tile (pixels); 0: clean",
    "gaussian": "standard deviation (share of a pixel's range)",
    "labels": "share of wrong labels",
    "letters": "share of random letters",
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
    rows = [row for kind, levels in kinds(preset).items() for row in _of_kind(results, preset, kind, levels)]
    for kind, level in (*PROBES, *TEXT_PROBES):
        pair = _pair(preset, "letters" if kind == "letters" else "mosaic", 0)
        noisy = f"{kind} {level:g}"
        claim = f"Trained on clean data, h = 0.1 tests better on inputs with {noisy} (beyond the paper)"
        rows.append(compare(results, claim, [pair], noisy))
        claim = f"Trained on clean data, {noisy} in the test costs h = 0.1 less accuracy (beyond the paper)"
        rows.append(compare_drops(results, claim, [pair], [pair], "test_accuracy", noisy))
    return rows


def _of_kind(results: Results, preset: str, kind: str, levels: tuple[float, ...]) -> list[Row]:
    """What is said of training on one kind of noise: the paper names mosaics and letters."""
    what = "noisy labels (beyond the paper)" if kind == "labels" else f"inputs with noise ({kind})"
    pairs = {level: _pair(preset, kind, level) for level in levels}
    noisy = [pairs[level] for level in levels if level]
    paper = kind in ("mosaic", "letters")
    inputs = "texts" if kind == "letters" else "images"
    claim = f"Trained on clean {inputs}, h = 0.1 tests better on clean data"
    rows = [compare(results, claim, [pairs[0]], "test_accuracy")]
    for level in levels:
        if level:
            claim = f"Trained on {what} at level {level:g}, h = 0.1 tests better on clean data"
            rows.append(compare(results, claim, [pairs[level]], "test_accuracy"))
            claim = f"Trained on {what} at level {level:g}, h = 0.1 loses less accuracy than h = 1"
            rows.append(compare_drops(results, claim, [pairs[0]], [pairs[level]], "test_accuracy"))
    claim = f"Trained on {what} at all levels, h = 0.1 tests better on clean data"
    primary = f"Fig. 5: trained on inputs with noise ({kind}), h = 0.1 tests better on clean data" if paper else ""
    rows.append(compare(results, claim, noisy, "test_accuracy", primary=primary))
    claim = f"Trained on {what} at all levels, h = 0.1 loses less accuracy than h = 1"
    primary = f"Fig. 5: noise in the inputs ({kind}) costs h = 0.1 less accuracy than h = 1" if paper else ""
    clean = [pairs[0]] * len(noisy)
    rows.append(compare_drops(results, claim, clean, noisy, "test_accuracy", primary=primary))
    claim = f"Trained on {what}, with h = 0.1 accuracy varies less over seeds"
    rows.append(compare_spreads(results, claim, list(pairs.values()), "test_accuracy"))
    return rows


def _pair(preset: str, kind: str, level: float) -> Pair:
    return cell(preset, kind, level, PLAIN), cell(preset, kind, level, EULER)


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
    drawn: list[Trial] = []
    for axes, (kind, levels) in zip(panels, shown.items(), strict=True):
        for label in BOTH:
            arm, look = LOOKS[label]
            cells = {float(x): cell(preset, kind, level, arm) for x, level in enumerate(levels)}
            points(axes, results, cells, "test_accuracy", label, look)
            drawn += cells.values()
        chance(axes, cell(preset, kind, 0, EULER), "test_accuracy")
        ticks(axes, levels)
        axes.set_title(f"trained with {kind}, tested on clean data", loc="left")
        axes.set(xlabel=UNITS[kind], ylabel="test accuracy, last epoch")
    return finish(figure, panels, ran(results, dict.fromkeys(drawn)))
