"""What is said about records: a claim, what was run, what came out with its interval, a verdict.

Fixed before anything was run:

- fewer than three seeds decide nothing; a difference counts when its 95 % interval excludes 0; what is to be the
  same, or no more than a little worse, when the interval lies within a margin that is named; spreads are compared
  over pooled cells alone;
- a training has failed when its loss is not finite or above 0.95 ln(classes) at the end, which is that of guessing;
- accuracies and losses are not judged where half of the trainings of an arm have failed: that arm is at chance;
- a theorem is checked: it holds, or is violated by one number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from reproductions.errors import DataError
from reproductions.evidence.statistics import Estimate, share_interval, share_p, shares_p
from reproductions.records import Record
from reproductions.training.depth_cells import Cell
from reproductions.trial import Trial

SEEDS = range(10)
POINT = 0.01  # the margin of what is to be the same accuracy, or no more than a point worse
SUPPORTED, REFUTED, UNDECIDED, NOT_RUN = "supported", "refuted", "undecided", "not run"
AT_CHANCE, HOLDS, VIOLATED = "at chance", "holds", "violated"

# What stands beside the test accuracy after the last epoch.
BESIDE = {
    "test_accuracy_reestimated": "BN re-estimated",
    "train_accuracy": "train",
    "distinct_accuracy": "without texts that stand almost the same in train",
}
# How many of the first training samples have one of some classes; newer records hold it themselves.
OF_CLASSES: dict[tuple[str, int, tuple[int, ...]], int] = {
    ("cifar10", 5_000, (0, 5)): 2_489,
    ("cifar10", 5_000, (5, 10)): 2_511,
    ("cifar10", 50_000, (0, 5)): 25_000,
    ("cifar10", 50_000, (5, 10)): 25_000,
}
FEWEST = 3  # seeds that decide something
NOT_PERFORMANCE = ("log/", "feature_steps", "failed")  # of these an arm at chance is judged as well


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        claim: in words.
        run: what was trained, on what.
        outcome: what came out.
        verdict: one of the words above.
        p: of the test that the verdict comes from, where it comes from one.
        primary: the claim of the paper that the row stands for, where it was named beforehand as one of these.
        compared: what was compared; rows with the same are one comparison.
    """

    claim: str
    run: str
    outcome: str
    verdict: str
    p: float | None = None
    primary: str = ""
    compared: tuple[str, ...] = ()


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
        seen: dict[str, dict[str, Any]] = {}
        for data in (record["data"] for record in self._all if "data" in record):
            other = seen.setdefault(data["name"], data)
            if other["sha256"] != data["sha256"]:
                raise DataError(
                    f"records of trainings on different {data['name']} (sha256 {other['sha256']} and {data['sha256']}) "
                    "can't be compared: keep them in different folders, and name one of these by --results."
                )

    def of(self, study: str) -> list[Record]:
        """The records of a study that is no grid of trials."""
        return [record for record in self._all if record["study"] == study]

    def values(self, cell: Trial | Cell, name: str) -> dict[int, float]:
        """By seed, one number of the trials that differ from `cell` in the seed alone; what is null is not a number."""
        found = {}
        for seed in SEEDS:
            record = self.records.get(replace(cell, seed=seed).key)
            if record is not None:
                value = _look_up(record, name)
                found[seed] = math.nan if value is None else float(value)
        return found

    def records_of(self, cell: Trial) -> list[Record]:
        """The records of the trials that differ from `cell` in the seed alone."""
        keys = (replace(cell, seed=seed).key for seed in SEEDS)
        return [self.records[key] for key in keys if key in self.records]

    def column(self, cell: Trial | Cell, name: str) -> list[float]:
        return list(self.values(cell, name).values())

    def has(self, cells: Iterable[Trial]) -> bool:
        return any(self.values(cell, "failed") for cell in cells)


def _look_up(record: Record, name: str) -> float | None:
    """`a/b` is the entry b of the entry a; a list counts with its mean."""
    value: Any = record["result"]
    for part in name.split("/"):
        value = value.get(part) if value is not None else None
    return float(np.mean([math.nan if v is None else v for v in value])) if isinstance(value, list) else value


