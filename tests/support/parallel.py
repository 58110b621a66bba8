"""Many processes: data, tensor and pipeline parallel, sharding, and what accelerate does."""

from tests.support.base import Row

_GROUP = "Many devices"
_PATCH = "eulernet.patch(model, 0.3, example_inputs=x)"
_DIST = """
import os
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
from torch.distributed.device_mesh import init_device_mesh
mesh = init_device_mesh("cpu", (1,))
"""
_DDP = f"{_DIST}from torch.nn.parallel import DistributedDataParallel\n"
_FSDP1 = f"""{_DIST}
from torch.distributed.fsdp import FullyShardedDataParallel
options = {{"use_orig_params": True, "device_id": torch.device("cpu")}}
"""
_FSDP2 = f"{_DIST}from torch.distributed.fsdp import fully_shard\n"
_TP = f"""{_DIST}
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
plan = {{f"{{i}}.{{name}}": way() for i in range(3) for name, way in (("a", ColwiseParallel), ("b", RowwiseParallel))}}
"""
_PP = f"{_DIST}from torch.distributed.pipelining import SplitPoint, pipeline\n"
_DCP = f"{_DIST}import torch.distributed.checkpoint as dcp\n"

ROWS = [
    Row(_GROUP, "DistributedDataParallel", f"model = DistributedDataParallel({_PATCH})", before=_DDP),
    Row(
        _GROUP,
        "DistributedDataParallel",
        "eulernet.patch(DistributedDataParallel(model), 0.3, example_inputs=x)",
        "refused",
        r"DistributedDataParallel\(eulernet\.patch\(wrapped\.module, h=0\.1\)\)",
        before=_DDP,
    ),
    Row(
        _GROUP,
        "DistributedDataParallel",
        "ddp = DistributedDataParallel(model); eulernet.patch(ddp.module, 0.3, example_inputs=x, trainable=True)",
        "refused",
        r"DistributedDataParallel\(eulernet\.patch\(model, h=0\.1, trainable=True\)\)",
        before=_DDP,
    ),
    Row(_GROUP, "DataParallel", f"model = nn.DataParallel({_PATCH})"),
    Row(
        _GROUP,
        "DataParallel",
        "eulernet.patch(nn.DataParallel(model), 0.3, example_inputs=x)",
        "refused",
        r"DataParallel\(eulernet\.patch\(wrapped\.module, h=0\.1\)\)",
    ),
    Row(_GROUP, "FSDP1", f"model = FullyShardedDataParallel({_PATCH}, **options)", before=_FSDP1),
    Row(
        _GROUP,
        "FSDP1",
        "eulernet.patch(FullyShardedDataParallel(model, **options), 0.3, example_inputs=x)",
        "refused",
        "Patch before sharding",
        before=_FSDP1,
    ),
    Row(_GROUP, "FSDP2", f"model = fully_shard({_PATCH}, mesh=mesh)", before=_FSDP2),
    Row(
        _GROUP,
        "FSDP2",
        f"groups = eulernet.param_groups({_PATCH}, lr=0.1, h=0.5, example_inputs=x); fully_shard(model, mesh=mesh); "
        "optimizer = torch.optim.SGD(groups)",
        before=_FSDP2,
        after="held = {id(p) for g in optimizer.param_groups for p in g['params']}\n"
        "assert held == {id(p) for p in model.parameters()}",
    ),
    Row(
        _GROUP,
        "FSDP2",
        "eulernet.patch(fully_shard(model, mesh=mesh), 0.3, example_inputs=x)",
        "refused",
        r"Patch before sharding: eulernet\.patch\(model\), then fully_shard\(model\)",
        before=_FSDP2,
    ),
    Row(_GROUP, "tensor parallel", f"model = parallelize_module({_PATCH}, mesh, plan)", before=_TP),
    Row(
        _GROUP,
        "tensor parallel",
        "eulernet.patch(parallelize_module(model, mesh, plan), 0.3, example_inputs=x)",
        "refused",
        r"eulernet\.patch\(model, h=0\.1\), then parallelize_module\(model, \.\.\.\)",
        before=_TP,
    ),
    Row(
        _GROUP,
        "pipeline parallel",
        f'pipe = pipeline({_PATCH}, (x,), split_spec={{"1": SplitPoint.BEGINNING}})',
        before=_PP,
        after="assert pipe.num_stages == 2",
        result="pipe.get_stage_module(1)(pipe.get_stage_module(0)(x))",
    ),
    Row(
        _GROUP,
        "DCP",
        f"dcp.save({_PATCH}.state_dict(), checkpoint_id=folder); eulernet.steps(model).save(folder)",
        before=_DCP,
        after="model = eulernet.patch(network(), folder, example_inputs=x)\n"
        "weights = {name: torch.zeros_like(w) for name, w in model.state_dict().items()}\n"
        "dcp.load(weights, checkpoint_id=folder)\nmodel.load_state_dict(weights)",
    ),
    Row(
        _GROUP,
        "accelerate",
        f"model = Accelerator(cpu=True).prepare({_PATCH})",
        before="from accelerate import Accelerator",
        needs=("accelerate",),
    ),
    Row(
        _GROUP,
        "accelerate",
        "accelerator.register_save_state_pre_hook(lambda models, weights, to: eulernet.steps(models[0]).save(to)); "
        f"accelerator.prepare({_PATCH}); accelerator.save_state(folder / 'state')",
        before="from accelerate import Accelerator\naccelerator = Accelerator(cpu=True)",
        after="model = eulernet.patch(model, folder / 'state', example_inputs=x)",
        needs=("accelerate",),
    ),
    Row(
        _GROUP,
        "accelerate, offloaded",
        f"model = cpu_offload({_PATCH}, execution_device='cpu')",
        before="from accelerate import cpu_offload",
        needs=("accelerate",),
    ),
    Row(
        _GROUP,
        "accelerate, offloaded",
        "eulernet.patch(cpu_offload(model, execution_device='cpu'), 0.3, example_inputs=x)",
        "refused",
        r"call eulernet\.patch\(model, h=0\.1\), then accelerate\.cpu_offload\(model\)",
        before="from accelerate import cpu_offload",
        needs=("accelerate",),
    ),
]
