"""Results: one JSON line a trial, self-contained."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from reproductions.errors import DataError
from reproductions.locks import alone_in

Record = dict[str, Any]
FILE = "records.jsonl"
WHOLE = ("study", "config", "result")


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
    """The folder, if it can be written and no other study has its records there, which would be overwritten or mixed.

    Nothing is left in it.

    Raises:
        DataError: it can't be written, or another study has.
    """
    there = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        reason = "is a file" if there.is_file() else f"can't be written ({error.strerror})"
        raise DataError(f"{there} {reason}, so that no record would be kept; name another folder by --out.") from None
    studies = {record["study"] for record in read_records(folder, WHOLE)} if (folder / FILE).exists() else set()
    if studies - {study}:
        raise DataError(
            f"{folder / FILE} holds records of {', '.join(sorted(studies))}, not of {study}; give another one by --out."
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
    """Add one record to `folder/records.jsonl`, on the disk when this returns; several processes may do so at once.

    What an earlier process had begun to write when it was killed is no line, and is cut off.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    with path.open("ab+") as file, alone_in(file):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(_line(record).encode())
        file.flush()
        os.fsync(file.fileno())
    return path


def read_records(folder: Path, needed: Sequence[str] = ()) -> list[Record]:
    """The records of a folder, in the order in which they were written; a line that has no end is none.

    Args:
        folder: with `records.jsonl`.
        needed: entries that each must have, such as `WHOLE`.

    Raises:
        DataError: a line is no record; the message names it.
    """
    path, found = folder / FILE, []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
        try:
            record = json.loads(line)
            missing = [name for name in needed if name not in record] if isinstance(record, dict) else ["names at all"]
            reason = f"it has no {' and no '.join(missing)}" if missing else ""
        except ValueError as error:  # no JSON, or no UTF-8
            reason = str(error)
        if reason:
            raise DataError(
                f"{path}, line {number} is no record: {reason}. Delete the line (sed -i {number}d {path}); what it was "
                "the record of is run again with its command."
            )
        found.append(record)
    return found


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
