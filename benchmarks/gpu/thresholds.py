"""Whole models with the kernels from a size on, in turn: what the thresholds of `eulernet.kernels` are chosen by.

A kernel saves time of the device and costs time of the host, which counts only where the device waits for the host. So
neither operations nor lines of code tell from which size on it pays, but whole models do, at batches of which some keep
the device busy and some do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.gpu.clock import WallClock
from benchmarks.gpu.models import Model, build, infer, models, on_the_device, train
from benchmarks.gpu.results import Row
from benchmarks.gpu.sizes import Sizes
from benchmarks.timing import Interleaved, Run
from eulernet import kernels

NEVER = 1 << 30
MEBIBYTES = (1, 8, 16, 32, 64, NEVER)
NAMES = ("ACTIVATION", "LAYER_SCALE", "BATCH_NORM", "LAYER_NORM", "RMS_NORM", "WRITTEN_OUT")


class Case(NamedTuple):
    """A model at a batch, in training or in inference."""

    name: str
    batch: int
    training: bool

    @property
    def part(self) -> str:
        return f"thresholds/{self.name}/{self.batch}/{'training' if self.training else 'inference'}"


def cases(sizes: Sizes) -> list[Case]:
    """In order of importance: states of 8 to 200 MiB."""
    if sizes.tiny:
        return [Case(name, 2, training) for name in models(sizes) for training in (True, False)]
    large = [("resnet50", 128), ("deit3_base", 128), ("bert_large", 32), ("convnext_base", 64)]
    small = [("resnet50", 32), ("deit3_base", 32), ("bert_large", 8), ("llama_1b", 1)]
    first = [Case("resnet50", 128, True), Case("deit3_base", 128, True), Case("resnet50", 128, False)]
    rest = [
        Case(name, batch, training) for some in (large, small) for name, batch in some for training in (True, False)
    ]
    return list(dict.fromkeys([*first, *rest]))


def measure(case: Case, sizes: Sizes) -> Iterator[Row]:
    """Milliseconds of the original, and the patched model's ratio to it for each size from which kernels run."""
    model: Model = models(sizes)[case.name]
    nets = build(model, sizes)
    inputs = on_the_device(model, case.batch, sizes)
    make = train if case.training else infer
    runs: dict[str, Run] = {"original": make(nets["original"].train(case.training), inputs)}
    patched = make(nets["patched"].train(case.training), inputs)
    runs |= {str(mebibytes): _from(mebibytes, patched) for mebibytes in MEBIBYTES}
    before = {name: getattr(kernels, name) for name in NAMES}
    try:
        race = Interleaved(runs, WallClock(sizes.device))
        for _ in range(race.warm_up(2, least=4, seconds=sizes.seconds, most=20)):
            race.round()
    finally:
        for name, pays in before.items():
            setattr(kernels, name, pays)
    row: Row = {"table": "thresholds", "name": case.name, "batch": case.batch}
    row |= {"what": "training" if case.training else "inference", "original ms": race.median("original") * 1e3}
    yield row | {key: race.ratio(key, "original")["median"] for key in runs if key != "original"}


def _from(mebibytes: int, run: Run) -> Run:
    """A run in which all kernels run from this size on."""
    pays = kernels.Pays(mebibytes, mebibytes)

    def chosen() -> None:
        for name in NAMES:
            setattr(kernels, name, pays)
        run()

    return chosen
