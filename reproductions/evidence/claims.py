"""What is said about records: a claim, what was run, what came out with its interval, a verdict.

Fixed before anything was run: a difference of means counts when its 95 % interval excludes 0; spreads are compared
over pooled cells alone; a training has failed when its loss is not finite or above 0.95 ln(classes) at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from reproductions.evidence.statistics import mean_interval
from reproductions.records import Record
from reproductions.trial import Trial

SEEDS = range(10)
POINT = 0.01  # the margin of what is to be less than a point of accuracy
SUPPORTED, REFUTED, UNDECIDED, NOT_RUN = "supported", "refuted", "undecided", "not run"

# What stands beside the test accuracy after the last epoch.
BESIDE = {
    "best_test_accuracy": "best epoch",
    "test_accuracy_reestimated": "BN re-estimated",
    "train_accuracy": "train",
    "distinct_accuracy": "without texts that stand almost the same in train",
}


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    claim: str
    run: str
    outcome: str
    verdict: str


class Results:
    """Records: those of trials by key, those of other studies by the study's name.

    Attributes:
        records: the trials' records, by key.
        folder: where they lie, with what else a study has left there; None for records of several folders.
    """

    def __init__(self, records: Iterable[Record], folder: Path | None = None) -> None:
        self.folder = folder
        self._all = list(records)
        self.records = {record["key"]: record for record in self._all if "key" in record}

    def of(self, study: str) -> list[Record]:
        """The records of a study that is no grid of trials."""
        return [record for record in self._all if record["study"] == study]

    def values(self, cell: Trial, name: str) -> dict[int, float]:
        """By seed, one number of the trials that differ from `cell` in the seed alone; what is null is not a number."""
        found = {}
        for seed in SEEDS:
            record = self.records.get(replace(cell, seed=seed).key)
            if record is not None:
                value = _look_up(record, name)
                found[seed] = math.nan if value is None else float(value)
        return found

    def column(self, cell: Trial, name: str) -> list[float]:
        return list(self.values(cell, name).values())

    def has(self, cells: Iterable[Trial]) -> bool:
        return any(self.values(cell, "failed") for cell in cells)


def _look_up(record: Record, name: str) -> float | None:
    """`a/b` is the entry b of the entry a; a list counts with its mean."""
    value = record["result"]
    for part in name.split("/"):
        value = value.get(part) if value is not None else None
    return float(np.mean([math.nan if v is None else v for v in value])) if isinstance(value, list) else value


Pair = tuple[Trial, Trial]


def differences(results: Results, pairs: Iterable[Pair], name: str, worst: float) -> list[float]:
    """Second minus first of each pair of cells, by seed; over several pairs, the mean of a seed.

    What is not finite counts as `worst`, an infinite number.
    """
    by_seed: dict[int, list[float]] = {}
    for first, second in pairs:
        a, b = results.values(first, name), results.values(second, name)
        for seed in a.keys() & b.keys():
            before, after = (value if math.isfinite(value) else worst for value in (a[seed], b[seed]))
            by_seed.setdefault(seed, []).append(after - before)
    return [float(np.mean(values)) for _, values in sorted(by_seed.items())]


def compare(
    results: Results,
    claim: str,
    pairs: Sequence[Pair],
    name: str,
    higher: bool = True,
    form: str = "{:+.3f}",
    margin: float = 0.0,
) -> Row:
    """Whether the second of each pair is higher, or lower: means over seeds, paired by seed.

    With a margin, whether it is higher or lower by no more than that.

    A number that is not finite is worse than any that is: the mean is that of the other seeds, and decides nothing that
    a seed with such a number contradicts.
    """
    found = differences(results, pairs, name, -math.inf if higher else math.inf)
    finite = [value for value in found if math.isfinite(value)]
    run = describe([cell for pair in pairs for cell in pair], len(found))
    if not found:
        return Row(claim, describe([cell for pair in pairs for cell in pair], 0), "", NOT_RUN)
    if len(finite) < 2:
        return Row(claim, run, f"{len(finite)} of {len(found)} seeds can be compared", UNDECIDED)
    mean, low, high = mean_interval(finite)
    lost = f"; {n} seed{'s' if n > 1 else ''} not finite" if (n := len(found) - len(finite)) else ""
    outcome = f"{levels(results, pairs, name)}; {form.format(mean)} ({form.format(low)} to {form.format(high)}){lost}"
    if name == "test_accuracy":
        beside = {word: levels(results, pairs, other) for other, word in BESIDE.items()}
        outcome += "".join(f"; {word} {shown}" for word, shown in beside.items() if shown)
    contradicted = any(math.isinf(gap) and (gap > 0) != (mean > 0) for gap in found)
    return Row(claim, run, outcome, UNDECIDED if contradicted else verdict(low, high, higher, margin))


def verdict(low: float, high: float, higher: bool = True, margin: float = 0.0) -> str:
    """What an interval of a difference says of a claim about its sign.

    Example:
        >>> verdict(0.1, 0.2), verdict(0.1, 0.2, higher=False), verdict(-0.1, 0.2)
        ('supported', 'refuted', 'undecided')
        >>> verdict(-0.005, 0.1, margin=0.01), verdict(-0.05, 0.1, margin=0.01)  # higher, or lower by a hundredth
        ('supported', 'undecided')
    """
    if not higher:
        low, high = -high, -low
    return SUPPORTED if low > -margin else REFUTED if high < 0 else UNDECIDED


def levels(results: Results, pairs: Sequence[Pair], name: str) -> str:
    """The medians of both, over seeds and pairs, of what is finite."""
    sides = [[v for cell in side for v in results.column(cell, name)] for side in zip(*pairs, strict=True)]
    if any(np.isnan(side).all() for side in sides):  # as BN estimated anew without BN
        return ""
    return " -> ".join(f"{np.nanmedian(side):.3g}" for side in sides)


def compare_spreads(results: Results, claim: str, pairs: Sequence[Pair], name: str) -> Row:
    """Whether the second of each pair scatters less over seeds: mean distance to the cell's median, cells pooled.

    One cell alone is not judged by fewer than ten seeds.
    """
    found, pooled = [], 0
    for pair in pairs:
        values = [results.values(cell, name) for cell in pair]
        seeds = sorted(values[0].keys() & values[1].keys())
        if len(seeds) >= 3:
            a, b = (np.array([side[seed] for seed in seeds]) for side in values)
            found += list(np.abs(b - np.median(b)) - np.abs(a - np.median(a)))
            pooled += 1
    cells = [cell for pair in pairs for cell in pair]
    if not found:
        return Row(claim, describe(cells, 0), "", NOT_RUN)
    mean, low, high = mean_interval(found)
    outcome = f"mean distance to the median {mean:+.4f} ({low:+.4f} to {high:+.4f}), {len(found)} pairs"
    word = verdict(low, high, higher=False) if pooled > 1 or len(found) >= len(SEEDS) else UNDECIDED
    return Row(claim, describe(cells, 0), outcome, word)


def failures(results: Results, cell: Trial) -> tuple[int, int]:
    """How many trainings of a cell failed, and of how many."""
    found = results.column(cell, "failed")
    return int(sum(found)), len(found)


def describe(cells: Sequence[Trial], seeds: int) -> str:
    """What was run, in words: networks, data, epochs, seeds."""
    ordered = sorted(cells, key=lambda cell: (cell.model, cell.depth, cell.norm))
    shown = ", ".join(dict.fromkeys(map(network, ordered)))
    cell = cells[0]
    if cell.data == "cifar10":
        data = f"{cell.train or 50_000:,} images of {cell.size or 32} x {cell.size or 32}"
    else:
        data = f"{cell.train:,} texts of {cell.size} letters" if cell.train else "all training texts at hand"
    more = f", {seeds} seed{'s' if seeds > 1 else ''}" if seeds else ""
    return f"{shown}; {data}; {cell.epochs} epochs{more}"


def network(cell: Trial) -> str:
    """The network of a cell, in words."""
    names = {"resnet": "ResNet", "vdcnn": "VDCNN", "vdcnn-original": "VDCNN (original)"}
    return f"{names[cell.model]}-{cell.depth}{'' if cell.norm else ' without BN'}"
