"""What is measured, in the order of what it decides, and for about how long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

from benchmarks import host
from benchmarks.gpu import correctness, models, operations, thresholds, tiles
from benchmarks.gpu.results import Row
from benchmarks.gpu.sizes import Sizes


class Part(NamedTuple):
    """Some rows that are measured together.

    Args:
        name: `operations/step, ReLU/bfloat16/64 MiB`, say.
        kind: parts of one kind take about equally long.
        seconds: a guess of it, until one was measured.
        rows: measures them.
    """

    name: str
    kind: str
    seconds: float
    rows: Callable[[Sizes], Iterator[Row]]


def checks() -> Iterator[Part]:
    """Of each kernel: first of all, by several processes at the same time."""
    for case in correctness.cases():
        yield Part(case.part, "correctness", 2, lambda sizes, case=case: correctness.check(case, sizes))  # type: ignore[misc]


def cases(sizes: Sizes) -> Iterator[operations.Case]:
    """Of the operations: bfloat16 and AMP at the size that decides, then at the others; torch.compile; the rest."""
    first, others = list(operations.DTYPES)[:2], list(operations.DTYPES)[2:]
    for mebibytes, dtypes, name in product(sizes.mebibytes, first, operations.OPERATIONS):
        yield operations.Case(name, dtypes, mebibytes)
    for name in operations.OPERATIONS:
        yield operations.Case(name, "bfloat16", sizes.mebibytes[min(1, len(sizes.mebibytes) - 1)], compiled=True)
    for mebibytes, dtypes, name in product(sizes.mebibytes[:2], others, operations.OPERATIONS):
        yield operations.Case(name, dtypes, mebibytes)


def parts(sizes: Sizes) -> list[Part]:
    """All but the checks."""
    steps = [_operation(case) for case in cases(sizes)]
    decisive = 2 * len(sizes.mebibytes) * len(operations.OPERATIONS)
    eager = [_model(name, compiled=False) for name in models.models(sizes)]
    compiled = [_model(name, compiled=True) for name in models.models(sizes)]
    on_the_host = Part("host", "host", 8, lambda sizes: host.measure(sizes.device, *(5, 2) if sizes.tiny else (300, 9)))
    sizes_that_pay = [
        Part(case.part, "thresholds", 8, lambda sizes, case=case: thresholds.measure(case, sizes))  # type: ignore[misc]
        for case in thresholds.cases(sizes)
    ]
    other_tiles = [
        Part(case.part, "tiles", 20, lambda sizes, case=case: tiles.measure(case, sizes))  # type: ignore[misc]
        for case in tiles.cases(sizes)
    ]
    return [*steps[:decisive], on_the_host, *eager, *steps[decisive:], *compiled, *sizes_that_pay, *other_tiles]


def _operation(case: operations.Case) -> Part:
    kind = "operations, compiled" if case.compiled else f"operations, {case.mebibytes:g} MiB"
    return Part(case.part, kind, 3 if case.compiled else 1, lambda sizes: operations.measure(case, sizes))


def _model(name: str, compiled: bool) -> Part:
    part, seconds = f"models/{name}/{'compiled' if compiled else 'eager'}", 75 if compiled else 10
    return Part(
        part, "models, compiled" if compiled else "models", seconds, lambda s: models.measure(name, compiled, s)
    )