# ---- verdicts
def verdict(low: float, high: float, higher: bool = True, margin: float = 0.0, same: bool = False) -> str:
    """What an interval of a difference says of a claim about it.

    Example:
        >>> verdict(0.1, 0.2), verdict(0.1, 0.2, higher=False), verdict(-0.1, 0.2)
        ('supported', 'refuted', 'undecided')
        >>> lower = dict(margin=0.01)  # higher, or lower by less than a hundredth
        >>> verdict(-0.005, 0.1, **lower), verdict(-0.0105, -0.0005, **lower), verdict(-0.05, -0.02, **lower)
        ('supported', 'undecided', 'refuted')
        >>> verdict(0.0, 0.0, margin=0.01, same=True), verdict(0.02, 0.03, margin=0.01, same=True)
        ('supported', 'refuted')
    """
    if not higher:
        low, high = -high, -low
    if same:
        outside = low >= margin or high <= -margin
        return SUPPORTED if -margin < low and high < margin else REFUTED if outside else UNDECIDED
    return SUPPORTED if low > -margin else REFUTED if high < -margin else UNDECIDED


def judge(
    claim: str, run: str, found: Estimate, before: str = "", higher: bool = True, margin: float = 0.0,
    same: bool = False, form: str = "{:+.3g}", primary: str = "",
) -> Row:  # fmt: skip
    """A row about one number, with its interval, p and verdict; `before` is what the outcome begins with."""
    numbers = f"{form.format(found.mean)} ({form.format(found.low)} to {form.format(found.high)})"
    boundary = math.copysign(margin, found.mean) if same else (-margin if higher else margin)
    word = verdict(found.low, found.high, higher, margin, same)
    outcome = "; ".join(filter(None, [before, numbers]))
    return Row(claim, run, outcome, word, found.p(boundary), primary)


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
    results: Results, claim: str, pairs: Sequence[Pair], name: str, higher: bool = True, form: str = "{:+.3f}",
    margin: float = 0.0, same: bool = False, primary: str = "",
) -> Row:  # fmt: skip
    """Whether the second of each pair is higher, or lower: means over seeds, paired by seed.

    With a margin, whether it is higher or lower by less than that; with `same`, whether both differ by less than that.

    A number that is not finite is worse than any that is: the mean is that of the other seeds, and decides nothing that
    a seed with such a number contradicts.
    """
    cells = [cell for pair in pairs for cell in pair]
    found = differences(results, pairs, name, -math.inf if higher else math.inf)
    finite = [value for value in found if math.isfinite(value)]
    base = Row(claim, describe(cells, len(found), results), "", NOT_RUN, None, primary, _compared(pairs, name))
    if not found:
        return base
    failed = failed_of(results, pairs)
    if len(finite) < 2:
        outcome = "; ".join(filter(None, [f"{len(finite)} of {len(found)} seeds can be compared", failed]))
        return replace(base, outcome=outcome, verdict=UNDECIDED)
    row = judge(claim, base.run, Estimate.of(finite), levels(results, pairs, name), higher, margin, same, form)
    lost = f"{n} seed{'s' if n > 1 else ''} not finite" if (n := len(found) - len(finite)) else ""
    outcome = "; ".join(filter(None, [row.outcome, lost, failed, *_beside(results, pairs, name)]))
    word, p = row.verdict, row.p
    if any(math.isinf(gap) and (gap > 0) != (Estimate.of(finite).mean > 0) for gap in found):
        word, p = UNDECIDED, None
    return _decided(replace(base, outcome=outcome, verdict=word, p=p), results, pairs, name, len(found))


def _decided(row: Row, results: Results, pairs: Sequence[Pair], name: str, seeds: int) -> Row:
    """The row, without a verdict where an arm is at chance or there are too few seeds."""
    if _at_chance(results, pairs, name):
        return replace(row, verdict=AT_CHANCE, p=None)
    return row if seeds >= FEWEST else replace(row, verdict=UNDECIDED, p=None)


