"""What the paper claims in passing: a small h is robust to learning rates, optimisers and the lack of BN.

And: "warm-up, clipping and weight decay need tuning, h does not, and goes with them".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

import numpy as np
from matplotlib.figure import Figure

from reproductions.evidence.claims import NOT_RUN, POINT, Results, Row, compare, compare_failures, describe
from reproductions.evidence.style import BOTH, LOOKS, by_preset, chance, finish, points, ran, row_of_panels, ticks
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
# What each remedy is tuned over, by the last train loss. A run of the preset cpu has 158 iterations: its warm-up of 400
# has records, and is longer than the run, so that it is no remedy by itself.
WARM_UPS = {"smoke": (2,), "cpu": (8, 16, 32, 400), "small": (400, 1200, 2400), "paper": (400, 1600, 6400)}
CLIPS, DECAYS = (1.0, 0.1), (1e-4, 5e-4)
NO_NORM: Part = {"norm": False}


def cell(preset: str, arm: Part, *changes: Part) -> Trial:
    fields: dict[str, object] = {**IMAGES[preset], "depth": DEPTH[preset], **arm}
    for change in changes:
        fields.update(change)
    return Trial(**fields)  # type: ignore[arg-type]


def remedies(preset: str) -> dict[str, list[Part]]:
    """The values that each remedy is tuned over: all of them, or it has not been tried."""
    return {
        "warm-up": [{"warmup": iterations} for iterations in WARM_UPS[preset]],
        "clipping": [{"clip": norm} for norm in CLIPS],
        "weight decay": [{"weight_decay": decay} for decay in DECAYS],
    }


def variants(preset: str) -> list[Part]:
    rates: Iterable[Part] = ({"learning_rate": rate} for rate in RATES[preset])
    bare: Iterable[Part] = ({**NO_NORM, "learning_rate": rate} for rate in RATES[preset])
    values = [value for some in remedies(preset).values() for value in some]
    return [*rates, *OPTIMIZERS.values(), *bare, {}, *values]


def trials(preset: str, seeds: int) -> list[Trial]:
    """Each variant with h = 1 and with h = 0.1."""
    cells = (cell(preset, arm, variant) for variant, arm in product(variants(preset), (PLAIN, EULER)))
    return [Trial(**{**vars(one), "seed": seed}) for one, seed in product(dict.fromkeys(cells), range(seeds))]


def best_of(results: Results, cells: Iterable[Trial]) -> Trial:
    """The cell with the best median of the last train loss: the test set does not choose."""

    def loss(one: Trial) -> float:
        found = [value if np.isfinite(value) else np.inf for value in results.column(one, "train_loss")]
        return float(np.median(found)) if found else float("inf")

    return min(cells, key=loss)


def at_best_rate(results: Results, preset: str, arm: Part, *changes: Part) -> Trial:
    return best_of(results, [cell(preset, arm, *changes, {"learning_rate": rate}) for rate in RATES[preset]])


def claims(results: Results, preset: str) -> list[Row]:
    rows = []
    for kind, changes in (("with BN", ()), ("without BN", (NO_NORM,))):
        swept = []
        for rate in RATES[preset]:
            at = {"learning_rate": rate}
            swept.append((cell(preset, PLAIN, *changes, at), cell(preset, EULER, *changes, at)))
            claim = f"At learning rate {rate:g}, {kind}, h = 0.1 tests better"
            primary = "In passing: at learning rate 1, h = 0.1 tests better" if rate == 1 and not changes else ""
            rows.append(compare(results, claim, swept[-1:], "test_accuracy", primary=primary))
        claim = f"Over all learning rates, {kind}, with h = 0.1 trainings fail less often"
        rows.append(compare_failures(results, claim, swept))
        best = [(at_best_rate(results, preset, PLAIN, *changes), at_best_rate(results, preset, EULER, *changes))]
        claim = f"Each h at its best learning rate, {kind}, h = 0.1 tests better"
        primary = "In passing: without BN, each h at its best learning rate, h = 0.1 tests better" if changes else ""
        rows.append(compare(results, claim, best, "test_accuracy", primary=primary))
    bare = [(cell(preset, PLAIN), cell(preset, PLAIN, NO_NORM))]
    rows.append(compare(results, "With h = 1 accuracy falls without BN", bare, "test_accuracy", higher=False))
    for name, change in OPTIMIZERS.items():
        pair = [(cell(preset, PLAIN, change), cell(preset, EULER, change))]
        rows.append(compare(results, f"Under {name}, h = 0.1 tests better", pair, "test_accuracy"))
    for name, values in remedies(preset).items():
        rows += _remedy(results, preset, name, values)
    return rows


def _remedy(results: Results, preset: str, name: str, values: list[Part]) -> list[Row]:
    """What is said of a remedy at its best value, once all of its values have been tried."""
    tuned = f"{name} (best of {len(values)} values)"
    goes_with = f"h = 0.1 goes with {tuned}: adding it costs less than a point"
    alone = f"h = 0.1 alone tests better than h = 1 with {tuned}"
    plain, euler = ([cell(preset, arm, value) for value in values] for arm in (PLAIN, EULER))
    tried = sum(results.has([a]) and results.has([b]) for a, b in zip(plain, euler, strict=True))
    if tried < len(values):
        run = describe([cell(preset, PLAIN), cell(preset, EULER)], 0, results)
        outcome = f"{tried} of {len(values)} values tried: no trial of it" if tried else ""
        return [Row(claim, run, outcome, NOT_RUN) for claim in (goes_with, alone)]
    return [
        compare(results, goes_with, [(cell(preset, EULER), best_of(results, euler))], "test_accuracy", margin=POINT),
        compare(results, alone, [(best_of(results, plain), cell(preset, EULER))], "test_accuracy"),
    ]


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
    drawn: list[Trial] = []
    for axes, (title, changes) in zip(panels, shown.items(), strict=True):
        for label in BOTH:
            arm, look = LOOKS[label]
            cells = {float(x): cell(preset, arm, *changes, {"learning_rate": r}) for x, r in enumerate(rates)}
            points(axes, results, cells, "test_accuracy", label, look)
            drawn += cells.values()
        chance(axes, cell(preset, EULER), "test_accuracy")
        ticks(axes, rates)
        axes.set_title(f"ResNet-{DEPTH[preset]} {title}", loc="left")
        axes.set(xlabel="learning rate", ylabel="test accuracy, last epoch")
    return finish(figure, panels, ran(results, dict.fromkeys(drawn)))
