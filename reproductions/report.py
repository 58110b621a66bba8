"""What is made of the stored records: the pictures, and REPORT.md, which has a row for each claim of the paper."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt

from reproductions import campaign, desk
from reproductions.evidence.claims import NOT_RUN, REFUTED, SUPPORTED, UNDECIDED, Results, Row
from reproductions.evidence.statistics import holm
from reproductions.evidence.style import STYLE, save
from reproductions.presets import PRESETS
from reproductions.records import FILE, WHOLE, read_records
from reproductions.studies import GRIDS, STUDIES

HEAD = """# What came of the paper's claims

Written by `python -m reproductions report` from the records beside this file.

The paper is *Towards Robust ResNet: A Small Step but a Giant Leap* (Zhang et al., IJCAI 2019, arXiv 1902.10887). A
row is one comparison in one setting, and fewer than three seeds decide nothing. Numbers are `h = 1 -> h = 0.1`
(medians over seeds, after the last epoch unless it says otherwise), the mean difference over seeds, and its 95 %
interval: paired by seed, or Welch's where networks of different depths are compared. A verdict holds for the setting
of its row: a reduced setting says nothing about the paper's.

- **supported**, **refuted**: the interval excludes 0; else **undecided**. What is to be the same, or to cost less
  than a point, is judged by the margin of 0.01: supported when the interval lies within it, refuted when it lies
  outside.
- **at chance**: half of the trainings of an arm failed (loss not finite, or above 0.95 ln(classes), that of
  guessing), so that its accuracy and loss say nothing; the failed trainings have a row of their own.
- **holds**, **violated**: a theorem, which one number can violate.
- **not run**: there are no records, or they lack what was asked.

What the paper does not say and was chosen here: the generator of the mosaics (tiles replaced by their mean) and all
noise levels, the points of the grid of h, the layers called deep (the last convolution and the middle one), what a
small h is (up to 0.1) and what "often" (more than a fifth), and all of the TWO-MOON network. Convolutions without BN
have a bias; those of shortcuts have none. VDCNN has the linear maps of the paper's authors and PyTorch's initial
values; the original one, which has He's, is named so.

The data at hand: of the 60,000 images of CIFAR-10 92 are decoded from JPEG copies and so not exact; of the 120,000
training texts of AG-NEWS there are 77,253 (64 %), and 371 of the 7,600 test texts stand almost the same in them: the
accuracy without these stands beside that of all. Records from November 2026 on hold numbers and hash of their data, and
the commit.

`python -m reproductions STUDY --preset paper` is the paper's protocol; [campaign.md](../campaign.md) lists what is
still to be run, with its cost.
"""
FIRST = """## The paper's claims

These rows were named as primary before the paper's protocol was run, when the records of the reduced settings were
there already. Each shows the setting nearest to the paper's in which it was run. The p are corrected by Holm's method
for all rows of this table that have one: *supported* and *refuted* are what is left of these words after it. The rows
further down are not corrected: of those without any effect one in twenty is decided by chance.
"""
BEFOREHAND = """## Asked beforehand of the campaign and the desk

