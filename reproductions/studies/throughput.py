"""Samples a second of several trials side by side, in each precision: how many to train at once on a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch
from rich.table import Table

from reproductions.data.batches import load
from reproductions.presets import IMAGES, TEXTS
from reproductions.records import Record, environment
from reproductions.training.loop import WARM_UP, SideBySide, Training, settings
from reproductions.trial import Trial

TITLE = "Samples a second"
AT_ONCE = (1, 4, 8, 16)
PRECISIONS = ("fp32", "tf32", "bf16")


def run(
    data_root: Path,
    device: torch.device,
    data: str = "cifar10",
    depth: int = 0,
    iterations: int = 100,
    show: Callable[[str, float], None] = lambda label, share: None,
) -> list[Record]:
    """One record a number of trials and precision; on a CPU the trials take turns, and only fp32 is timed."""
    scale = (IMAGES if data == "cifar10" else TEXTS)["paper"]
    depth = depth or (20 if data == "cifar10" else 9)
    cases = list(product(AT_ONCE, PRECISIONS if device.type == "cuda" else PRECISIONS[:1]))
    records = []
    for number, (at_once, precision) in enumerate(cases):
        trials = [Trial(**{**scale, "depth": depth, "precision": precision, "seed": seed}) for seed in range(at_once)]
        with settings(precision):
            seconds = measure(trials, data_root, device, iterations)
        records.append(
            {
                "study": "throughput",
                "config": {"data": data, "depth": depth, "at_once": at_once, "precision": precision},
                "result": {"samples_per_second": at_once * trials[0].batch_size * iterations / seconds},
                "seconds": seconds,
                "environment": environment(device),
            }
        )
        show("throughput", (number + 1) / len(cases))
    return records


def measure(trials: Sequence[Trial], data_root: Path, device: torch.device, iterations: int) -> float:
    """Seconds that `iterations` iterations of all trials together take, once the graph is captured."""
    source = load(trials[0], data_root, device)
    together = SideBySide([Training(trial, source, device) for trial in trials])
    size = together.sizes[0]
    whole = together.sizes.count(size)  # batches of an epoch

    def some(numbers: range) -> None:
        for number in numbers:  # as in an epoch, with nothing that waits for the device
            for training in together.trainings:
                if number % whole == 0:
                    training.begin()
                training.set_rate(number % whole)
            together.step(size)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    begun = WARM_UP + 2 if device.type == "cuda" else 1
    some(range(begun))
    started = time.perf_counter()
    some(range(begun, begun + iterations))
    return time.perf_counter() - started


def table(records: Sequence[Record]) -> Table:
    """Samples a second, and how many times those of one trial at a time in the same precision."""
    shown = Table(title=f"\n{records[0]['environment']['device']}", title_justify="left", box=None, pad_edge=False)
    for title in ("trials at once", "precision", "samples a second", "times one at a time"):
        shown.add_column(title, justify="right")
    single = {
        r["config"]["precision"]: r["result"]["samples_per_second"] for r in records if r["config"]["at_once"] == 1
    }
    for record in records:
        config, speed = record["config"], record["result"]["samples_per_second"]
        ratio = speed / single[config["precision"]]
        shown.add_row(str(config["at_once"]), config["precision"], f"{speed:,.0f}", f"{ratio:.2f}")
    return shown
