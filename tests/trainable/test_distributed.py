"""A learned h under DDP and FSDP."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import eulernet
from tests.helpers.learned import X, factors, net

# Where Dynamo looks at the attributes of a tensor, torch warns of .grad; as an error that would stop the compilation.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning",
    "ignore:the stream from the model:eulernet.EulernetWarning",  # test_traps.py asserts that long steps are named
)


# ---------------------------------------------------------------------------------------------------------- distributed


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# The warnings are of torch's own code: a deprecated backend's name, a hook on an input that needs no gradient.
def distributed(test: Any) -> Any:
    test = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")(test)
    test = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")(test)
    return pytest.mark.usefixtures("_one_process")(test)


def learn(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()


@distributed
@pytest.mark.parametrize("trainable", ["step", "stage"])
def test_ddp_learns_as_one_process(trainable: Any) -> None:
    model = eulernet.patch(net(), 0.25, example_inputs=X, trainable=trainable)
    wrapped = DistributedDataParallel(copy.deepcopy(model))
    for each in (model, wrapped):
        learn(each, list(each.parameters()))
    assert factors(wrapped) == factors(model) != [0.25] * 7
    eulernet.set_h(wrapped, 0.5)
    torch.testing.assert_close(wrapped(X), eulernet.set_h(model, 0.5)(X))


@distributed
def test_fsdp_learns_as_one_process() -> None:
    """FSDP2 keeps its part of a parameter in place of it, and takes no scalars and no mixture of dtypes."""
    model = eulernet.patch(net(), 0.25, example_inputs=X, trainable=True)
    shards = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (1,))
    for block in (*shards.layer1, *shards.layer2):
        fully_shard(block, mesh=mesh)
    fully_shard(shards, mesh=mesh)
    for each in (model, shards):
        learn(each, list(each.parameters()))
    assert factors(shards) == factors(model) != [0.25] * 7
    assert "h=exp(log_h_bias)" in repr(shards.last)
    eulernet.set_h(shards, 0.5)
    assert factors(shards) == pytest.approx([0.5] * 7, rel=1e-7)
    torch.testing.assert_close(shards(X), eulernet.set_h(model, 0.5)(X))
