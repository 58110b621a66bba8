"""Many small trainings, each by a process of its own, those that tell most first, within some minutes."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch

from reproductions.data.pieces import pieces, shrunk
from reproductions.records import FILE, Record, append_record, read_records
from reproductions.training.depth_cells import Cell, plain, train

Show = Callable[[str, float], None]  # what is trained, the share of all work that is done


def work(cell: Cell) -> float:
    """How much there is to do, roughly in block iterations; a batch of images is as much as one of texts."""
    return (cell.depth + 1) * (cell.iterations + 30)


def _start(models: frozenset[str], data_root: str) -> None:
    """A process of the pool: one thread, and what its first training would else wait for."""
    torch.set_num_threads(1)
    for model in models:
        pieces(model, data_root)
    plain(Cell(depth=1))


def run(
    cells: Sequence[Cell],
    folder: Path,
    data_root: Path,
    workers: int,
    minutes: float = math.inf,
    show: Show = lambda label, share: None,
    device: str = "cpu",
) -> list[Record]:
    """Train what has no record yet, in the order given, and return the records of all that have one.

    Each finished training is appended at once. Nothing is begun that would not be done in time, judged by the slowest
    training so far; where that is so of a cell, a later one that is shorter is taken.
    """
    until = time.time() + 60 * minutes
    done = {record["key"] for record in recorded(cells, folder)}
    left = [cell for cell in cells if cell.key not in done]
    total, finished = sum(map(work, cells)), sum(work(cell) for cell in cells if cell.key in done)
    slowest = 0.0  # seconds a unit of work
    flight: dict[Future[Record | None], Cell] = {}
    models = frozenset(cell.model for cell in left)
    if "vit" in models:
        shrunk(data_root)  # once, before many want it
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(models, str(data_root))
    ) as pool:
        while True:
            while len(flight) < workers:
                fits = (cell for cell in left if time.time() + slowest * work(cell) < until)
                if (cell := next(fits, None)) is None:
                    break
                left.remove(cell)
                flight[pool.submit(train, cell, str(data_root), until, device)] = cell
            if not flight:
                break
            for future in wait(flight, return_when=FIRST_COMPLETED).done:
                cell = flight.pop(future)
                if (record := future.result()) is None:
                    continue
                append_record(folder, record)
                slowest = max(slowest, record["seconds"] / work(cell))
                finished += work(cell)
                show(label(cell), finished / total)
    return recorded(cells, folder)


def recorded(cells: Iterable[Cell], folder: Path) -> list[Record]:
    """The records that there are of some cells, in their order."""
    found = {r["key"]: r for r in read_records(folder)} if (folder / FILE).exists() else {}
    return [found[cell.key] for cell in cells if cell.key in found]


def label(cell: Cell) -> str:
    """What the progress bar calls a training."""
    return f"{cell.model}-{cell.depth}, h = {cell.h:.3g}, {cell.optimizer} {cell.learning_rate:g}, seed {cell.seed}"
