"""What it costs that h moves, beside a training step (forward, backward, SGD) of the model with a fixed h."""

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


def _training_step(model: nn.Module, inputs: Inputs) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def run() -> object:
        optimizer.zero_grad()
        torch.autograd.backward(first_output(model, inputs).square().mean())
        return optimizer.step()

    return run


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("name", SPEED)
def test_moving(benchmark: Any, name: str, backend: str) -> None:
    build, make_inputs = SPEED[name]
    inputs = make_inputs()
    fixed = eulernet.patch(build().train(), h=0.1)
    # All are copies, whose memory was allocated alike; the noise of the machine is what one of two equal ones costs.
    models = {key: copy.deepcopy(fixed) for key in ("fixed", "copy", "learned")}
    eulernet.patch(models["learned"], h=0.1, trainable=True)
    schedule = eulernet.HScheduler(copy.deepcopy(fixed), total_steps=10**6)
    if backend == "compiled":
        torch._dynamo.reset()
        for model in models.values():
            model.compile()
    race = Interleaved(
        {**{key: _training_step(model, inputs) for key, model in models.items()}, "schedule": schedule.step}
    )
    rounds = race.warm_up(2, least=20)
    benchmark.pedantic(race.round, rounds=rounds)
    benchmark.extra_info.update(
        table="moving",
        model=name,
        backend=backend,
        steps=len(eulernet.steps(fixed)),
        learned=race.ratio("learned", "fixed"),
        noise=race.ratio("copy", "fixed"),
        schedule=race.ratio("schedule", "fixed"),
    )
