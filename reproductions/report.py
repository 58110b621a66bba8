"""REPORT.md: for each claim of the paper a row, made from the stored records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from reproductions import bounds, depth, dynamics, finetune, noise, robust, select, two_moon
from reproductions.claims import NOT_RUN, REFUTED, SUPPORTED, Results, Row, verdict
from reproductions.records import FILE, Record, mean_interval, read_records
from reproductions.scales import PRESETS

GRIDS: dict[str, ModuleType] = {
    "dynamics": dynamics,
    "depth": depth,
    "noise": noise,
    "select": select,
    "robust": robust,
    "finetune": finetune,
}
HEAD = """# What came of the paper's claims

Written by `python -m reproductions report` from the records beside this file.

The paper is *Towards Robust ResNet: A Small Step but a Giant Leap* (Zhang et al., IJCAI 2019, arXiv 1902.10887). A row
is one claim and one setting. Numbers are `h = 1 -> h = 0.1` (medians over seeds, after the last epoch unless it says
otherwise), the mean difference over seeds, and its 95 % interval. A verdict is *supported* or *refuted* when that
interval excludes 0, else *undecided*; *not run* says that there are no records. That something costs less than a point
is supported when the interval lies above -0.01, else refuted when it lies below 0. A verdict holds for the setting of
its row: a reduced setting says nothing about the paper's. There are many rows, and of those without any effect one in
twenty is decided by chance. `python -m reproductions STUDY --preset paper` is the paper's protocol;
[campaign.md](../campaign.md) lists what is still to be run, with its cost.

What the paper does not say and was chosen here: the generator of the mosaics (tiles replaced by their mean) and all
noise levels, the points of the grid of h, the layers called deep, and all of the TWO-MOON network. Convolutions without
BN have a bias; those of shortcuts have none. On AG-NEWS 371 of the 7,600 test texts stand almost the same in the 77,253
training texts at hand: the accuracy without them stands beside that of all.
"""
SCALES = {
    "smoke": "Smoke: a slice of the data, to see that all of it runs",
    "cpu": "Reduced to a CPU: 5,000 images of 16 x 16 pixels, 4,000 texts of 256 letters, two epochs",
    "small": "Reduced to 20 minutes on a GPU",
    "paper": "The paper's protocol",
}


def write(results: Path) -> Path:
    """Write `results/REPORT.md` from the records in the folders below."""
    path = results / "REPORT.md"
    path.write_text(text(results))
    return path


def text(results: Path) -> str:
    """What REPORT.md says of the records in the folders below."""
    stored = {path.parent.name: read_records(path.parent) for path in sorted(results.rglob(FILE))}
    trials = Results(record for records in stored.values() for record in records)
    parts = [HEAD, "## Fig. 1 and Fig. 4\n", table([*_euler(stored.get("euler")), *_two_moon(stored.get("two-moon"))])]
    for title, name, picture in (
        ("Fig. 2: weights and gradients", "dynamics", "dynamics*-{}.png"),
        ("Fig. 3: depth", "depth", "depth-{}.png"),
        ("Fig. 5: noise", "noise", "noise-{}.png"),
        ("Fig. 6: the choice of h", "select", "select-{}.png"),
        ("Learning rates, optimisers, no BN, other remedies", "robust", "robust-{}.png"),
        ("Beyond the paper: fine-tuning a patched network", "finetune", ""),
    ):
        parts.append(f"## {title}\n")
        if name == "dynamics":
            parts += ["Before training (no epoch):\n", table(start(stored.get("dynamics-init")))]
        parts += _scales(GRIDS[name].claims, trials, picture, results)
    parts += ["## Eq. 6, Propositions 1 and 2\n"]
    measured = stored.get("bounds", [])
    presets = [preset for preset in PRESETS if any(r["config"]["preset"] == preset for r in measured)]
    parts += [table(bounds.claims(measured, preset)) for preset in presets or ["paper"]]
    return "\n".join(parts)


def _scales(claims: Callable[[Results, str], list[Row]], trials: Results, picture: str, folder: Path) -> list[str]:
    """A table for each preset that was run; the paper's protocol is named even where it was not."""
    parts = []
    for preset in ("paper", "small", "cpu"):
        rows = claims(trials, preset)
        run = [row for row in rows if row.verdict != NOT_RUN]
        if run:
            parts += [f"{SCALES[preset]}:\n", table(rows)]
            found = sorted(folder.rglob(picture.format(preset))) if picture else []
            parts += [f"![{path.stem}]({path.relative_to(folder)})\n" for path in found]
        elif preset == "paper":
            parts += [f"<details><summary>{SCALES[preset]}: not run, {len(rows)} claims</summary>\n", table(rows)]
            parts.append("</details>\n")
    return parts


