"""Measure what is not there yet, in the order of what it decides, for some minutes; print the tables."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.gpu import plan, supervise
from benchmarks.gpu.results import RESULTS, Results, machine
from benchmarks.gpu.sizes import EARNEST, TINY, Sizes
from benchmarks.gpu.tables import machine as words
from benchmarks.gpu.tables import tables, wrong
from benchmarks.tables import rich_table

NO_GPU = (
    "There is no CUDA device here: benchmarks.gpu measures a GPU (--smoke runs all of it on the CPU with tiny sizes, "
    "which measures nothing)."
)
CHECKS = 90.0  # seconds at most of the checks, and a third of the time


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.time()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0, help="how long, at most; the first 4 hold what decides")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go, and what is there already")
    parser.add_argument("-k", default="", help="a regular expression on the parts: operations/.*ReLU/bfloat16, models")
    parser.add_argument("--again", action="store_true", help="measure what is there, too")
    parser.add_argument("--list", action="store_true", help="only name the parts, in their order")
    parser.add_argument("--smoke", action="store_true", help="run it all with tiny sizes; nothing is written")
    given = parser.parse_args(arguments)
    sizes = TINY if given.smoke else EARNEST
    checks = [part.name for part in plan.checks() if re.search(given.k, part.name)]
    parts = [part.name for part in plan.parts(sizes) if re.search(given.k, part.name)]
    if given.list:
        print("\n".join([*checks, *parts]))
        return 0
    if not given.smoke and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 1
    if not given.smoke:
        return _run(checks, parts, given.json, began + 60 * given.minutes, sizes, given.again)
    os.environ["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        return _run(checks, parts, Path(folder) / "gpu.json", began + 60 * given.minutes, sizes, given.again)


def _run(checks: Sequence[str], parts: Sequence[str], path: Path, end: float, sizes: Sizes, again: bool) -> int:
    on, results = machine(sizes.device), Results(path)
    there = set() if again else results.measured(on)
    checks, parts = ([name for name in names if name not in there] for names in (checks, parts))
    print(f"{words(on)}\n{len(there)} parts are there, {len(checks) + len(parts)} are to be measured", file=sys.stderr)
    if checks:
        now = time.time()
        supervise.check(checks, results, on, min(end, now + CHECKS, now + (end - now) * 0.3), sizes)
        print(f"checked in {time.time() - now:.0f} s", file=sys.stderr)
    results = supervise.measure(parts, results, on, end, sizes)
    asked = {*checks, *parts}
    rows = [row for row in results.rows if row["part"] in asked]
    console = Console(width=160)
    for table in tables(rows):
        console.print(rich_table(table, narrow=False))
    left = asked - {row["part"] for row in rows}
    if left:
        print(f"{len(left)} parts did not fit into the time; the same command goes on with them", file=sys.stderr)
    failed = wrong(rows) or any(row["table"] == "failed" for row in rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
