"""`python -m benchmarks`: run all, or those whose name matches `-k`; print the tables; write the JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("-k", default="", help="only the benchmarks whose name matches, as in pytest: -k 'patch'")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "cpu.json", help="where the results go")
    parser.add_argument("--show", action="store_true", help="only print the tables of that file")
    arguments = parser.parse_args()
    if not arguments.show:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        options = ["-o", "addopts=", "-W", "default", "-p", "no:cacheprovider", "--timeout=0", "-k", arguments.k]
        failed = pytest.main([str(HERE), *options, f"--benchmark-json={arguments.json}", "--benchmark-columns=rounds"])
        if failed:
            return failed
        _shorten(arguments.json)
    show(json.loads(arguments.json.read_text()))
    return 0


def _shorten(path: Path) -> None:
    """Keep what the tables need and where it was measured."""
    raw = json.loads(path.read_text())
    machine = raw["machine_info"]
    kept = {key: machine[key] for key in ("device", "threads", "system", "release", "python_version", "versions")}
    results = [benchmark["extra_info"] for benchmark in raw["benchmarks"]]
    command = ["python", "-m", "benchmarks", *sys.argv[1:]]
    path.write_text(json.dumps({"command": command, "machine": kept, "results": results}, indent=1) + "\n")


def _ratio(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})"


def show(data: dict[str, Any]) -> None:
    console = Console()
    machine = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    console.print(f"{machine['device']}, {machine['threads']} thread; Python {machine['python_version']}, {versions}")
    speed = Table(title="CPU time / the original's (median, quartiles); noise: a copy / the original")
    for title in ("model", "what", "patched", "folded", "noise"):
        speed.add_column(title, justify="left" if title in ("model", "what") else "right")
    moving = Table(
        title="CPU time of a training step, h learned / h fixed (median, quartiles); noise: a copy / the same; "
        "one HScheduler.step / the training step"
    )
    for title in ("model", "what", "steps", "learned", "noise", "HScheduler"):
        moving.add_column(title, justify="left" if title in ("model", "what") else "right")
    patch = Table(
        title="patch: CPU seconds in a fresh process, again, and of one forward; peak memory beyond the model"
    )
    for title in ("model", "steps", "first", "again", "forward", "peak MB", "largest block MB", "model MB"):
        patch.add_column(title, justify="left" if title == "model" else "right")
    for row in data["results"]:
        if row["table"] == "speed":
            cells = [_ratio(row.get(key)) for key in ("ratio", "folded", "noise")]
            speed.add_row(row["model"], row["what"], *cells)
        elif row["table"] == "moving":
            schedule = f"{row['schedule']['median']:.1e}"
            cells = [_ratio(row["learned"]), _ratio(row["noise"]), schedule]
            moving.add_row(row["model"], row["backend"], str(row["steps"]), *cells)
        else:
            seconds = [f"{row[key]:.2f}" if key in row else "" for key in ("first", "again", "forward")]
            memory = [f"{row[key] / 1e6:.0f}" for key in ("peak_memory", "block_memory", "model_memory")]
            patch.add_row(row["model"], str(row["steps"]), *seconds, *memory)
    for table in (speed, moving, patch):
        if table.row_count:
            console.print(table)


if __name__ == "__main__":
    sys.exit(main())
