"""`activation(skip + h * batch_norm(branch))` in one pass, with running statistics and without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from eulernet.kernels import _device, plain
from eulernet.kernels._layout import ABSENT, cdiv, launch, room, walk
from eulernet.kernels._step import ACTIVATIONS, FLOATS, computed_in


def step_bn(
    skip: Tensor,
    branch: Tensor,
    h: float,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor | None:
    """The step; None where the kernel does not take these operands."""
    small = [t for t in (mean, var, weight, bias) if t is not None]
    dtype = torch.promote_types(skip.dtype, branch.dtype)
    if any(t.dtype not in FLOATS or t.device != skip.device or not plain(t) for t in (skip, branch, *small)):
        return None
    if branch.dim() < 2 or any(t.shape != branch.shape[1:2] for t in small):
        return None
    if dtype == torch.float64 or (torch.is_grad_enabled() and any(t.requires_grad for t in (skip, branch, *small))):
        return None
    channel = mean.view(-1, *[1] * (branch.dim() - 2))
    way = walk(skip, branch, channel)
    if way is None:
        return None
    out = room(way, skip, dtype)
    rows, columns = way.block
    programs = cdiv(way.rows, rows) * cdiv(way.inner, columns)
    operands = (skip, branch, *(None if t is None else t.contiguous() for t in (mean, var, weight, bias)), out)
    sizes = (float(h), way.middle, way.inner, way.rows, *way.skip, *way.branch)
    axes = [way.axes[0], *(ABSENT if t is None else way.axes[0] for t in (weight, bias))]
    constants = (*axes, eps, ACTIVATIONS[activation], way.outer > 1, computed_in(dtype), rows, columns)
    launch(_device.bn_forward, programs, skip, *operands, *sizes, *constants)
    return out
