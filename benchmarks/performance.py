"""`python -m benchmarks.performance`: docs/performance.md and its plot, made from what was measured on a CPU, a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fused import RESULTS as FUSED
from benchmarks.fused import table as fused_table
from benchmarks.gpu import tables as gpu
from benchmarks.gpu.results import RESULTS, Row
from benchmarks.tables import RESULTS as CPU
from benchmarks.tables import Table, machine, tables

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
PLOT = "performance.png"
HEAD = """# Performance

Made by `python -m benchmarks.performance` of what `python -m benchmarks` measured on a CPU, `python -m benchmarks.gpu`
measured on a GPU, and `python -m benchmarks.fused` counted; no number stands here that was not measured.
"""
ON_CPU = """
## On a CPU

What is compared runs in turn, in one process; the ratios are of CPU time.
"""
COUNTED = """
## What is fused

Counted, not timed: each model runs once as a GPU would run it in eager mode with large states. A step that is not fused
is one kernel of ATen's. In a pre-norm transformer the norm of each second step is called by the next block: it is fused
in evaluation (under `torch.no_grad()`, not in inference mode, where nobody counts who writes into the state between).
"""
ON_GPU = """
## On a GPU
"""
NOTHING = """
Nothing has been measured on a GPU yet. On a machine with one:

```bash
python -m benchmarks.gpu
python -m benchmarks.performance
```
"""
MEASURED = f"""
Operations: bytes are counted (each operand read once, each result written once) over the time on the device; `clone()`
of one operand is timed in the same rounds, and buffers rotate past the cache. Models: AMP with bfloat16, channels_last
for convolutional ones, variants in turn.

![Share of clone()'s rate by operation and size, and time of patched models over the original's]({PLOT})
"""


def page(data: dict[str, Any], cpu: dict[str, Any] | None = None, fused: dict[str, Any] | None = None) -> str:
    """The page for these measurements, on a GPU and on a CPU, and these counts of what is fused."""
    text = HEAD
    if cpu is not None:
        text += f"{ON_CPU}\n{machine(cpu)}; `{' '.join(cpu['command'])}`\n"
        text += "".join(f"\n**{table.title}**\n\n{_markdown(table)}" for table in tables(cpu))
    if fused is not None:
        found = fused_table(fused["rows"])
        text += f"{COUNTED}\n{fused['versions']}; `{fused['command']}`\n\n**{found.title}**\n\n{_markdown(found)}"
    text += ON_GPU
    if not data.get("rows"):
        return text + NOTHING
    text += MEASURED
    text += f"\n{data['note']}\n" if data.get("note") else ""  # of this measurement; the next one drops it
    for i, on in enumerate(data["machines"]):
        mine = [row for row in data["rows"] if row["machine"] == i]
        text += f"\n### {gpu.machine(on)}\n"
        text += "".join(f"\n**{table.title}**\n\n{_markdown(table)}" for table in gpu.tables(mine))
    return text


def _markdown(table: Table) -> str:
    rules = ["---" if i < table.words else "--:" for i in range(len(table.columns))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (table.columns, rules, *table.rows))


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Above, the share of clone()'s rate that each operation reaches by size; below, the ratio of each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    operations = [row for row in _latest(rows, "operations") if "eager share" in row]
    models = _latest(rows, "models")
    figure, axes = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    _plot_shares(operations, axes[0])
    _plot_ratios(models, axes[1])
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _latest(rows: Sequence[Row], table: str) -> list[Row]:
    """Those of a table that the machine measured that came last: of one state of the library."""
    mine = [row for row in rows if row["table"] == table]
    return [row for row in mine if row["machine"] == max(row["machine"] for row in mine)]


def _plot_shares(rows: Sequence[Row], axes: Any) -> None:
    """A place for each operation and direction, a marker for each size; bfloat16."""
    mine = [row for row in rows if row["dtype"] == "bfloat16"]
    names = list(dict.fromkeys(f"{row['name']}, {row['direction']}" for row in mine))[::-1]
    for size, marker in zip(sorted({row["MiB"] for row in mine}), "^osD", strict=False):
        these = [row for row in mine if row["MiB"] == size]
        places = [names.index(f"{row['name']}, {row['direction']}") for row in these]
        axes.scatter(
            [row["fused share"] for row in these], places, marker=marker, color="#0072B2", label=f"fused, {size:g} MiB"
        )
        axes.scatter(
            [row["eager share"] for row in these], places, marker=marker, facecolors="none", edgecolors="#D55E00",
            label=f"eager, {size:g} MiB",
        )  # fmt: skip
    axes.axvline(1, color="#6B6B6B", linewidth=1)
    axes.set(yticks=range(len(names)), xlabel="share of clone()'s bytes a second, bfloat16", xlim=(0, None))
    axes.set_yticklabels(names, fontsize=8)
    if names:
        axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.4, -0.1))


def _plot_ratios(rows: Sequence[Row], axes: Any) -> None:
    """A place for each model and run, with the quartiles."""
    names = [f"{row['name']}, {row['what']}, {row['backend']}, batch {row['batch']}" for row in rows]
    for place, row in enumerate(rows):
        axes.plot([row["low"], row["high"]], [place, place], color="#0072B2")
        axes.plot(row["median"], place, "o", color="#0072B2", label="patched" if place == 0 else None)
        if "hooks" in row:
            axes.plot(row["hooks"], place, "x", color="#D55E00", label="forward hooks" if place == 0 else None)
    axes.axvline(1, color="#6B6B6B", linewidth=1)
    axes.set(yticks=range(len(names)), xlabel="time / the original's (median, quartiles)")
    axes.set_yticklabels(names, fontsize=7)
    axes.invert_yaxis()
    if names:
        axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1))


def main(results: Path = RESULTS, target: Path = PAGE, cpu: Path = CPU, fused: Path = FUSED) -> int:
    data: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    target.parent.mkdir(exist_ok=True)
    others = [json.loads(path.read_text()) if path.exists() else None for path in (cpu, fused)]
    target.write_text(page(data, *others))
    if data.get("rows"):
        plot(data["rows"], data["machines"][-1]["device"], target.parent / PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
