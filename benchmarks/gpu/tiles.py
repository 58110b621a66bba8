"""The backward kernels of `eulernet.kernels._step` with other tiles: what its constants are chosen by.

How many elements a tile has, how many tiles a program reads ahead, how many warps a multiprocessor holds, and of how
many warps the programs are that read one operand.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.clock import DeviceClock, rotating
from benchmarks.gpu.results import Row
from benchmarks.gpu.sizes import Sizes
from benchmarks.timing import Interleaved, Run

H, COLUMNS, SAMPLES = 0.1, 1024, 16
NAMES = ("READ", "STAGES", "HELD", "SINGLE_WARPS")


class Case(NamedTuple):
    """A step whose backward is timed: a plain one, with LayerScale, with LayerScale and drop path."""

    name: str
    mixed: bool
    mebibytes: float

    @property
    def part(self) -> str:
        return f"tiles/{self.name}/{'float32 + bfloat16' if self.mixed else 'bfloat16'}/{self.mebibytes:g} MiB"


def cases(sizes: Sizes) -> list[Case]:
    some = [("step", True), *product(("LayerScale, step", "LayerScale, drop path, step"), (False, True))]
    return [Case(name, mixed, mebibytes) for mebibytes in sizes.mebibytes[:2] for name, mixed in some]


def measure(case: Case, sizes: Sizes) -> Iterator[Row]:
    """A row for each choice: the share of clone()'s bytes a second."""
    from eulernet.kernels import _step

    before = {name: getattr(_step, name) for name in NAMES}
    choices: list[dict[str, int]] = [{"SINGLE_WARPS": warps} for warps in (4, 8, 16)]
    if case.name != "step":
        some = product((512, 1024, 2048), (3, 5), (8, 16, 32))
        choices = [{"READ": read, "STAGES": stages, "HELD": held} for read, stages, held in some]
    wide = torch.float32 if case.mixed else torch.bfloat16
    elements = int(case.mebibytes * 2**20) // wide.itemsize
    shape = SAMPLES, max(1, elements // (SAMPLES * COLUMNS)), COLUMNS
    pairs = [
        tuple(torch.randn(shape, device=sizes.device).to(dtype) for dtype in (wide, torch.bfloat16))
        for _ in range(max(2, sizes.cache // int(case.mebibytes * 2**20)))
    ]
    for choice in choices[: 2 if sizes.tiny else None]:
        try:
            for name, value in choice.items():
                setattr(_step, name, value)
            calls, moved = _backwards(case, pairs)
        finally:
            for name, value in before.items():
                setattr(_step, name, value)
        clones: list[Run] = [lambda g=g: g.clone() for g, _ in pairs]  # type: ignore[misc]
        race = Interleaved({"clone": rotating(clones), "it": rotating(calls)}, DeviceClock(sizes.device, sizes.calls))
        race.warm_up(1, least=1)
        for _ in range(min(5, sizes.rounds)):
            race.round()
        share = moved / (2 * pairs[0][0].nbytes) / race.ratio("it", "clone")["median"]
        yield {
            "table": "tiles", "name": case.name, "dtype": case.part.split("/")[2], "MiB": case.mebibytes,
            **{name: choice.get(name) for name in NAMES}, "share": share,
        }  # fmt: skip


def _backwards(case: Case, pairs: list[Any]) -> tuple[list[Run], int]:
    """The backward pass on each pair of gradient and branch, and the bytes that it moves."""
    from eulernet.kernels import _layout, _step

    gradient, branch = pairs[0]
    scale = None if case.name == "step" else torch.rand(COLUMNS, device=branch.device).to(gradient.dtype)
    mask = torch.ones(SAMPLES, 1, 1, device=branch.device).to(branch.dtype) if "drop path" in case.name else None
    way = _layout.walk(gradient, branch, scale, mask)
    assert way is not None
    plan = _step.Plan(way, gradient.device, None, gradient.dtype, case.mixed)
    backward = plan.backward(None if scale is None else branch, (False, True, scale is not None))

    def run(g: Tensor, b: Tensor) -> object:
        made, part, total = torch.empty_like(b), None, None
        if scale is not None:
            part, total = g.new_empty(backward.parts, dtype=torch.float32), torch.empty_like(scale)
        operands = g, None if scale is None else b, None, None, scale, mask
        backward.launch((*operands, None, made, part), H)
        if scale is not None:
            backward.sums((part, None, None, total, None, None), H)
        return made, total

    moved = gradient.nbytes + branch.nbytes * (1 if scale is None else 2)
    return [lambda pair=pair: run(*pair) for pair in pairs], moved  # type: ignore[misc]
