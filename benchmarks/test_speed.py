"""Forward, and forward and backward, of a patched and of a folded model against the original: 1.00 is no cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import eulernet
from benchmarks.models import SPEED, Inputs, first_output
from benchmarks.timing import Interleaved


def _forward(model: nn.Module, inputs: Inputs) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return model(*inputs.values())

    return run


def _forward_backward(model: nn.Module, inputs: Inputs) -> Callable[[], object]:
    def run() -> None:
        model.zero_grad()
        torch.autograd.backward(first_output(model, inputs).sum())

    return run


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("run", [_forward, _forward_backward], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("name", SPEED)
def test_speed(benchmark: Any, name: str, run: Callable[..., Callable[[], object]], backend: str) -> None:
    build, make_inputs = SPEED[name]
    inputs = make_inputs()
    original = build().train(run is _forward_backward)
    # The noise of the machine is what the same model, copied, seems to cost.
    models = {"original": original, "copy": copy.deepcopy(original), "patched": copy.deepcopy(original)}
    eulernet.patch(models["patched"], h=0.1)
    if run is _forward:  # folded for deployment
        models["folded"] = eulernet.fold(copy.deepcopy(models["patched"]))
    if backend == "compiled":
        torch._dynamo.reset()
        for model in models.values():
            model.compile()
    race = Interleaved({key: run(model, inputs) for key, model in models.items()})
    rounds = race.warm_up(2, least=20)
    benchmark.pedantic(race.round, rounds=rounds)
    benchmark.extra_info.update(
        table="speed",
        model=name,
        what=f"{run.__name__.strip('_').replace('_', ' + ')}, {backend}",
        ratio=race.ratio("patched", "original"),
        noise=race.ratio("copy", "original"),
        folded=race.ratio("folded", "original") if "folded" in models else None,
    )
