"""What is made of the stored records: the pictures, and REPORT.md, which has a row for each claim of the paper."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib.pyplot as plt

from reproductions.evidence.claims import NOT_RUN, Results, Row
from reproductions.evidence.style import STYLE, save
from reproductions.presets import PRESETS
from reproductions.records import FILE, read_records
from reproductions.studies import GRIDS, STUDIES

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


def draw(folder: Path) -> list[Path]:
    """Draw the figures of the studies whose records lie in `folder`, beside them; returns their paths."""
    results = Results(read_records(folder), folder)
    with plt.rc_context(STYLE):
        return [
            save(figure, folder / f"{name}.png")
            for study in STUDIES.values()
            if hasattr(study, "figures")
            for name, figure in study.figures(results)
        ]


def write(results: Path) -> Path:
    """Write `results/REPORT.md` from the records in the folders below."""
    path = results / "REPORT.md"
    path.write_text(text(results))
    return path


def text(folder: Path) -> str:
    """What REPORT.md says of the records in the folders below."""
    results = Results(record for path in sorted(folder.rglob(FILE)) for record in read_records(path.parent))
    euler, two_moon, dynamics, bounds = (STUDIES[name] for name in ("euler", "two-moon", "dynamics", "bounds"))
    parts = [HEAD, "## Fig. 1 and Fig. 4\n"]
    parts.append(table([*euler.claims(results, ""), *two_moon.claims(results, "")]))
    for name, study in GRIDS.items():
        parts.append(f"## {study.TITLE}\n")
        if study is dynamics:
            parts += ["Before training (no epoch):\n", table(dynamics.start_claims(results))]
        parts += _scales(study.claims, results, f"{name}*-{{}}.png", folder)
    parts.append(f"## {bounds.TITLE}\n")
    run = [preset for preset in PRESETS if any(r["config"]["preset"] == preset for r in results.of("bounds"))]
    parts += [table(bounds.claims(results, preset)) for preset in run or ["paper"]]
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
