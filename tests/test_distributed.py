"""FSDP2 and DDP, in a process group of one process on the CPU."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import eulernet
from tests.traps.base import Block

# Of torch's own code: a deprecated backend's name, a hook on an input that needs no gradient.
pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch"),
]


@pytest.fixture(autouse=True)
def _one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network() -> tuple[nn.Sequential, Tensor]:
    return nn.Sequential(*(Block() for _ in range(3))), torch.randn(2, 5, 8)


def sharded(model: nn.Sequential) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (1,))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def test_a_sharded_model_computes_and_trains_as_the_patched_one() -> None:
    model, x = network()
    eulernet.patch(model, [0.1, 0.2, 0.3], example_inputs=x)
    shards = sharded(copy.deepcopy(model))
    assert all(isinstance(block, Block) for block in shards)
    for h in (None, 0.5):
        for net in (model, shards):
            if h is not None:
                eulernet.set_h(net, h)
            net.zero_grad()
            net(x).square().sum().backward()
        assert torch.equal(shards(x), model(x))
        for ours, theirs in zip(shards.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours.grad.full_tensor(), theirs.grad)
    assert [step.h for step in eulernet.steps(shards)] == [0.5] * 3


def test_a_sharded_model_is_neither_patched_nor_unpatched() -> None:
    model, x = network()
    with pytest.raises(eulernet.EulernetError, match=r"Patch before sharding: eulernet\.patch\(model\)"):
        eulernet.patch(sharded(copy.deepcopy(model)), 0.1, example_inputs=x)
    shards = sharded(eulernet.patch(model, 0.1, example_inputs=x))
    with pytest.raises(eulernet.EulernetError, match=r"sharded by FSDP.*eulernet\.set_h\(model, 1\.0\)"):
        eulernet.unpatch(shards)
    assert eulernet.is_patched(shards)


def test_ddp_trains_a_patched_model_and_is_looked_through() -> None:
    model, x = network()
    eulernet.patch(model, 0.3, example_inputs=x)
    twin = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model)
    assert eulernet.is_patched(wrapped)
    eulernet.set_h(wrapped, 0.4)
    assert [step.name for step in eulernet.steps(wrapped)] == ["0", "1", "2"]
    wrapped(x).square().sum().backward()
    eulernet.set_h(twin, 0.4)(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_ddp_is_refused_with_the_call_to_make_instead() -> None:
    model, x = network()
    wrapped = DistributedDataParallel(model)
    with pytest.raises(
        eulernet.EulernetError, match=r"DistributedDataParallel\(eulernet\.patch\(wrapped\.module, h=0\.1"
    ):
        eulernet.patch(wrapped, 0.1, example_inputs=x)
    with pytest.raises(eulernet.EulernetError, match=r"itself: eulernet\.find_steps\(wrapped\.module\)"):
        eulernet.find_steps(wrapped, example_inputs=x)
    assert not eulernet.is_patched(model)


def test_groups_made_before_sharding_move_the_shards() -> None:
    """Patch, make the groups, shard, build the optimiser: it moves what the unsharded model's does."""
    model, x = network()
    eulernet.patch(model, 0.3, example_inputs=x, trainable=True)
    twin = copy.deepcopy(model)
    groups = eulernet.param_groups(model, lr=0.1, h=0.5, example_inputs=x)
    optimizers = [torch.optim.SGD(eulernet.param_groups(twin, lr=0.1, h=0.5, example_inputs=x))]
    shards = sharded(model)
    optimizers.append(torch.optim.SGD(groups))
    ours: list[Any] = list(shards.parameters())
    before = [p.full_tensor().clone() for p in ours]
    for net, optimizer in zip((twin, shards), optimizers, strict=True):
        net(x).square().sum().backward()
        optimizer.step()
    for shard, whole, start in zip(ours, twin.parameters(), before, strict=True):
        assert torch.equal(shard.full_tensor(), whole) and not torch.equal(whole, start)
    with pytest.raises(eulernet.EulernetError, match=r"eulernet\.param_groups\(model\), then fully_shard\(model\)"):
        eulernet.param_groups(shards, lr=0.1, h=0.5, example_inputs=x)


def test_a_learned_h_inside_ddp_is_refused() -> None:
    model, x = network()
    wrapped = DistributedDataParallel(model)
    for part in (wrapped.module, model[0]):
        with pytest.raises(eulernet.EulernetError, match=r"each rank would learn its own.*trainable=True\)\)$"):
            eulernet.patch(part, 0.3, example_inputs=x, trainable=True)
    assert not eulernet.is_patched(model)
    eulernet.patch(model, 0.3, example_inputs=x)  # fixed, there is nothing to average
    other, _ = network()
    eulernet.patch(other, 0.3, example_inputs=x, trainable=True)


@pytest.mark.parametrize("trainable", [False, True])
def test_fsdp1_trains_as_one_process(trainable: bool) -> None:
    model, x = network()
    eulernet.patch(model, 0.3, example_inputs=x, trainable=trainable)
    twin = copy.deepcopy(model)
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy({Block}), use_orig_params=True, device_id=torch.device("cpu")
    )
    for net in (wrapped, twin):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    assert [step.h for step in eulernet.steps(wrapped)] == [step.h for step in eulernet.steps(twin)]
    assert trainable == ([step.h for step in eulernet.steps(twin)] != [0.3] * 3)
    torch.testing.assert_close(wrapped(x), twin(x))
    if not trainable:
        eulernet.set_h(wrapped, 0.5)
        torch.testing.assert_close(wrapped(x), eulernet.set_h(twin, 0.5)(x))
