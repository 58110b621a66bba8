"""Two processes: a learned h is the same on both, whatever shares the work, and is what one process alone learns."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import eulernet
from tests.traps.base import Block

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")
# Over gloo the FSDP2 of torch 2.8 sums the gradients of the ranks, where it should average them.
KINDS = ("DDP", "FSDP1", "FSDP2") if torch.__version__ >= "2.11" else ("DDP", "FSDP1")
X = torch.linspace(-1, 1, 2 * 5 * 8).view(2, 5, 8)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return eulernet.patch(nn.Sequential(*(Block() for _ in range(3))), 0.3, example_inputs=X, trainable=True)


def wrapped(kind: str, model: nn.Sequential) -> Any:
    if kind == "DDP":
        return DistributedDataParallel(model)
    if kind == "FSDP1":
        policy = ModuleWrapPolicy({Block})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    mesh = init_device_mesh("cpu", (2,))
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(model: Any, groups: Any, batches: list[torch.Tensor]) -> None:
    optimizer = torch.optim.SGD(groups)
    for _ in range(3):
        optimizer.zero_grad()
        sum(model(x).square().mean() for x in batches).div(len(batches)).backward()
        optimizer.step()


def groups_of(model: nn.Module) -> Any:
    return eulernet.param_groups(model, lr=0.1, h=0.5, example_inputs=X)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for kind in KINDS:
        model = network()
        groups = groups_of(model)
        outer = wrapped(kind, model)
        trained(outer, groups, [X * (rank + 1)])
        if kind == "FSDP1":
            with FullyShardedDataParallel.summon_full_params(outer):
                found[kind] = [step.h for step in eulernet.steps(outer)]
        else:
            found[kind] = [step.h for step in eulernet.steps(outer)]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()  # gloo aborts a process whose peer has left
    os._exit(0)  # the threads of gloo and autograd may abort an interpreter that shuts down


def test_ranks_learn_one_h(tmp_path: Path) -> None:
    """By groups of `param_groups` that were made before the model was wrapped."""
    spawn(work, (str(tmp_path),), nprocs=2)
    alone = network()
    trained(alone, groups_of(alone), [X, 2 * X])
    expected = [step.h for step in eulernet.steps(alone)]
    assert all(abs(h - 0.3) > 1e-4 for h in expected if h is not None)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for kind in KINDS:
            assert found[kind] == pytest.approx(expected, rel=1e-5), (kind, rank)
