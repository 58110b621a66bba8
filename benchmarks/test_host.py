"""Microseconds on the host of a fused step and of eager's line, under a driver for Triton that launches nothing."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from benchmarks.host import measure_without_gpu


def test_host(benchmark: Any) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process_of_the_driver:
        rows = benchmark.pedantic(lambda: process_of_the_driver.submit(measure_without_gpu).result(), rounds=1)
    benchmark.extra_info.update(rows=rows)
