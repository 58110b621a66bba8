"""A training step of a patched model that `eulernet.watch` looks at, against the same step without it: ratios."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import eulernet
from benchmarks.models import SPEED, Inputs, first_output
from benchmarks.timing import Interleaved

ITERATIONS = 10
# Small ones: a share of a larger training step is smaller.
INPUTS: dict[str, Inputs] = {
    "resnet50": {"x": torch.randn(2, 3, 64, 64)},
    "bert_small": {"input_ids": torch.randint(0, 1000, (2, 32))},
}


def _training(model: nn.Module, inputs: Inputs, every: int | None) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def run() -> None:
        with contextlib.nullcontext() if every is None else eulernet.watch(model, every=every) as log:
            for _ in range(ITERATIONS):
                optimizer.zero_grad()
                torch.autograd.backward(first_output(model, inputs).square().mean())
                if log is not None:
                    log.step()
                optimizer.step()

    return run


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("name", INPUTS)
def test_watch(benchmark: Any, name: str, every: int) -> None:
    build, _ = SPEED[name]
    inputs = INPUTS[name]
    model = eulernet.patch(build().train(), h=0.1, example_inputs=inputs)
    arms = {"plain": None, "copy": None, "watched": every}
    race = Interleaved({arm: _training(copy.deepcopy(model), inputs, k) for arm, k in arms.items()})
    rounds = race.warm_up(1, least=10)
    benchmark.pedantic(race.round, rounds=rounds)
    benchmark.extra_info.update(
        table="speed",
        model=name,
        what=f"training step, watched every {every} / not watched",
        ratio=race.ratio("watched", "plain"),
        noise=race.ratio("copy", "plain"),
    )