def compare_unpaired(
    results: Results, claim: str, first: Trial, second: Trial, name: str, higher: bool = True, margin: float = 0.0,
    primary: str = "",
) -> Row:  # fmt: skip
    """As `compare`, of networks of different depths: their seeds have nothing in common, and Welch's test compares."""
    sides = [[v for v in results.column(cell, name) if math.isfinite(v)] for cell in (first, second)]
    pairs = [(first, second)]
    seeds = min(len(results.column(cell, name)) for cell in (first, second))
    base = Row(claim, describe([first, second], seeds, results), "", NOT_RUN, None, primary, _compared(pairs, name))
    if not seeds:
        return base
    failed = failed_of(results, pairs)
    if not all(sides):
        return replace(base, outcome="; ".join(filter(None, ["not finite", failed])), verdict=UNDECIDED)
    found = Estimate.of_difference(*sides)
    row = judge(claim, base.run, found, levels(results, pairs, name), higher, margin, form="{:+.3f}")
    outcome = "; ".join(filter(None, [row.outcome, failed, *_beside(results, pairs, name)]))
    row = replace(base, outcome=outcome, verdict=row.verdict, p=row.p)
    return _decided(row, results, pairs, name, min(map(len, sides)))


def compare_drops(
    results: Results, claim: str, clean: Sequence[Pair], noisy: Sequence[Pair], name: str, after: str = "",
    primary: str = "",
) -> Row:  # fmt: skip
    """Whether the second of each pair loses less from clean to noisy: the difference of the two drops, by seed.

    Args:
        results: the records.
        claim: in words.
        clean: pairs of cells.
        noisy: the same with noise, one a clean pair.
        name: the quantity, higher for better.
        after: its name where there is noise, if that is another.
        primary: as in `Row`.
    """
    pairs = [*clean, *(noisy if noisy != clean else [])]
    by_seed: dict[int, list[float]] = {}
    lost: dict[int, list[tuple[float, float]]] = {}
    for clear, rough in zip(clean, noisy, strict=True):
        drops = [_drops(results, a, b, name, after or name) for a, b in zip(clear, rough, strict=True)]
        for seed in drops[0].keys() & drops[1].keys():
            by_seed.setdefault(seed, []).append(drops[0][seed] - drops[1][seed])
            lost.setdefault(seed, []).append((drops[0][seed], drops[1][seed]))
    compared = (*_compared(pairs, name), "drops", after)
    cells = [cell for pair in pairs for cell in pair]
    base = Row(claim, describe(cells, len(by_seed), results), "", NOT_RUN, None, primary, compared)
    if not by_seed:
        return base
    found = Estimate.of([float(np.mean(gaps)) for _, gaps in sorted(by_seed.items())])
    each = [np.median([drop[side] for drops in lost.values() for drop in drops]) for side in (0, 1)]
    row = judge(claim, base.run, found, f"drops {each[0]:.3g} -> {each[1]:.3g}, saved by the second", form="{:+.3f}")
    outcome = "; ".join(filter(None, [row.outcome, failed_of(results, pairs)]))
    row = replace(base, outcome=outcome, verdict=row.verdict, p=row.p)
    return _decided(row, results, pairs, name, len(by_seed))


def _drops(results: Results, clean: Trial, noisy: Trial, before: str, after: str) -> dict[int, float]:
    a, b = results.values(clean, before), results.values(noisy, after)
    drops = {seed: a[seed] - b[seed] for seed in a.keys() & b.keys()}
    return {seed: drop for seed, drop in drops.items() if math.isfinite(drop)}


