"""The new state of a pre-norm transformer and its norm, in one pass, and their gradients."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eulernet.kernels import _device, _formulas, first_order, plain
from eulernet.kernels._launch import Launch, Unavailable, apply
from eulernet.kernels._layout import (
    INNER,
    SINGLE,
    Layout,
    Strides,
    again,
    cdiv,
    dense,
    described,
    layout,
    multiprocessors,
    ordered,
    power_of_two,
    room,
    varying,
)  # fmt: skip
from eulernet.kernels._step import FLOATS, MOST_PLANS, computed_in, in_double, sizes

MOST = 8192  # columns that fit into one tile, so that the registers hold it
FORWARD, BACKWARD = 16, 8  # elements of a tile a thread holds; more than 8 take the backward over 64 registers
WARPS = 32  # of these a multiprocessor has room, with 64 registers a thread


class Plan:
    """How operands of these shapes, strides and dtypes are stepped and normed."""

    def __init__(
        self, way: Layout, normed: Strides, device: torch.device, eps: float, centred: bool,
        dtype: torch.dtype, normed_dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.way, self.normed, self.device, self.rows = way, normed, device, way.rows
        self.eps, self.centred, self.dtype, self.normed_dtype = eps, centred, dtype, normed_dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        block = _block(way)
        tail = (*sizes(way), *way.axes[1:], eps, way.outer > 1, computed_in(dtype), *block)
        self.forward = Launch(_device.norm_forward, cdiv(way.rows, block[0]), device, tail, _warps(block, FORWARD))
        self.backwards: dict[Any, Backward] = {}

    def backward(self, branch: Tensor | None, wants: tuple[bool, ...]) -> Backward:
        """The one for a branch with these strides, which need not be those that it had."""
        key = wants, None if branch is None else branch.stride()
        if key not in self.backwards:
            self.backwards[key] = Backward(self, branch, wants)
        return self.backwards[key]


class Backward:
    """The kernel for these gradients: of skip, branch, scale, weight and bias, and whether that of the state came."""

    def __init__(self, plan: Plan, branch: Tensor | None, wants: tuple[bool, ...]) -> None:
        way, self.copies = again(plan.way, branch, plan.normed)
        block = _block(way)
        programs, warps = cdiv(way.rows, block[0]), _warps(block, BACKWARD)
        tiles = cdiv(programs, multiprocessors(plan.device) * max(1, WARPS // warps)) if any(wants[2:5]) else 1
        programs = cdiv(programs, tiles)
        self.parts = programs, way.inner
        tail = (way.middle, way.inner, way.rows, *way.steps[2:], tiles)
        tail += (*way.axes[1:], way.outer > 1, computed_in(plan.dtype), *block)
        self.launch = Launch(_device.norm_backward, programs, plan.device, tail, warps)


_plans: dict[Any, Plan | None] = {}


def step_norm(
    skip: Tensor,
    branch: Tensor,
    h: float,
    scale: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    dtype: torch.dtype,
    autocast: bool,
) -> tuple[Tensor, Tensor] | None:
    """The state in `dtype` and its norm, which autocast may widen; None where the kernel does not take the operands."""
    for small in (scale, mask, weight, bias):
        if small is not None and not (plain(small) and small.device == skip.device):
            return None
    if mask is not None and mask.requires_grad:
        return None
    if dtype == torch.float64 and h != 1:  # a number reaches a kernel in fp32
        scale, h = in_double(h, scale, skip), 1.0
    plan = _plan(skip, branch, scale, mask, weight, bias, eps, kind, dtype, autocast)
    if plan is None:
        return None
    learned = (skip, branch, scale, weight, bias)
    try:
        if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in learned]):
            both: tuple[Tensor, Tensor] = apply(_StepNorm, *learned, mask, float(h), plan)
            return both
        return _forward(skip, branch, scale, mask, weight, bias, float(h), plan)[:2]
    except Unavailable:
        return None


def _plan(
    skip: Tensor,
    branch: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    dtype: torch.dtype,
    autocast: bool,
) -> Plan | None:
    if skip.shape != branch.shape:
        return None
    key = (
        skip.shape, skip.stride(), branch.stride(), skip.dtype, branch.dtype, skip.device, branch.device, dtype,
        eps, kind, autocast, described(scale), described(mask), described(weight), described(bias),
    )  # fmt: skip
    try:
        return _plans[key]
    except KeyError:
        pass
    if len(_plans) >= MOST_PLANS:
        _plans.clear()
    plan = _plans[key] = _new_plan(skip, branch, scale, mask, weight, bias, eps, kind, dtype, autocast)
    return plan


def _new_plan(
    skip: Tensor,
    branch: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    dtype: torch.dtype,
    autocast: bool,
) -> Plan | None:
    columns = skip.shape[-1] if skip.dim() else 0
    affine = [t for t in (weight, bias) if t is not None]
    given = [skip, branch, *affine, *(t for t in (scale, mask) if t is not None)]
    if any(t.dtype not in FLOATS for t in given) or branch.device != skip.device:
        return None
    if not 0 < columns <= MOST or skip.numel() == 0 or any(t.shape != (columns,) for t in affine):
        return None
    normed_dtype = dtype
    if autocast:
        if kind == "rms_norm" or not skip.is_cuda:
            return None  # what autocast makes of these differs from version to version
        normed_dtype = torch.promote_types(dtype, torch.float32)
    elif any(t.dtype != dtype for t in affine):
        return None  # eager refuses some of these
    last = skip.dim() - 1 if columns > 1 else SINGLE
    along, across = varying(scale, skip.shape), varying(mask, skip.shape)
    if along >= 0 and along != last:
        return None
    small = (last, along, across)
    way = layout(skip.shape, (skip.stride(), branch.stride()), small)
    if way is None:
        return None
    normed = torch.empty(skip.shape, device="meta").stride() if _makes_dense(kind, skip.device) else way.strides
    way = layout(skip.shape, (skip.stride(), branch.stride(), normed), small)
    if way is None or way.axes[0] not in (INNER, SINGLE) or way.inner != columns:
        return None
    return Plan(way, normed, skip.device, eps, kind == "layer_norm", dtype, normed_dtype)


@cache
def _makes_dense(kind: str, device: torch.device) -> bool:
    """Whether the norm of torch is contiguous whatever its input's strides; that of `rms_norm` is in some versions."""
    x = torch.zeros(2, 2, 2, device=device).transpose(0, 1)
    with torch.no_grad():
        made = F.rms_norm(x, (2,)) if kind == "rms_norm" else F.layer_norm(x, (2,))
    return made.is_contiguous()


