"""The JSON of what was measured: machines, and rows that name theirs. It is whole at every moment."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import eulernet

RESULTS = Path(__file__).parent.parent / "results" / "gpu.json"
PACKAGES = ("eulernet", "torch", "triton", "timm", "transformers", "liger-kernel", "fla-core")
QUERY = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
Row = dict[str, Any]


def machine(device: str) -> Row:
    """What is measured on, and what: device, driver, clocks under load, versions, the source of eulernet, the date."""
    found: Row = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "the CPU, tiny sizes: no measurement",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "source": source(),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"multiprocessors": properties.multi_processor_count, "memory": properties.total_memory}
        found["cache"] = getattr(properties, "L2_cache_size", None)
        found |= _nvidia_smi()
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return eulernet.__dict__.get("__version__", "not installed") if package == "eulernet" else None


def source() -> str:
    """A hash of eulernet's files: what was measured of others is measured again."""
    root = Path(eulernet.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _nvidia_smi() -> Row:
    """The driver, and the clocks while the device works."""
    try:
        torch.cuda._sleep(1 << 30)  # type: ignore[no-untyped-call]  # half a second
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        torch.cuda.synchronize()
        return dict(zip(QUERY.split(","), answer.splitlines()[0].split(", "), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return {"nvidia-smi": f"{type(error).__name__}: {error}"}


class Results:
    """The rows of a file, read when it is opened and written after each part."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = json.loads(path.read_text()) if path.exists() else {}
        self.machines: list[Row] = data.get("machines", [])
        self.rows: list[Row] = data.get("rows", [])
        self.begun: str | None = data.get("begun")  # the part that is being measured
        self.note: str | None = data.get("note")  # what somebody wrote about the rows

    def begin(self, part: str | None) -> None:
        """Note which part is being measured, for whoever finds the file later."""
        self.begun = part
        self._write()

    def add(self, part: str, rows: Iterable[Row], on: Row) -> None:
        """Put the rows of a part in place of those that it had."""
        if on not in self.machines:
            self.machines.append(on)
        where = self.machines.index(on)
        kept = [row for row in self.rows if row["part"] != part]
        self.rows = kept + [{**row, "part": part, "machine": where} for row in rows]
        self._drop_unused_machines()
        self._write()

    def fail(self, part: str, error: str, on: Row) -> None:
        """Put beside the rows of a part that there should be more, and why there are not."""
        mine = [row for row in self.of(part) if row["table"] != "failed" and self.machines[row["machine"]] == on]
        self.add(part, [*mine, {"table": "failed", "error": error}], on)

    def of(self, part: str) -> list[Row]:
        return [row for row in self.rows if row["part"] == part]

    def measured(self, on: Row) -> set[str]:
        """The parts that were measured whole, of this source and on such a device."""
        same = {i for i, m in enumerate(self.machines) if all(m[key] == on[key] for key in ("source", "device"))}
        failed = {row["part"] for row in self.rows if row["table"] == "failed"}
        return {row["part"] for row in self.rows if row["machine"] in same} - failed

    def _drop_unused_machines(self) -> None:
        used = sorted({row["machine"] for row in self.rows})
        self.machines = [self.machines[i] for i in used]
        self.rows = [row | {"machine": used.index(row["machine"])} for row in self.rows]

    def _write(self) -> None:
        lines = ",\n  ".join(json.dumps(row) for row in self.rows)
        machines = ",\n  ".join(json.dumps(each) for each in self.machines)
        begun = json.dumps(self.begun) + ("" if self.note is None else f',\n"note": {json.dumps(self.note)}')
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".draft")
        draft.write_text(f'{{"begun": {begun},\n"machines": [\n  {machines}\n],\n"rows": [\n  {lines}\n]}}\n')
        os.replace(draft, self.path)
