"""The rows as tables, for the console and for docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.gpu.results import Row
from benchmarks.tables import Table

KINDS = {"fused": "fused", "eager": "eager", "compiled": "torch.compile", "x + h * f": "by hand"} | {
    name: name for name in ("Liger", "flash-linear-attention")
}


def machine(on: Row) -> str:
    """Where it was measured, and of what."""
    versions = ", ".join(f"{name} {version}" for name, version in on["versions"].items())
    text = f"{on['device']}; Python {on['python']}, {versions}"
    if "driver_version" in on:
        clocks = "SM {clocks.sm} of {clocks.max.sm}, memory {clocks.mem} of {clocks.max.mem}"
        for key in ("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem"):
            clocks = clocks.replace("{" + key + "}", on[key])
        text += f"; driver {on['driver_version']}, {clocks}, power limit {on['power.limit']}"
    return f"{text}; eulernet's files {on['source']}; {on['date']}; `{on['command']}`"


def tables(rows: Sequence[Row]) -> list[Table]:
    """What decides first, and no empty one."""
    kinds = (_correctness, _operations, _host, _models, _thresholds, _tiles, _failed)
    return [table for make in kinds if (table := make(rows)).rows]


def wrong(rows: Iterable[Row]) -> list[Row]:
    """The cases in which a kernel is wrong."""
    return [row for row in rows if row["table"] == "correctness" and not row["right"]]


def _correctness(rows: Sequence[Row]) -> Table:
    """A line for each dtype, and one for each case that is wrong."""
    mine = [row for row in rows if row["table"] == "correctness"]
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in mine):
        these = [row for row in mine if row["dtype"] == dtype]
        worst = max(these, key=lambda row: row["error"] / row["bound"])
        right = sum(row["right"] for row in these)
        lines.append([dtype, f"{right} of {len(these)} right; worst: {_case(worst)}", *_errors(worst)])
    lines += [[row["dtype"], f"WRONG: {_case(row)}", *_errors(row)] for row in wrong(mine)]
    columns = ("dtype", "kernels", "relative error", "eager's", "allowed")
    return Table("The kernels against float64, forward and backward", columns, 2, lines)


def _case(row: Row) -> str:
    return f"{row['worst']} of {row['name']}, {row['layout']}"


def _errors(row: Row) -> list[str]:
    return [f"{row[key]:.1e}" for key in ("error", "eager error", "bound")]


def _operations(rows: Sequence[Row]) -> Table:
    """Share of clone()'s rate by size; the kinds in one line, since they were measured in the same rounds."""
    mine = [row for row in rows if row["table"] == "operations"]
    sizes = sorted({row["MiB"] for row in mine})
    cells: dict[tuple[str, str, str, str], dict[float, str]] = {}
    for row in mine:
        for kind, title in KINDS.items():
            if f"{kind} share" in row and (row["beside"] == "eager" or kind != "fused"):
                key = (row["name"], row["dtype"], row["direction"], title)
                share = f"{row[f'{kind} share']:.0%} ({row[f'{kind} GB/s']:,.0f})"
                cells.setdefault(key, {})[row["MiB"]] = share
    order = {name: i for i, name in enumerate(dict.fromkeys(row["name"] for row in mine))}
    keys = sorted(
        cells, key=lambda key: (order[key[0]], key[1], key[2] == "backward", list(KINDS.values()).index(key[3]))
    )
    lines = [[*key, *(cells[key].get(size, "") for size in sizes)] for key in keys]
    columns = ("operation", "dtype", "direction", "by", *(f"{size:g} MiB" for size in sizes))
    return Table("Share of clone()'s bytes a second in the same rounds (GB/s)", columns, 4, lines)


def _host(rows: Sequence[Row]) -> Table:
    mine = [row for row in rows if row["table"] == "host"]
    lines = [
        [row["name"], row["what"], *(f"{row[f'{kind} us']:.1f}" for kind in ("eager", "fused", "more"))] for row in mine
    ]
    columns = ("line or block", "what", "eager us", "eulernet us", "more us")
    return Table("Microseconds of the host for a call on tiny tensors", columns, 2, lines)


def _models(rows: Sequence[Row]) -> Table:
    mine = [row for row in rows if row["table"] == "models"]
    lines = [
        [
            *(row["name"], row["what"], row["backend"], str(row["batch"])),
            *(f"{row['original ms']:.2f}", f"{row['patched ms']:.2f}"),
            f"{row['median']:.3f} ({row['low']:.3f}-{row['high']:.3f})",
            f"{row['hooks']:.3f}" if "hooks" in row else "",
            f"{row['patched device ms'] / row['original device ms']:.3f}" if "original device ms" in row else "",
            f"{row['patched bytes'] / row['original bytes']:.3f}" if row.get("original bytes") else "",
        ]
        for row in mine
    ]
    columns = ("model", "run", "backend", "batch", "original ms", "patched ms", "ratio", "hooks", "device", "memory")
    title = (
        "Time of the patched model / the original's (median, quartiles); of forward hooks; of the device alone; memory"
    )
    return Table(title, columns, 3, lines)


def _thresholds(rows: Sequence[Row]) -> Table:
    mine = [row for row in rows if row["table"] == "thresholds"]
    sizes = [key for key in mine[0] if key.isdigit()] if mine else []
    lines = [
        [
            row["name"],
            row["what"],
            str(row["batch"]),
            f"{row['original ms']:.2f}",
            *(f"{row[size]:.3f}" for size in sizes),
        ]
        for row in mine
    ]
    columns = ("model", "run", "batch", "original ms", *(f"{size} MiB" for size in sizes[:-1]), "never")
    return Table(
        "Time of the patched model / the original's, with kernels from a size of the state on", columns, 2, lines
    )


def _tiles(rows: Sequence[Row]) -> Table:
    """A line for each choice, the best first; a column for each size."""
    mine = [row for row in rows if row["table"] == "tiles"]
    names = ("READ", "STAGES", "HELD", "SINGLE_WARPS")
    sizes = sorted({row["MiB"] for row in mine})
    shares: dict[tuple[Any, ...], dict[float, float]] = {}
    for row in mine:
        key = row["name"], row["dtype"], *(row[name] for name in names)
        shares.setdefault(key, {})[row["MiB"]] = row["share"]
    ordered = sorted(shares.items(), key=lambda item: (*item[0][:2], -sum(item[1].values())))
    lines = [
        [*(("" if value is None else str(value)) for value in key), *(f"{of[n]:.0%}" if n in of else "" for n in sizes)]
        for key, of in ordered
    ]
    columns = ("backward of", "dtype", *names, *(f"{n:g} MiB" for n in sizes))
    return Table("Share of clone()'s bytes a second with other tiles (the constants of `_step.py`)", columns, 2, lines)


def _failed(rows: Sequence[Row]) -> Table:
    """A line for each error."""
    parts: dict[str, list[str]] = {}
    for row in rows:
        if row["table"] == "failed":
            parts.setdefault(row["error"], []).append(row["part"])
    lines = [[names[0] + (f" and {len(names) - 1} more" if names[1:] else ""), why] for why, names in parts.items()]
    return Table("Not measured", ("part", "why"), 2, lines)