def compare_spreads(results: Results, claim: str, pairs: Sequence[Pair], name: str, primary: str = "") -> Row:
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
    base = Row(claim, describe(cells, 0, results), "", NOT_RUN, None, primary, (*_compared(pairs, name), "spread"))
    if not found:
        return base
    row = judge(
        claim, base.run, Estimate.of(found), "mean distance to the median, change", higher=False, form="{:+.4f}"
    )
    outcome = "; ".join(filter(None, [f"{row.outcome}, {len(found)} pairs", failed_of(results, pairs)]))
    word, p = (row.verdict, row.p) if pooled > 1 or len(found) >= len(SEEDS) else (UNDECIDED, None)
    if _at_chance(results, pairs, name):
        word, p = AT_CHANCE, None
    return replace(base, outcome=outcome, verdict=word, p=p)


# ---- failed trainings
def failures(results: Results, cell: Trial) -> tuple[int, int]:
    """How many trainings of a cell failed, and of how many."""
    found = [value for value in results.column(cell, "failed") if math.isfinite(value)]
    return int(sum(found)), len(found)


def _failures(results: Results, cells: Iterable[Trial]) -> tuple[int, int]:
    counts = [failures(results, cell) for cell in dict.fromkeys(cells)]
    return sum(failed for failed, _ in counts), sum(total for _, total in counts)


def failed_of(results: Results, pairs: Sequence[Pair]) -> str:
    """The failed trainings of both sides, in words; nothing where there are none."""
    (a, n), (b, m) = (_failures(results, side) for side in zip(*pairs, strict=True))
    return f"{a} of {n} and {b} of {m} trainings failed" if a or b else ""


def compare_failures(results: Results, claim: str, pairs: Sequence[Pair], primary: str = "") -> Row:
    """Whether trainings of the second of each pair fail less often than those of the first (Fisher's exact test)."""
    first, second = (_failures(results, side) for side in zip(*pairs, strict=True))
    cells = [cell for pair in pairs for cell in pair]
    seeds = max((len(results.column(cell, "failed")) for cell in cells), default=0)
    base = Row(claim, describe(cells, seeds, results), "", NOT_RUN, None, primary, _compared(pairs, "failed"))
    if not first[1] or not second[1]:
        return base
    row = judge_failures(claim, base.run, first, second)
    return replace(base, outcome=row.outcome, verdict=row.verdict, p=row.p)


def judge_failures(claim: str, run: str, first: tuple[int, int], second: tuple[int, int], primary: str = "") -> Row:
    """Whether the second fails less often; both are counts of the failed and of all."""
    p = shares_p(first, second)
    word = UNDECIDED if p >= 0.05 else SUPPORTED if second[0] / second[1] < first[0] / first[1] else REFUTED
    outcome = f"{first[0]} of {first[1]} -> {second[0]} of {second[1]} failed; p = {p:.2g}"
    return Row(claim, run, outcome, word, p, primary)


def fails_often(claim: str, run: str, counts: dict[float, tuple[int, int]], share: float, primary: str = "") -> Row:
    """Whether of trainings with some h more than a share fails; `counts` has the failed and all, by h."""
    failed, total = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
    low, high = share_interval(failed, total)
    outcome = "; ".join(f"h = {h:g}: {a} of {n} fail" for h, (a, n) in sorted(counts.items()) if n)
    outcome += f"; {failed / total:.0%} ({low:.0%} to {high:.0%})"
    word = SUPPORTED if low > share else REFUTED if high < share else UNDECIDED
    return Row(claim, run, outcome, word, share_p(failed, total, share), primary)


def _at_chance(results: Results, pairs: Sequence[Pair], name: str) -> bool:
    """Whether of one side half of the trainings have failed, and it is accuracies or losses that are compared."""
    if name.startswith(NOT_PERFORMANCE):
        return False
    return any(2 * failed >= total > 0 for failed, total in (_failures(results, s) for s in zip(*pairs, strict=True)))


# ---- in words
def levels(results: Results, pairs: Sequence[Pair], name: str) -> str:
    """The medians of both, over seeds and pairs, of what is finite."""
    return _both(results, pairs, name, lambda values: f"{np.median(values):.3g}")