def _forward(
    skip: Tensor,
    branch: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    h: float,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The state, its norm, and what the norm divided and subtracted."""
    way = plan.way
    state = room(way, skip, plan.dtype)
    normed = skip.new_empty_strided(way.shape, plan.normed, dtype=plan.normed_dtype)
    rstd = skip.new_empty(plan.rows, dtype=plan.wide)
    mean = skip.new_empty(plan.rows, dtype=plan.wide) if plan.centred else None
    small = (dense(scale), dense(mask), dense(weight), dense(bias))
    plan.forward((skip, branch, *small, state, normed, mean, rstd), h)
    return state, normed, mean, rstd


class _StepNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        skip: Tensor,
        branch: Tensor,
        scale: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        h: float,
        plan: Plan,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # where only the norm takes the state, no zeros are made and read
        state, normed, mean, rstd = _forward(skip, branch, scale, mask, weight, bias, h, plan)
        wants = ctx.needs_input_grad[:5]
        if not any(wants[:3]):
            ctx.mark_non_differentiable(state)
        ctx.save_for_backward(state, branch if wants[2] else None, scale, mask, weight, mean, rstd)
        ctx.h, ctx.plan, ctx.wants, ctx.dtypes = h, plan, wants, (skip.dtype, branch.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return state, normed

    @staticmethod
    def backward(ctx: Any, state_grad: Tensor | None, normed_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if state_grad is None and normed_grad is None:
            return (None,) * 8
        if first_order(state_grad, normed_grad):
            try:
                return *_backward(ctx, state_grad, normed_grad), None, None, None
            except Unavailable:
                pass
        return *_formula(ctx, state_grad, normed_grad), None, None, None


def _formula(ctx: Any, state_grad: Tensor | None, normed_grad: Tensor | None) -> _formulas.Gradients:
    """The gradients by ATen."""
    state, branch, scale, mask, weight, _, _ = ctx.saved_tensors
    dtype = _formulas.wide(state, state_grad, normed_grad)
    total = None if state_grad is None else state_grad.to(dtype)
    weight_grad = bias_grad = None
    if normed_grad is not None:
        g = normed_grad.to(dtype)
        of_state, normed = _formulas.of_norm(g, state, weight, ctx.plan.eps, ctx.plan.centred)
        total = of_state if total is None else total + of_state
        if ctx.wants[3]:
            weight_grad = (g * normed).sum_to_size(weight.shape).to(weight.dtype)
        if ctx.wants[4]:
            bias_grad = g.sum_to_size(g.shape[-1:]).to(ctx.bias_dtype)
    assert total is not None
    return [*_formulas.of_sum(total, branch, scale, mask, ctx.h, ctx.dtypes, ctx.wants[:3]), weight_grad, bias_grad]


def _backward(ctx: Any, state_grad: Tensor | None, normed_grad: Tensor | None) -> _formulas.Gradients:
    """The gradients by the kernel. The tensors that were kept may come back with other strides."""
    state, branch, scale, mask, weight, mean, rstd = ctx.saved_tensors
    plan, way, wants = ctx.plan, ctx.plan.way, ctx.wants
    state = ordered(state, way.strides)
    state_grad = None if state_grad is None else ordered(state_grad, way.strides)
    if normed_grad is None:
        normed_grad = torch.empty_strided(
            state.shape, plan.normed, dtype=plan.normed_dtype, device=state.device
        ).zero_()
    else:
        normed_grad = ordered(normed_grad, plan.normed)
    shared = wants[1] and ctx.h == 1 and scale is None and mask is None and ctx.dtypes[0] == ctx.dtypes[1]
    skip_grad = room(way, state, ctx.dtypes[0]) if wants[0] or shared else None
    branch_grad = room(way, state, ctx.dtypes[1]) if wants[1] and not shared else None
    backward = plan.backward(branch, (skip_grad is not None, branch_grad is not None, *wants[2:], state_grad is None))
    branch = ordered(branch, way.strides) if backward.copies else branch
    parts = [rstd.new_empty(backward.parts) if wanted else None for wanted in wants[2:]]
    operands = (state_grad, normed_grad, state, branch, dense(scale), dense(mask), dense(weight))
    statistics = (dense(mean), dense(rstd))
    backward.launch((*operands, *statistics, skip_grad, branch_grad, *parts), ctx.h)
    scale_grad, weight_grad, bias_grad = parts
    if scale_grad is not None:
        summed = scale_grad.sum() if way.axes[1] == SINGLE else scale_grad.sum(0)
        scale_grad = summed.to(scale.dtype).view(scale.shape)
    if weight_grad is not None:
        weight_grad = weight_grad.sum(0).to(weight.dtype)
    if bias_grad is not None:
        bias_grad = bias_grad.sum(0).to(ctx.bias_dtype)
    if shared:
        branch_grad = skip_grad
    return [skip_grad if wants[0] else None, branch_grad, scale_grad, weight_grad, bias_grad]


def _warps(block: tuple[int, int], elements: int) -> int:
    """Of so many elements a thread."""
    return min(32, max(4, block[0] * block[1] // (32 * elements)))


def _block(way: Layout) -> tuple[int, int]:
    columns = power_of_two(way.inner)
    return max(1, min(2048 // columns, power_of_two(way.rows))), columns
