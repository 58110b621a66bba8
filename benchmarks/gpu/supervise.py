"""Run the parts in processes of their own, within the time, so that none that hangs or dies takes the others along."""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch._functorch.config
import torch._inductor.config

from benchmarks.gpu import operations, plan
from benchmarks.gpu.results import Results, Row
from benchmarks.gpu.sizes import Sizes

DEAD = 3  # how a process ends whose device does not answer any more
_spawn = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Job:
    """What a process is to do.

    Args:
        parts: names, in their order.
        path: the JSON into which it writes.
        on: the machine.
        end: the time (`time.time()`) at which it is to be done.
        sizes: how much is run.
        warm: operations to compile afterwards, into the caches on the disk.
    """

    parts: tuple[str, ...]
    path: Path
    on: Row
    end: float
    sizes: Sizes
    warm: tuple[operations.Case, ...] = ()


def work(job: Job) -> None:
    """One process: measure the parts, each where it is sure to end in time; those that do not fit are left out."""
    torch._functorch.config.donated_buffer = False  # a graph is run backward repeatedly
    if job.warm:
        torch._inductor.config.compile_threads = 1  # there are other processes
    if job.sizes.tiny:
        torch.set_num_threads(1)
    known = {part.name: part for part in (*plan.checks(), *plan.parts(job.sizes))}
    results = Results(job.path)
    taken: dict[str, list[float]] = defaultdict(list)
    for part in (known[name] for name in job.parts):
        began = time.time()
        if began + max(taken[part.kind][-3:], default=part.seconds) > job.end:
            continue
        results.begin(part.name)
        rows: list[Row] = []
        try:
            for row in part.rows(job.sizes):
                rows.append(row)
                results.add(part.name, rows, job.on)
        except Exception as error:  # the others are measured all the same
            traceback.print_exc()
            results.fail(part.name, f"{type(error).__name__}: {str(error).strip()[:300]}", job.on)
            _end_if_dead(job.sizes)
        else:
            taken[part.kind].append(time.time() - began)
        _free(job.sizes)
    results.begin(None)
    for case in job.warm:
        if time.time() + 5 > job.end:
            return
        try:
            operations.warm(case, job.sizes)
        except Exception:  # it will be seen when it is measured
            _end_if_dead(job.sizes)
        _free(job.sizes)


def _free(sizes: Sizes) -> None:
    if sizes.device == "cuda":
        torch.cuda.empty_cache()


def _end_if_dead(sizes: Sizes) -> None:
    """After a fault of a kernel nothing runs in this process any more; the next one goes on."""
    if sizes.device == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception:
            sys.exit(DEAD)


def check(names: Sequence[str], results: Results, on: Row, end: float, sizes: Sizes) -> None:
    """Several processes check the kernels and then compile what is to be timed, which is found on the disk later."""
    warm = () if sizes.tiny else tuple(plan.cases(sizes))
    jobs = []
    for i in range(sizes.workers):
        path, share = results.path.with_suffix(f".{i}.json"), slice(i, None, sizes.workers)
        path.unlink(missing_ok=True)
        jobs.append(Job(tuple(names[share]), path, on, end, sizes, warm[share]))
    processes = [_start(job) for job in jobs]
    for job, process in zip(jobs, processes, strict=True):
        found = _outcome(job, process, end)
        for name in dict.fromkeys(row["part"] for row in found.rows):
            results.add(name, found.of(name), on)
        job.path.unlink(missing_ok=True)


def measure(names: Sequence[str], results: Results, on: Row, end: float, sizes: Sizes) -> Results:
    """One process at a time measures the parts; where one died, the next goes on behind the part at which it did."""
    left = list(names)
    while left and time.time() + 5 < end:
        results.begin(None)
        job = Job(tuple(left), results.path, on, end, sizes)
        results = _outcome(job, _start(job), end + 2)
        if results.begun is None:  # all were measured, or none could even begin
            break
        left = left[left.index(results.begun) + 1 :]
    return results


def _start(job: Job) -> BaseProcess:
    process = _spawn.Process(target=work, args=(job,))
    process.start()
    return process


def _outcome(job: Job, process: BaseProcess, end: float) -> Results:
    """What a process wrote: wait for it until then, and no longer. Where it did not finish, the part says so."""
    process.join(max(0.0, end - time.time()))
    late = process.is_alive()
    if late:
        process.kill()
        process.join()
    results = Results(job.path)
    if results.begun is not None and not any(row["table"] == "failed" for row in results.of(results.begun)):
        how = "the time was over" if late else f"its process died, exit code {process.exitcode}"
        results.fail(results.begun, how, job.on)
    return results
