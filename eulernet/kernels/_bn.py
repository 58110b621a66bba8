"""`activation(skip + h * batch_norm(branch))` in one pass, with running statistics and without gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eulernet.kernels import _device, plain
from eulernet.kernels._launch import Launch, Unavailable
from eulernet.kernels._layout import ABSENT, ALIGNED, MIDDLE, Layout, dense, described, room, walk, warps
from eulernet.kernels._step import ACTIVATIONS, FLOATS, MOST_PLANS, computed_in, sizes

_plans: dict[Any, tuple[Layout, torch.dtype, Launch] | None] = {}


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
    small, device = (mean, var, weight, bias), skip.device
    for t in small:
        if t is not None and not (plain(t) and t.device == device):
            return None
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in (skip, branch, *small)]):
        return None
    key = (
        skip.shape, skip.stride(), branch.shape, branch.stride(), skip.dtype, branch.dtype, device, branch.device,
        eps, activation, *map(described, small),
    )  # fmt: skip
    try:
        plan = _plans[key]
    except KeyError:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = _plan(skip, branch, mean, var, weight, bias, eps, activation)
    if plan is None:
        return None
    way, dtype, launch = plan
    out = room(way, skip, dtype)
    try:
        launch((skip, branch, *map(dense, small), out), float(h))
    except Unavailable:
        return None
    return out


def _plan(
    skip: Tensor,
    branch: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Layout, torch.dtype, Launch] | None:
    small = [t for t in (mean, var, weight, bias) if t is not None]
    dtype = torch.promote_types(skip.dtype, branch.dtype)
    if any(t.dtype not in FLOATS for t in (skip, branch, *small)) or dtype == torch.float64:
        return None
    if branch.dim() < 2 or any(t.shape != branch.shape[1:2] for t in small):
        return None
    way = walk(skip, branch, mean.view(-1, *[1] * (branch.dim() - 2)))
    if way is None:
        return None
    channel, channels, pixels = way.axes[0], 1, 1
    if channel == MIDDLE and way.inner % ALIGNED and skip.numel() < 2**31:
        flat = walk(skip, branch)  # the compiler would read each element of such rows by itself
        if flat is not None and flat.rows == 1:
            way, channel, channels, pixels = flat, ABSENT, way.middle, way.inner
    constants = (channel, channels, pixels, eps, ACTIVATIONS[activation], way.split, computed_in(dtype), *way.block)
    each = warps(way.block, dtype.itemsize)
    return way, dtype, Launch(_device.bn_forward, way.programs, skip.device, (*sizes(way), *constants), each)
