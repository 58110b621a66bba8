"""What `python -m benchmarks` measured on a CPU, as tables: printed by it, and written into docs/performance.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import rich.table

RESULTS = Path(__file__).parent / "results" / "cpu.json"


class Table(NamedTuple):
    """Rows of text below a title and the names of their columns, the first `words` of which are no numbers."""

    title: str
    columns: tuple[str, ...]
    words: int
    rows: list[list[str]]


def rich_table(table: Table) -> rich.table.Table:
    """A table for the console."""
    made = rich.table.Table(title=table.title)
    for i, name in enumerate(table.columns):
        word = i < table.words
        made.add_column(name, justify="left" if word else "right", no_wrap=not word)
    for row in table.rows:
        made.add_row(*row[: table.words], *(number.replace(" ", "\n") for number in row[table.words :]))
    return made


def machine(data: dict[str, Any]) -> str:
    """Where it was measured."""
    where = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return f"{where['device']}, {where['threads']} thread; Python {where['python_version']}, {versions}"


def tables(data: dict[str, Any]) -> list[Table]:
    """What patched models cost, what a moving h costs, what `patch` itself costs; no empty table."""
    speed = Table(
        "CPU time / the original's (median, quartiles); noise: a copy / the original",
        ("model", "what", "patched", "folded", "noise"),
        2,
        [
            [row["model"], row["what"], *(_ratio(row.get(key)) for key in ("ratio", "folded", "noise"))]
            for row in data["results"]
            if row["table"] == "speed"
        ],
    )
    moving = Table(
        "CPU time of a training step, h learned / h fixed (median, quartiles); noise: a copy / the same; "
        "one HScheduler.step / the training step",
        ("model", "what", "steps", "learned", "noise", "HScheduler"),
        2,
        [
            [
                *(row["model"], row["backend"], str(row["steps"])),
                *(_ratio(row["learned"]), _ratio(row["noise"]), f"{row['schedule']['median']:.1e}"),
            ]
            for row in data["results"]
            if row["table"] == "moving"
        ],
    )
    patch = Table(
        "patch: CPU seconds in a fresh process, again, and of one forward; peak memory beyond the model",
        ("model", "steps", "first", "again", "forward", "peak MB", "largest block MB", "model MB"),
        1,
        [
            [
                *(row["model"], str(row["steps"])),
                *(f"{row[key]:.2f}" if key in row else "" for key in ("first", "again", "forward")),
                *(f"{row[key] / 1e6:.0f}" for key in ("peak_memory", "block_memory", "model_memory")),
            ]
            for row in data["results"]
            if row["table"] == "patch"
        ],
    )
    return [table for table in (speed, moving, patch) if table.rows]


def _ratio(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})"
