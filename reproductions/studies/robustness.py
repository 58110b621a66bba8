"""What the paper claims in passing: a small h is robust to learning rates, optimisers and the lack of BN.

And: "warm-up, clipping and weight decay need tuning, h does not, and goes with them".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

import numpy as np
from matplotlib.figure import Figure

from reproductions.evidence.claims import POINT, Results, Row, compare
from reproductions.evidence.style import BOTH, LOOKS, by_preset, finish, points, row_of_panels, ticks
from reproductions.presets import EULER, IMAGES, PLAIN, Part
from reproductions.trial import Trial

TITLE = "Learning rates, optimisers, no BN, other remedies"
DEPTH = {"smoke": 20, "cpu": 56, "small": 56, "paper": 110}
RATES = {"smoke": (0.1,), "cpu": (0.01, 0.1, 1.0), "small": (0.01, 0.1, 0.3, 1.0), "paper": (0.01, 0.03, 0.1, 0.3, 1.0)}
OPTIMIZERS: dict[str, Part] = {  # each at PyTorch's own learning rate, SGD at the paper's
    "SGD": {},
    "Adam": {"optimizer": "adam", "learning_rate": 0.001},
    "RMSprop": {"optimizer": "rmsprop", "learning_rate": 0.01},
    "Adagrad": {"optimizer": "adagrad", "learning_rate": 0.01},
}
REMEDIES: dict[str, Part] = {
    "none": {},
    "warm-up, 400 iterations": {"warmup": 400},
    "clipping at 1": {"clip": 1.0},
    "clipping at 0.1": {"clip": 0.1},
    "weight decay 1e-4": {"weight_decay": 1e-4},
    "weight decay 5e-4": {"weight_decay": 5e-4},
}
NO_NORM: Part = {"norm": False}


def cell(preset: str, arm: Part, *changes: Part) -> Trial:
    fields: dict[str, object] = {**IMAGES[preset], "depth": DEPTH[preset], **arm}
    for change in changes:
        fields.update(change)
    return Trial(**fields)  # type: ignore[arg-type]


def variants(preset: str) -> list[Part]:
    rates: Iterable[Part] = ({"learning_rate": rate} for rate in RATES[preset])
    bare: Iterable[Part] = ({**NO_NORM, "learning_rate": rate} for rate in RATES[preset])
    return [*rates, *OPTIMIZERS.values(), *bare, *REMEDIES.values()]


def trials(preset: str, seeds: int) -> list[Trial]:
    """Each variant with h = 1 and with h = 0.1."""
    cells = (cell(preset, arm, variant) for variant, arm in product(variants(preset), (PLAIN, EULER)))
    return [Trial(**{**vars(one), "seed": seed}) for one, seed in product(dict.fromkeys(cells), range(seeds))]


def at_best_rate(results: Results, preset: str, arm: Part, *changes: Part) -> Trial:
    """The cell with the best median of the last train loss over the learning rates: the test set does not choose."""

    def loss(one: Trial) -> float:
        found = [value if np.isfinite(value) else np.inf for value in results.column(one, "train_loss")]
        return float(np.median(found)) if found else float("inf")

    return min((cell(preset, arm, *changes, {"learning_rate": rate}) for rate in RATES[preset]), key=loss)


def claims(results: Results, preset: str) -> list[Row]:
    rows = []
    for kind, changes in (("with BN", ()), ("without BN", (NO_NORM,))):
        for rate in RATES[preset]:
            at = {"learning_rate": rate}
            pair = [(cell(preset, PLAIN, *changes, at), cell(preset, EULER, *changes, at))]
            claim = f"At learning rate {rate:g}, {kind}, h = 0.1 tests better"
            rows.append(compare(results, claim, pair, "test_accuracy"))
        best = [(at_best_rate(results, preset, PLAIN, *changes), at_best_rate(results, preset, EULER, *changes))]
        claim = f"Each h at its best learning rate, {kind}, h = 0.1 tests better"
        rows.append(compare(results, claim, best, "test_accuracy"))
    claim = "With h = 1 accuracy falls without BN"
    rows.append(
        compare(results, claim, [(cell(preset, PLAIN), cell(preset, PLAIN, NO_NORM))], "test_accuracy", higher=False)
    )
    for name, change in OPTIMIZERS.items():
        pair = [(cell(preset, PLAIN, change), cell(preset, EULER, change))]
        rows.append(compare(results, f"Under {name}, h = 0.1 tests better", pair, "test_accuracy"))
    for name, change in REMEDIES.items():
        if name == "none":
            continue
        pair = [(cell(preset, EULER), cell(preset, EULER, change))]
        claim = f"h = 0.1 goes with {name}: adding it costs less than a point"
        rows.append(compare(results, claim, pair, "test_accuracy", margin=POINT))
        pair = [(cell(preset, PLAIN, change), cell(preset, EULER))]
        rows.append(compare(results, f"h = 0.1 alone tests better than h = 1 with {name}", pair, "test_accuracy"))
    return rows


def figures(results: Results) -> Iterator[tuple[str, Figure]]:
    return by_preset("robust", results, _figure)


def _figure(results: Results, preset: str) -> Figure | None:
    rates = RATES[preset]
    panels_of = {"with BN": (), "without BN": (NO_NORM,)}
    shown = {
        title: changes
        for title, changes in panels_of.items()
        if results.has(cell(preset, EULER, *changes, {"learning_rate": rate}) for rate in rates)
    }
    if not shown:
        return None
    figure, panels = row_of_panels(len(shown))
    for axes, (title, changes) in zip(panels, shown.items(), strict=True):
        for number, label in enumerate(BOTH):
            arm, look = LOOKS[label]
            cells = {float(x): cell(preset, arm, *changes, {"learning_rate": r}) for x, r in enumerate(rates)}
            points(axes, results, cells, "test_accuracy", label, look, shift=0.06 * (number - 0.5))
        ticks(axes, rates)
        axes.set_title(f"ResNet-{DEPTH[preset]} {title}: test accuracy", loc="left")
        axes.set_xlabel("learning rate")
    return finish(figure, panels)
