"""Time and memory of `patch`, each in a fresh process, beside one forward of the same model and its largest block."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eulernet
from benchmarks.models import PATCH


def _resident(field: str) -> int:
    """Bytes of memory of this process now (`VmRSS`) or at its peak (`VmHWM`); Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def _size(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _seconds(run: Callable[[], object]) -> float:
    """CPU time, which does not count what else the machine does; there is one thread."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(name: str) -> dict[str, Any]:
    """Patch once as the first thing in this process, then again and again; all in seconds and bytes."""
    torch.set_num_threads(1)
    build, make_inputs = PATCH[name]
    model = build().eval()
    inputs = make_inputs()
    result: dict[str, Any] = {}

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, at what is in memory now
    before = _resident("VmRSS")
    result["first"] = _seconds(lambda: eulernet.patch(model, h=0.1))
    result["peak_memory"] = _resident("VmHWM") - before

    steps = eulernet.steps(model)
    result["steps"] = len(steps)
    result["model_memory"] = _size(model)
    result["block_memory"] = max(_size(model.get_submodule(step.name.partition(":")[0])) for step in steps)
    times = []
    for _ in range(5):
        eulernet.unpatch(model)
        times.append(_seconds(lambda: eulernet.patch(model, h=0.1)))
    result["again"] = statistics.median(times)
    if inputs:  # last, since the memory it leaves behind would hide what patching needs
        eulernet.unpatch(model)
        with torch.no_grad():
            result["forward"] = statistics.median([_seconds(lambda: model(*inputs.values())) for _ in range(5)])
    return result


@pytest.mark.parametrize("name", PATCH)
def test_patch(benchmark: Any, name: str) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
        result = benchmark.pedantic(lambda: fresh_process.submit(measure, name).result(), rounds=1)
    benchmark.extra_info.update(table="patch", model=name, **result)
