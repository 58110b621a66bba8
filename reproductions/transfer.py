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

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any, Literal

TITLE = "Train deeper with the learning rate you have"
BASE = 4
DEEP = {"smoke": 8, "desk": 64}
SMALL_REGRET, SMALL_SHIFT, MARGIN = 0.01, 0.5, 0.05  # nats, octaves, nats
SEEDS = 3


@dataclass(frozen=True)
class Cell:
    """The configuration of one training.

    Attributes:
        model: `gpt`, on bytes of AG-NEWS, or `vit`, on CIFAR-10 shrunk to 16 x 16.
        depth: blocks; each adds twice.
        h: what `eulernet.patch` is given.
        projections: how the output projections start: `plain` as all other maps, `gpt2` smaller by sqrt(2 depth) as in
            GPT-2, or `zero`.
        initial: standard deviation of the initial weights.
        optimizer: `adamw` with betas 0.9 and 0.95 and no decay, or `sgd` with momentum 0.9.
        learning_rate: after a warm-up over the first tenth of 150 iterations; then constant.
        hidden_rate: factor on the learning rate of the blocks.
        hidden_epsilon: factor on Adam's epsilon of the blocks.
        iterations: of 8 texts of 64 bytes, or 32 images.
        seed: of the initial weights and of the order of the data.
    """

    model: Literal["gpt", "vit"] = "gpt"
    depth: int = BASE
    h: float = 1.0
    projections: Literal["plain", "gpt2", "zero"] = "plain"
    initial: float = 0.125
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 4e-3
    hidden_rate: float = 1.0
    hidden_epsilon: float = 1.0
    iterations: int = 150
    seed: int = 0

    @property
    def key(self) -> str:
        """The hash of the configuration; what is as it is by default has no part in it."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return hashlib.sha256(json.dumps({"study": "transfer", **changed}, sort_keys=True).encode()).hexdigest()[:12]

    def config(self) -> dict[str, Any]:
        """As a record has it."""
        return asdict(self)


# ---- what is compared: how depth changes a cell of the base depth
ARMS = ("h = 1", "4/D", "zero", "gpt2", "Depth-muP", "2/sqrt(D)")
Settings = Literal["adamw", "sgd", "0.02", "long", "vit"]
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"optimizer": "sgd"},
    "0.02": {"initial": 0.02},
    "long": {"iterations": 1000},
    "vit": {"model": "vit", "iterations": 300},
}
GRIDS: dict[str, tuple[float, ...]] = {
    "adamw": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "sgd": (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8),
    "0.02": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "long": (4e-3,),
    "vit": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
}
HALVES = (1.4e-3, 2.8e-3, 5.7e-3, 1.13e-2)  # between those of `adamw`, near the best


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
    if arm == "4/D":
        return replace(plain, h=1 / m, hidden_rate=1.0 if adam else m, hidden_epsilon=1 / m if adam else 1.0)
    if arm == "Depth-muP":
        rate, epsilon = (m**-0.5, m**-0.5) if adam else (1.0, 1.0)
        return replace(plain, h=m**-0.5, hidden_rate=rate, hidden_epsilon=epsilon)
    return replace(plain, h=m**-0.5) if arm == "2/sqrt(D)" else plain


def trials(preset: str, seeds: int = SEEDS) -> list[Cell]:
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
    ]
    return list(dict.fromkeys(each for some in parts for each in some))
