"""What the cores of a desk can say in hours: the paper's depths on small images and short texts, trial by trial.

Pilots of one seed fixed the sizes: there ResNet-20 with h = 1 trains well and has levelled off, and VDCNN-9 learns.
Each trial is one process with one thread. Cells stand in order of worth; 5 seeds each. What is asked was written before
anything was run: `primary`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from reproductions import presets
from reproductions.data.batches import load
from reproductions.evidence.claims import POINT, Results, Row, compare, compare_unpaired
from reproductions.presets import AUTO, EULER, PLAIN, START, Part
from reproductions.records import Record, append_record, environment
from reproductions.training.grid import Place, check_data, known_records
from reproductions.training.grid import name as named
from reproductions.training.loop import SideBySide, Training, settings
from reproductions.trial import Trial

SEEDS = range(5)
RATES = (0.1, 0.03, 0.01)
IMAGES: Part = {**presets.IMAGES["desk"], "log": True}
TEXTS: Part = {**presets.TEXTS["desk"], "log": True}
# Core-seconds of one training, as pilots had them: what is begun is expected to take so long.
SECONDS = {("resnet", 20): 62, ("resnet", 56): 169, ("resnet", 110): 350, ("resnet", 218): 700}
SECONDS |= {("vdcnn", 9): 155, ("vdcnn", 17): 310}
SPARE = 25.0  # seconds kept for results


def images(depth: int, arm: Part, rate: float = 0.1) -> Trial:
    return Trial(**{**IMAGES, **arm, "depth": depth, "learning_rate": rate})


def texts(depth: int, h: float, rate: float = 0.01) -> Trial:
    return Trial(**{**TEXTS, "depth": depth, "h": h, "learning_rate": rate})


def cells() -> list[list[Trial]]:
    """The cells, in order of worth; those that are compared with each other stand in one list."""
    return [
        [texts(9, 1.0), texts(9, 0.1)],
        [texts(9, 0.3)],
        [images(20, PLAIN), images(20, EULER)],
        [images(110, PLAIN), images(110, EULER)],
        [texts(17, h) for h in (1.0, 0.3, 0.1)],
        [images(depth, arm, rate) for rate, depth, arm in product(RATES[1:], (20, 110), (PLAIN, EULER))],
        [images(depth, arm) for depth, arm in product((20, 110), (AUTO, START))],
        [texts(9, 1.0, 0.1), texts(9, 0.1, 0.1)],
        [images(56, arm) for arm in (PLAIN, EULER, AUTO, START)],
        [images(218, PLAIN), images(218, EULER)],
    ]


def trials() -> list[Trial]:
    """All trials, in the order in which they are begun: of compared cells one seed after the other."""
    return [replace(cell, seed=seed) for some in cells() for seed in SEEDS for cell in some]


def primary(results: Results) -> list[Row]:
    """The primary hypotheses, written before anything was run; what is missing is not run."""
    rows = []
    for depth in (9, 17):
        pair = (texts(depth, 1.0), texts(depth, 0.1))
        rows.append(compare(results, f"vdcnn {depth}: h = 0.1 tests better than h = 1", [pair], "test_accuracy"))
    plain, euler = ([images(depth, arm) for depth in (20, 110)] for arm in (PLAIN, EULER))
    for claim, pair, higher, margin in (
        ("resnet 110: h = 0.1 tests better than h = 1", (plain[1], euler[1]), True, 0.0),
        ("resnet: with h = 1 accuracy degrades from depth 20 to 110", (plain[0], plain[1]), False, 0.0),
        ("resnet: with h = 0.1 depth 110 tests no point worse than 20", (euler[0], euler[1]), True, POINT),
        ("resnet 110: each at its best rate, h = 0.1 tests better than h = 1", _at_best_rates(results), True, 0.0),
    ):
        # Seeds pair networks of one depth alone.
        if pair[0].depth == pair[1].depth:
            rows.append(compare(results, claim, [pair], "test_accuracy", higher=higher, margin=margin))
        else:
            rows.append(compare_unpaired(results, claim, *pair, "test_accuracy", higher=higher, margin=margin))
    return rows


def _at_best_rates(results: Results) -> tuple[Trial, Trial]:
    """h = 1 and 0.1 at depth 110, each at the learning rate whose mean on held-out images is best."""

    def held_out(cell: Trial) -> float:
        found = results.column(cell, "validation_accuracy")
        return sum(found) / len(found) if found else -1.0

    plain, euler = (max((images(110, arm, rate) for rate in RATES), key=held_out) for arm in (PLAIN, EULER))
    return plain, euler


# ---- the runner
class _OutOfTime(Exception):
    pass


def _quiet() -> None:
    """A worker: one thread, and behind whatever else the machine does."""
    torch.set_num_threads(1)
    if hasattr(os, "nice"):
        os.nice(10)


def train(trial: Trial, data_root: Path, ends: float) -> Record | None:
    """The record of one training on one core; None where the time (as `time.time` has it) was over before its end."""
    device = torch.device("cpu")

    def watch(iterations: int) -> None:
        if time.time() > ends:
            raise _OutOfTime

    with settings(trial.precision):
        training = Training(trial, load(trial, data_root, device), device)
        if trial.data == "cifar10":
            training.network.to(memory_format=torch.channels_last)
        alone = SideBySide([training])
        try:
            while not training.done:
                alone.epoch(watch)
        except _OutOfTime:
            return None
        record: Record = {"study": "trials", "key": trial.key, "config": trial.config(), "result": training.result()}
    record["data"] = dict(training.source.data)
    return record | {"seconds": training.seconds, "environment": environment(device)}


def run(
    wanted: Sequence[Trial], out: Path, data_root: Path, workers: int, seconds: float, recorded: Sequence[Path] = ()
) -> list[Record]:
    """Train on `workers` cores what has no record yet, for so many seconds; each record is written when it is there.

    A trial is begun if it is expected to end in time, else the next that is; returns the records of this call.

    Raises:
        DataError: a data file or a record is missing or damaged, or `out` holds records of other data.
    """
    ends = time.time() + seconds
    check_data(Place(out, data_root, torch.device("cpu")), wanted)
    known = known_records((out, *recorded), data_root, {trial.data for trial in wanted})
    done = {record.get("key") for record in known}
    waiting = [trial for trial in wanted if trial.key not in done]
    records: list[Record] = []
    pace = 1.0  # how many times as long as expected
    with ProcessPoolExecutor(workers, get_context("spawn"), _quiet) as pool:
        flying: dict[Future[Record | None], tuple[Trial, float]] = {}
        while True:
            while len(flying) < workers and (trial := _next(waiting, pace, ends)):
                waiting.remove(trial)
                flying[pool.submit(train, trial, data_root, ends - SPARE)] = trial, time.time()
            if not flying:
                break
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                trial, began = flying.pop(future)
                took = time.time() - began
                try:
                    record = future.result()
                except Exception as error:  # the others are none the worse for it
                    print(f"{named([trial])}: {type(error).__name__}: {error}", flush=True)
                    continue
                if record is None:
                    print(f"stopped for time: {named([trial])}", flush=True)
                    continue
                append_record(out, record)
                records.append(record)
                pace = took / _expected(trial)
                accuracy = record["result"]["test_accuracy"]
                print(
                    f"{took:5.0f} s  {named([trial])}: test {accuracy:.3f}; {ends - time.time():.0f} s left", flush=True
                )
    return records


def _next(waiting: Sequence[Trial], pace: float, ends: float) -> Trial | None:
    left = ends - SPARE - time.time()
    return next((trial for trial in waiting if pace * _expected(trial) <= left), None)


def _expected(trial: Trial) -> float:
    """Core-seconds, in proportion to the samples."""
    scale: dict[str, Any] = dict(TEXTS if trial.data == "ag-news" else IMAGES)
    share = trial.epochs * (trial.train or 50_000) / (scale["epochs"] * scale["train"])
    return float(SECONDS.get((trial.model, trial.depth), 3.1 * trial.depth) * share)
