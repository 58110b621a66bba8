"""The library's own first use: a trained network, patched without changing its function, is trained further.

Trained on five classes, then on the other five with noisy images: patched with h and `preserve=True`, as it was, and
as it was with h^2 times the learning rate in the last maps, which by theory is the same training as the first.
"""

from __future__ import annotations

from reproductions.evidence.claims import POINT, Results, Row, compare
from reproductions.presets import EULER, IMAGES, PLAIN, RATE, Part
from reproductions.trial import Trial

TITLE = "Beyond the paper: fine-tuning a patched network"
DEPTH = {"smoke": 20, "cpu": 20, "small": 56, "paper": 110}
NOISE: Part = {"noise": "gaussian", "level": 0.1}
LEARNING_RATES = (0.01, 0.1)


def base(preset: str) -> Trial:
    """The first training, on the first five classes."""
    return Trial(**{**IMAGES[preset], "depth": DEPTH[preset], "classes": (0, 5)})


def cell(preset: str, arm: Part, rate: float) -> Trial:
    """The second, on the others."""
    fields = {**vars(base(preset)), **arm, **NOISE, "classes": (5, 10), "start": base(preset), "learning_rate": rate}
    return Trial(**fields)


def trials(preset: str, seeds: int) -> list[Trial]:
    cells = [base(preset)]
    cells += [cell(preset, arm, rate) for rate in LEARNING_RATES for arm in (PLAIN, EULER, RATE)]
    return [Trial(**{**vars(one), "seed": seed}) for seed in range(seeds) for one in cells]


def claims(results: Results, preset: str) -> list[Row]:
    rows = []
    for rate in LEARNING_RATES:
        plain, euler, matching = (cell(preset, arm, rate) for arm in (PLAIN, EULER, RATE))
        start = f"Fine-tuned on noisy images at learning rate {rate:g}"
        claim = f"{start}, patched with h = 0.1 it tests better than as it was"
        rows.append(compare(results, claim, [(plain, euler)], "test_accuracy"))
        claim = f"{start}, it tests within a point of the matching learning rate (by theory the same)"
        rows.append(compare(results, claim, [(matching, euler)], "test_accuracy", margin=POINT, same=True))
    return rows
