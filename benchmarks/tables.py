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


def rich_table(table: Table, narrow: bool = True) -> rich.table.Table:
    """A table for the console; `narrow`: what stands in one cell of numbers may stand on several lines."""
    made = rich.table.Table(title=table.title)
    for i, name in enumerate(table.columns):
        word = i < table.words
        made.add_column(name, justify="left" if word else "right", no_wrap=not word)
    for row in table.rows:
        made.add_row(*row[: table.words], *(n.replace(" ", "\n") if narrow else n for n in row[table.words :]))
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
    return [table for table in (speed, *_peers(data), _host(data), moving, patch) if table.rows]


def _peers(data: dict[str, Any]) -> list[Table]:
    """What people use instead: time over the original's, and memory; then what it takes to get there."""
    mine = [row for row in data["results"] if row["table"] == "peers"]
    names = list(dict.fromkeys(name for row in mine for name in row["ratios"]))
    ratios = [[row["model"], row["what"], *(_ratio(row["ratios"].get(name)) for name in names)] for row in mine]
    saved = [
        [row["model"], row["what"], *(_megabytes(row["saved"].get(name)) for name in ["original", *names])]
        for row in mine
        if row["saved"]
    ]
    transforms = [row for row in data["results"] if row["table"] == "transform"]
    lines = [
        [
            *(row["model"], row["peer"], row["error"] or ""),
            *("" if row["error"] else f"{row[key]:.2f}" for key in ("transform", "first", "forward")),
        ]
        for row in transforms
    ]
    return [
        Table("CPU time / the original's (median, quartiles)", ("model", "what", *names), 2, ratios),
        Table("MB saved for the backward pass", ("model", "what", "original", *names), 2, saved),
        Table(
            "CPU seconds in a fresh process: to transform the model, of the first forward, of one forward",
            ("model", "by", "not taken", "transform", "first", "forward"),
            3,
            lines,
        ),
    ]


def _host(data: dict[str, Any]) -> Table:
    return Table(
        "Microseconds on the host for a call on tiny tensors, under a driver that launches nothing",
        ("line or block", "what", "eager", "eulernet", "more"),
        2,
        [
            [row["name"], row["what"], *(f"{row[f'{kind} us']:.1f}" for kind in ("eager", "fused", "more"))]
            for row in data["results"]
            if row["table"] == "host"
        ],
    )


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.0f}"


def _ratio(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})"
