"""From which size on a kernel pays in eager mode, by what was measured: `python -m benchmarks.gpu.pays`.

For a state of S MiB a kernel saves the time T of the device, which goes with the size, and adds the time A of the host,
which does not. So it pays from S * A / T on, here rounded up to a power of two.

A is that of `benchmarks.host` on the machine with the GPU, T that of `benchmarks.gpu.operations` at 64 MiB; of the
dtypes the worst counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.results import RESULTS, Row
from eulernet import kernels

SIZE = 64
# By the name of a threshold: the operation, and the line or block that says what it costs the host. Before batch norm
# nothing is known of what follows, so that a whole block is what it costs.
SOURCES = {
    "ACTIVATION": ("step, ReLU", "relu(x + f)"),
    "LAYER_SCALE": ("LayerScale, step", "x + gamma * f"),
    "BATCH_NORM": ("BatchNorm, step, ReLU (inference)", "ResNet tail"),
    "LAYER_NORM": ("step, LayerNorm", "layer_norm(x + f)"),
    "RMS_NORM": ("step, RMSNorm", "rms_norm(x + f)"),
}


def pays(rows: Sequence[Row], operation: str, line: str) -> kernels.Pays:
    """The sizes in MiB without gradients and with them; the same where there is no backward."""
    timed = [
        row for row in rows
        if row["table"] == "operations" and (row["name"], row["MiB"], row["beside"]) == (operation, SIZE, "eager")
    ]  # fmt: skip
    added = {row["what"]: row["more us"] for row in rows if row["table"] == "host" and row["name"] == line}
    forward = {row["dtype"]: _saved(row) for row in timed if row["direction"] == "forward"}
    both = {row["dtype"]: _saved(row) + forward[row["dtype"]] for row in timed if row["direction"] == "backward"}
    without = _size(added["forward"], min(forward.values()))
    return kernels.Pays(without, _size(added["forward + backward"], min(both.values())) if both else without)


def _saved(row: Row) -> float:
    """Microseconds."""
    return float(row["bytes"] * (1 / row["eager GB/s"] - 1 / row["fused GB/s"]) / 1e3)


def _size(added: float, saved: float) -> float:
    size = 1.0
    while size < SIZE * added / saved:
        size *= 2
    return size


def main() -> int:
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"]
    for name, (operation, line) in SOURCES.items():
        print(f"{name} = {pays(rows, operation, line)}; eulernet.kernels has {getattr(kernels, name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