def _both(results: Results, pairs: Sequence[Pair], name: str, shown: Callable[[list[float]], str]) -> str:
    sides = [
        [v for cell in s for v in results.column(cell, name) if math.isfinite(v)] for s in zip(*pairs, strict=True)
    ]
    return " -> ".join(map(shown, sides)) if all(sides) else ""  # BN estimated anew is none without BN


def _beside(results: Results, pairs: Sequence[Pair], name: str) -> list[str]:
    """What stands beside a test accuracy: the paper's own statistic first, then others of the last epoch."""
    if name != "test_accuracy":
        return []
    paper = _both(results, pairs, "best_test_accuracy", _median_and_deviation)
    found = {f"{word} ": levels(results, pairs, other) for other, word in BESIDE.items()}
    found = {"best epochs as in the paper (median ± standard deviation) ": paper} | found
    return [word + shown for word, shown in found.items() if shown]


def _median_and_deviation(values: list[float]) -> str:
    deviation = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
    return f"{np.median(values):.3g}{deviation}"


def _compared(pairs: Sequence[Pair], name: str) -> tuple[str, ...]:
    """What is logged or tested besides does not make another training."""
    return (name, *(replace(cell, seed=0, log=False, probes=()).key for pair in pairs for cell in pair))


def describe(cells: Sequence[Trial], seeds: int, results: Results | None = None) -> str:
    """What was run, in words: networks, what they were trained on, epochs, precision, seeds."""
    ordered = sorted(cells, key=lambda cell: (cell.model, cell.depth, cell.norm))
    shown = ", ".join(dict.fromkeys(map(network, ordered)))
    records = [record for cell in cells if results for record in results.records_of(cell)]
    data: dict[str, Any] = next((record["data"] for record in records if "data" in record), {})
    epochs = " and ".join(dict.fromkeys(f"{cell.epochs}" for cell in cells))
    parts = [f"{epochs} epoch{'s' if epochs != '1' else ''}"]
    parts += filter(None, dict.fromkeys(map(_precision, records)))
    parts += [f"{seeds} seed{'s' if seeds != 1 else ''}"] if seeds else []
    return f"{shown}; {samples(cells[0], data)}; {', '.join(parts)}"


def samples(cell: Trial, data: Mapping[str, Any]) -> str:
    """What a cell is trained on; `data` is what a record says of it, where there is one that does."""
    images = cell.data == "cifar10"
    size = f"of {cell.size or 32} x {cell.size or 32}" if images else f"of {cell.size or 1024:,} letters"
    kind, whole = ("images", 50_000) if images else ("training texts", 0)
    first, last = cell.classes or (0, 0)
    drawn = OF_CLASSES.get((cell.data, cell.train or whole, cell.classes), 0) if cell.classes else cell.train or whole
    count = data.get("trained", max(drawn - cell.held_out, 0))
    words = f"{count:,} {kind} {size}" if count else f"all {kind} at hand {size}"
    if cell.classes:
        words = f"{count:,} {kind} {size}" if count else f"{kind} {size}"
        words += f", those of classes {first} to {last - 1} among {cell.train or whole:,}"
    if cell.held_out:
        words += f", {cell.held_out:,} more held out"
    if data and not images and not cell.train:
        words += f" ({data['train'] / 120_000:.0%} of AG-NEWS)"
    return words


def _precision(record: Record) -> str:
    """In what it was trained: TF32 is what a GPU makes of convolutions, a CPU has none."""
    precision = str(record["config"]["precision"]) if "config" in record else ""
    if precision == "tf32" and str(record.get("environment", {}).get("device", "cpu")).startswith("cpu"):
        return "fp32"
    return {"tf32": "TF32 convolutions", "bf16": "branches in bf16"}.get(precision, precision)


def network(cell: Trial) -> str:
    """The network of a cell, in words."""
    names = {"resnet": "ResNet", "vdcnn": "VDCNN", "vdcnn-original": "VDCNN"}
    original = " (the original one, He's initial values)" if cell.model == "vdcnn-original" else ""
    return f"{names[cell.model]}-{cell.depth}{original}{'' if cell.norm else ' without BN'}"
