"""What people use instead of a patch, in one run: time of a model, what it saves for backward, time to get it."""

from __future__ import annotations

import copy
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.models import BRANCHES, SPEED, Inputs, first_output
from benchmarks.peers import peers, saved
from benchmarks.timing import Interleaved, Run, cpu_seconds

PEERS = ("eulernet", "hand-written", "forward hooks", "LayerScale", "unit-scaling")


def _forward(model: nn.Module, inputs: Inputs) -> Run:
    def run() -> object:
        with torch.no_grad():
            return model(**inputs)

    return run


def _forward_backward(model: nn.Module, inputs: Inputs) -> Run:
    def run() -> None:
        model.zero_grad()
        torch.autograd.backward(first_output(model, inputs).sum())

    return run


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("run", [_forward, _forward_backward], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("name", BRANCHES)
def test_peers(benchmark: Any, name: str, run: Callable[..., Run], backend: str) -> None:
    build, make_inputs = SPEED[name]
    inputs = make_inputs()
    original = build().train(run is _forward_backward)
    torch._dynamo.reset()
    models = {"original": original, "a copy": copy.deepcopy(original)}
    for peer, make in peers(original, BRANCHES[name], inputs).items():
        try:
            models[peer] = make()
            run(models[peer], inputs)()
        except Exception as error:  # test_transform says why
            models.pop(peer, None)
            print(f"{peer} does not take {name}: {error}")
    if backend == "compiled":
        models.pop("unit-scaling", None)  # compiles by itself
        for model in models.values():
            model.compile()
    runs = {key: run(model, inputs) for key, model in models.items()}
    memory = {key: saved(model, runs[key]) for key, model in models.items()} if run is _forward_backward else {}
    race = Interleaved(runs)
    rounds = race.warm_up(2, least=20)
    benchmark.pedantic(race.round, rounds=rounds)
    benchmark.extra_info.update(
        table="peers",
        model=name,
        what=f"{run.__name__.strip('_').replace('_', ' + ')}, {backend}",
        ratios={key: race.ratio(key, "original") for key in models if key != "original"},
        saved=memory,
    )


def measure(name: str, peer: str) -> dict[str, Any]:
    """Transform the model as the first thing in this process, and run it; or why it is not taken."""
    torch.set_num_threads(1)
    build, make_inputs = SPEED[name]
    model, inputs = build().eval(), make_inputs()
    make = peers(model, BRANCHES[name], inputs)[peer]
    try:
        start = time.process_time()
        changed = make()
        transform = time.process_time() - start
        run = _forward(changed, inputs)
        first = cpu_seconds(run)  # where it is compiled, if it is
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:160]}
    forward = sorted(cpu_seconds(run) for _ in range(5))[2]
    return {"error": None, "transform": transform, "first": first, "forward": forward}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", BRANCHES)
def test_transform(benchmark: Any, name: str, peer: str) -> None:
    """The copy of the model is in the time of each."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
        result = benchmark.pedantic(lambda: fresh_process.submit(measure, name, peer).result(), rounds=1)
    benchmark.extra_info.update(table="transform", model=name, peer=peer, **result)
