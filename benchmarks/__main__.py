"""`python -m benchmarks`: run all, or those whose name matches `-k`; print the tables; write the JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.tables import RESULTS, machine, rich_table, tables

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("-k", default="", help="only the benchmarks whose name matches, as in pytest: -k 'patch'")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go")
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
    found = raw["machine_info"]
    kept = {key: found[key] for key in ("device", "threads", "system", "python_version", "versions")}
    measured = [benchmark["extra_info"] for benchmark in raw["benchmarks"]]
    results = [row for one in measured for row in one.get("rows", [one])]
    command = ["python", "-m", "benchmarks", *sys.argv[1:]]
    path.write_text(json.dumps({"command": command, "machine": kept, "results": results}, indent=1) + "\n")


def show(data: dict[str, Any]) -> None:
    console = Console()
    console.print(machine(data))
    for table in tables(data):
        console.print(rich_table(table))


if __name__ == "__main__":
    sys.exit(main())
