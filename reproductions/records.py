"""Results: one JSON line a trial, self-contained."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from reproductions.errors import DataError

Record = dict[str, Any]
FILE = "records.jsonl"


@lru_cache(maxsize=1)
def commit() -> str:
    """The commit of the checkout, with a `+` where something in it is changed; nothing outside of a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def environment(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Commit, versions and device, for a record."""
    device = torch.device(device)
    try:
        ours = version("eulernet")
    except PackageNotFoundError:  # run from a checkout that is not installed
        ours = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    return {
        "eulernet": ours,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": name,
        "threads": torch.get_num_threads(),
    }


def check_folder(folder: Path, study: str) -> Path:
    """The folder, if no other study has its records there: they would be overwritten, or mixed with this one's.

    Raises:
        DataError: another one has.
    """
    there = {record["study"] for record in read_records(folder)} if (folder / FILE).exists() else set()
    if there - {study}:
        raise DataError(
            f"{folder / FILE} holds records of {', '.join(sorted(there))}, not of {study}; give another one by --out."
        )
    return folder


def write_records(folder: Path, records: Iterable[Record]) -> Path:
    """Write `folder/records.jsonl`, whole or not at all.

    Numbers but those of the configuration keep five digits, and those that are not finite become null.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w") as file:
        for record in records:
            file.write(_line(record))
    os.replace(unfinished, path)
    return path


def append_record(folder: Path, record: Record) -> Path:
    """Add one record to `folder/records.jsonl`, on the disk when this returns.

    What an earlier process had begun to write when it was killed is no line, and is cut off.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(_line(record).encode())
        file.flush()
        os.fsync(file.fileno())
    return path


def read_records(folder: Path) -> list[Record]:
    """The records of a folder, in the order in which they were written; a line that has no end is none."""
    whole, _, _ = (folder / FILE).read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def _line(record: Record) -> str:
    short = {key: value if key == "config" else _compact(value) for key, value in record.items()}
    return json.dumps(short, allow_nan=False, separators=(",", ":")) + "\n"


def _compact(value: Any) -> Any:
    """Five significant digits, and null for what JSON has no word for."""
    if isinstance(value, dict):
        return {key: _compact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_compact(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