The primary hypotheses of `campaign` (cell 1, on a GPU) and of `desk` (on CPU cores), which their modules state and
which were written before the first of their trainings. They hold for these settings, and their p are not corrected.
"""
SCALES = {  # the nearest to the paper first
    "paper": "The paper's protocol",
    "gpu": "On a GPU at hand for 15 minutes: all images, 20 epochs, branches in bf16",
    "small": "Reduced to 20 minutes on a GPU",
    "desk": "On CPU cores, for hours: 10,000 images of 8 x 8 pixels, 15 epochs; 8,000 texts of 128 letters, 4 epochs",
    "cpu": "Reduced to a CPU: 5,000 images of 16 x 16 pixels, 4,000 texts of 256 letters, two epochs",
}


def draw(folder: Path) -> list[Path]:
    """Draw the figures of the studies whose records lie in `folder`, beside them; returns their paths."""
    results = Results(read_records(folder, WHOLE), folder)
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
    results = Results(record for path in sorted(folder.rglob(FILE)) for record in read_records(path.parent, WHOLE))
    parts = [HEAD, FIRST, table(primary(results), corrected=True), BEFOREHAND, table(beforehand(results, folder))]
    missing = ["## Not run\n"]
    seen: set[object] = set()
    for name, study in STUDIES.items():
        if not hasattr(study, "claims"):
            continue
        parts.append(f"## {study.TITLE}\n")
        for preset in _presets(results, name):
            rows = [row for row in study.claims(results, preset) if _new(row, seen)]
            run = [row for row in rows if row.verdict != NOT_RUN]
            if run:
                parts += [f"{SCALES[preset]}:\n"] if name in GRIDS else []
                parts += [table(run), *_pictures(folder, name, preset)]
            if len(rows) > len(run) and (run or preset == "paper" or name not in GRIDS):
                missing.append(_missing(study.TITLE, preset if name in GRIDS else "", rows))
    return "\n".join([*parts, *missing])


def _presets(results: Results, name: str) -> list[str]:
    """The presets to ask a study for: of one that is no grid that of its records."""
    if name in GRIDS:
        return [preset for preset in SCALES if preset in (*PRESETS, *getattr(GRIDS[name], "ALSO", ()))]
    run = {record["config"].get("preset", "paper") for record in results.of(name)}
    return [preset for preset in SCALES if preset in run] or ["paper"]


def _missing(title: str, preset: str, rows: list[Row]) -> str:
    claims = [row.claim + (f" ({row.outcome})" if row.outcome else "") for row in rows if row.verdict == NOT_RUN]
    where = f", {SCALES[preset][0].lower()}{SCALES[preset][1:].partition(':')[0]}" if preset else ""
    number = f"{len(claims)} comparison{'s' if len(claims) > 1 else ''}"
    return f"<details><summary>{title}{where}: {number}</summary>\n\n{'; '.join(claims)}.\n\n</details>\n"


def primary(results: Results) -> list[Row]:
    """The rows of the first table, each of the setting nearest to the paper's, with p and verdict corrected by Holm."""
    rows: dict[str, Row] = {}
    for name, study in STUDIES.items():
        for preset in _presets(results, name) if hasattr(study, "claims") else ():
            for row in study.claims(results, preset):
                if row.primary and (row.primary not in rows or rows[row.primary].verdict == NOT_RUN):
                    rows[row.primary] = row
    tested = [name for name, row in rows.items() if row.p is not None]
    for name, p in zip(tested, holm([rows[name].p or 0.0 for name in tested]), strict=True):
        word = rows[name].verdict
        rows[name] = replace(rows[name], p=p, verdict=UNDECIDED if p >= 0.05 and word in (SUPPORTED, REFUTED) else word)
    return [replace(row, claim=name) for name, row in rows.items()]


def beforehand(results: Results, folder: Path) -> list[Row]:
    """The primary hypotheses of the campaign, as its probe chose the epochs, and of the desk."""
    probe = folder / "campaign" / "probe.json"
    rows: list[Row] = []
    if probe.exists():
        notes = json.loads(probe.read_text())
        rows += campaign.primary(results, notes["preset"], notes["chosen"]["epochs"], notes["chosen"]["precision"])
    return [*rows, *desk.primary(results)]


def _new(row: Row, seen: set[object]) -> bool:
    """Whether what the row compares has had no row yet."""
    what = row.compared or (row.claim, row.run)
    return not (what in seen or seen.add(what))  # type: ignore[func-returns-value]


def _pictures(folder: Path, name: str, preset: str) -> list[str]:
    """The pictures of a study: of a grid those of the preset, of others all that lie in a folder of its name."""
    found = folder.rglob(f"{name}*-{preset}.png") if name in GRIDS else folder.glob(f"{name}/*.png")
    return [f"![{path.stem}]({path.relative_to(folder)})\n" for path in sorted(found)]


def table(rows: Iterable[Row], corrected: bool = False) -> str:
    titles = ["claim", "what was run", "what came out", *(["p (Holm)"] if corrected else []), "verdict"]
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for row in rows:
        p = [f"{row.p:.2g}" if row.p is not None and row.verdict != NOT_RUN else ""] if corrected else []
        lines.append("| " + " | ".join([row.claim, row.run, row.outcome, *p, f"**{row.verdict}**"]) + " |")
    return "\n".join(lines) + "\n"
