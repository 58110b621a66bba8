"""`python -m benchmarks.performance`: docs/performance.md and its plot, made from what was measured on a CPU, a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import RESULTS, Row
from benchmarks.tables import RESULTS as CPU
from benchmarks.tables import Table, machine, tables

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
PLOT = "performance.png"
HEAD = """# Performance

Made by `python -m benchmarks.performance` of what `python -m benchmarks` measured on a CPU and
`python -m benchmarks.gpu` on a GPU; no number stands here that was not measured.
"""
ON_CPU = """
## On a CPU

What is compared runs in turn, in one process; the ratios are of CPU time.
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
OPERATIONS = """
### Operations

Gigabytes a second: the bytes that must be moved (each operand read once, each result written once) over the time on the
device, buffers rotated past the cache; `clone()` is the speed of memory in the same run.
"""
LAUNCH = """
### Launching

Microseconds on the host for one call, and for one call with its gradient.
"""
MODELS = """
### Whole models

Time of the patched model over that of the original (median and quartiles of interleaved runs; below 1 is faster), AMP
with bfloat16, channels_last for convolutional models, and peak memory over the original's.
"""
# What is shown of a row, under which title.
COLUMNS: dict[str, dict[str, str]] = {
    "operations": {
        "name": "operation", "dtype": "dtype", "MiB": "MiB", "direction": "direction", "fused GB/s": "fused",
        "eager GB/s": "eager", "compiled GB/s": "torch.compile", "Liger GB/s": "Liger", "clone GB/s": "clone()",
    },
    "launch": {
        "name": "call", "elements": "elements", "forward us": "forward", "forward + backward us": "forward + backward",
    },
    "models": {
        "name": "model", "what": "run", "backend": "backend", "original ms": "original ms", "patched ms": "patched ms",
        "ratio": "ratio", "low": "lower quartile", "high": "upper quartile", "memory": "memory",
    },
}  # fmt: skip


def page(rows: Sequence[Row], cpu: dict[str, Any] | None = None) -> str:
    """The page for these measurements, on a GPU and on a CPU."""
    text = HEAD
    if cpu is not None:
        text += f"{ON_CPU}\n{machine(cpu)}; `{' '.join(cpu['command'])}`\n"
        text += "".join(f"\n**{table.title}**\n\n{_markdown(table)}" for table in tables(cpu))
    text += ON_GPU
    if not rows:
        return text + NOTHING
    for name, intro in (("operations", OPERATIONS), ("launch", LAUNCH), ("models", MODELS)):
        mine = [_with_memory(row) for row in rows if row["table"] == name]
        if not mine:
            continue
        text += intro
        if name == "operations":
            text += f"\n![Achieved operations a second over operations a byte, below the roof of memory]({PLOT})\n"
        for where in dict.fromkeys(_machine(row) for row in mine):
            text += f"\n{where}\n\n{_table([row for row in mine if _machine(row) == where], COLUMNS[name])}"
    return text


def _with_memory(row: Row) -> Row:
    if row.get("original bytes"):
        return row | {"memory": row["patched bytes"] / row["original bytes"]}
    return row


def _machine(row: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"{row['device']}; Python {row['python']}, {versions}; `{row['command']}`"


def _table(rows: Sequence[Row], columns: dict[str, str]) -> str:
    shown = {key: title for key, title in columns.items() if any(row.get(key) is not None for row in rows)}
    cells = [[_cell(row.get(key)) for key in shown] for row in rows]
    return _markdown(Table("", tuple(shown.values()), len(shown), cells))


def _markdown(table: Table) -> str:
    rules = ["---" if i < table.words else "--:" for i in range(len(table.columns))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (table.columns, rules, *table.rows))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"
    return "" if value is None else str(value)


def plot(rows: Sequence[Row], path: Path) -> None:
    """The roofline: operations a second over operations a byte; the roof is clone()'s bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    largest = max(row["MiB"] for row in rows)
    forward = [row for row in rows if row["direction"] == "forward" and row["MiB"] == largest]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    intensities = [row["flops"] / row["bytes"] for row in forward]
    roof = max(row["clone GB/s"] for row in forward)
    ends = [min(intensities) / 1.5, max(intensities) * 1.5]
    axes.plot(ends, [roof * x for x in ends], color="#6B6B6B", label=f"clone(), {roof:,.0f} GB/s")
    styles = {"fused": ("o", "#0072B2"), "compiled": ("s", "#E69F00"), "eager": ("x", "#D55E00")}
    for kind, (marker, colour) in styles.items():
        rates = [row[f"{kind} GB/s"] * x for row, x in zip(forward, intensities, strict=True)]
        axes.scatter(intensities, rates, marker=marker, color=colour, label=kind, zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="floating-point operations a byte", ylabel="10⁹ operations a second")
    axes.set_title(f"{forward[0]['device']}, operands of {largest:g} MiB, forward")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(results: Path = RESULTS, target: Path = PAGE, cpu: Path = CPU) -> int:
    rows: list[Row] = json.loads(results.read_text()) if results.exists() else []
    target.parent.mkdir(exist_ok=True)
    target.write_text(page(rows, json.loads(cpu.read_text()) if cpu.exists() else None))
    operations = [row for row in rows if row["table"] == "operations"]
    if operations:
        plot(operations, target.parent / PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