def table(rows: Iterable[Row]) -> str:
    lines = ["| claim | what was run | what came out | verdict |", "| --- | --- | --- | --- |"]
    lines += [f"| {row.claim} | {row.run} | {row.outcome} | **{row.verdict}** |" for row in rows]
    return "\n".join(lines).replace("||", "| |") + "\n"


# ---- the studies that are no grid of trials
def _euler(records: Sequence[Record] | None) -> list[Row]:
    claims = ("A smaller step factor approximates the solution better", "Euler's method is unstable beyond h = 2 / 2.3")
    if not records:
        return [Row(claim, "", "", NOT_RUN) for claim in claims]
    errors = {record["config"]["h"]: record["result"]["largest_error"] for record in records}
    ordered = [errors[h] for h in sorted(errors)]
    last = {record["config"]["h"]: abs(record["result"]["states"][-1]) for record in records}
    run = f"x' = -2.3 x, t to 5, h = {', '.join(f'{h:g}' for h in sorted(errors))}"
    shown = ", ".join(f"{error:.3f}" for error in ordered)
    growth = all((value > 1) == (h > 2 / 2.3) for h, value in last.items())
    ends = ", ".join(f"{last[h]:.2g}" for h in sorted(last))
    return [
        Row(claims[0], run, f"largest error {shown}", SUPPORTED if ordered == sorted(ordered) else REFUTED),
        Row(claims[1], run, f"last state {ends}, from 1", SUPPORTED if growth else REFUTED),
    ]


def _two_moon(records: Sequence[Record] | None) -> list[Row]:
    wanted = (
        ("noise_amplification", "Noise is amplified less over the blocks with h = 0.1", False),
        ("relative_noise_amplification", "The same, relative to how far the features spread (beyond the paper)", False),
        ("test_accuracy", "h = 0.1 classifies noisy points better", True),
    )
    if not records:
        return [Row(claim, "", "", NOT_RUN) for _, claim, _ in wanted]
    plain, small = (two_moon.select(records, arm) for arm in (two_moon.PLAIN, two_moon.EULER))
    rows = []
    rates = {"at each h's best learning rate": [two_moon.best_learning_rate(side) for side in (plain, small)]}
    rates |= {f"at learning rate {rate:g}": [rate, rate] for rate in (0.01, 0.1)}
    blocks = records[0]["config"]["steps"]
    for where, chosen in rates.items():
        sides = [two_moon.select(records, a, r) for a, r in zip((two_moon.PLAIN, two_moon.EULER), chosen, strict=True)]
        failed = [sum(record["result"]["failed"] for record in side) for side in sides]
        run = f"{blocks} blocks without BN, {where} ({chosen[0]:g}, {chosen[1]:g}), {len(sides[0])} seeds"
        for name, claim, higher in wanted:
            if "noise" in name and any(failed):
                continue
            gaps = [b["result"][name] - a["result"][name] for a, b in zip(*sides, strict=True)]
            mean, low, high = mean_interval(gaps)
            medians = " -> ".join(f"{np.median([r['result'][name] for r in side]):.3g}" for side in sides)
            outcome = (
                f"{medians}; {mean:+.3g} ({low:+.3g} to {high:+.3g}); {failed[0]} and {failed[1]} trainings failed"
            )
            rows.append(Row(claim, run, outcome, verdict(low, high, higher)))
    return rows


def start(records: Sequence[Record] | None) -> list[Row]:
    claim = "The gradient of layer 2 explodes with depth for h = 1, not for h = 0.1"
    if not records:
        return [Row(claim, "", "", NOT_RUN)]
    norms: dict[tuple[float, int], list[float]] = {}
    for record in records:
        key = record["config"]["h"], record["config"]["depth"]
        norms.setdefault(key, []).append(record["result"]["gradients"]["2"])
    depths = sorted({depth for _, depth in norms})
    shown = [" / ".join(f"{np.median(norms[h, depth]):.3g}" for depth in depths) for h in (1.0, 0.1)]
    seeds = len(norms[1.0, depths[0]])
    gaps = [b - a for a, b in zip(norms[1.0, depths[-1]], norms[0.1, depths[-1]], strict=True)]
    mean, low, high = mean_interval(gaps)
    run = f"ResNet-{' / '.join(map(str, depths))}, 64 images of 16 x 16, {seeds} seeds"
    outcome = (
        f"norm {shown[0]} with h = 1, {shown[1]} with h = 0.1; at {depths[-1]} {mean:+.3g} ({low:+.3g} to {high:+.3g})"
    )
    return [Row(claim, run, outcome, verdict(low, high, higher=False))]
