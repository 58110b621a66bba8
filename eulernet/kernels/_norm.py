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
    TILE,
    Layout,
    Strides,
    again,
    alike,
    cdiv,
    dense,
    described,
    layout,
    ordered,
    power_of_two,
    resident,
    room,
    stages,
    varying,
    warps,
)  # fmt: skip
from eulernet.kernels._step import FLOATS, MOST_PLANS, computed_in, in_double, sizes
from eulernet.kernels._sums import sums

MOST = 8192  # columns that fit into one tile, so that the registers hold it
FORWARD = 16  # elements of a tile a thread holds
# A backward goes over tiles of so many elements, and reads up to so many of them ahead; a multiprocessor holds so many
# bytes of them. With these an H200 was fastest, of rows of 384 to 4096 columns.
READ, STAGES, HELD = 1024, 3, 8192


class Plan:
    """How operands of these shapes, strides and dtypes are stepped and normed."""

    def __init__(
        self, way: Layout, normed: Strides, device: torch.device, eps: float, centred: bool,
        dtype: torch.dtype, normed_dtype: torch.dtype, mixed: bool,
    ) -> None:  # fmt: skip
        self.way, self.normed, self.device, self.rows = way, normed, device, way.rows
        self.eps, self.centred, self.dtype, self.normed_dtype = eps, centred, dtype, normed_dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        block = _block(way, TILE)
        tail = (*sizes(way), *way.axes[1:], eps, centred, way.split, computed_in(dtype), *block)
        each = warps(block, dtype.itemsize) if mixed else min(32, max(4, block[0] * block[1] // (32 * FORWARD)))
        programs = cdiv(way.rows, block[0])
        # Without and with what a backward needs.
        self.forward = Launch(_device.norm_forward, programs, device, tail, each)
        self.forward_kept = Launch(_device.norm_forward, programs, device, tail, each)
        self.alike = False
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
        block, summed = _block(way, READ), sum(wants[2:5])
        width = plan.normed_dtype.itemsize
        read = width + plan.dtype.itemsize * (2 - wants[5]) + (branch.itemsize if branch is not None else 0)
        elements, each = block[0] * block[1], warps(block, width)
        held = max(1, HELD // (elements * width))
        programs = cdiv(way.rows, block[0])
        tiles = cdiv(programs, resident(plan.device, held)) if summed else 1
        programs = cdiv(programs, tiles)
        ahead = stages(plan.device, held * elements * read, min(tiles, STAGES))
        single = wants[2] and way.axes[1] == SINGLE  # its sum has another shape than those of weight and bias
        self.parts = [(programs, 1 if single else way.inner), *[(programs, way.inner)] * 2]
        self.single = sums(programs, 1, 1, 1, plan.device) if single else None
        self.sums = sums(programs, way.inner, 1, summed - single, plan.device) if summed > single else None
        tail = (way.middle, way.inner, way.rows, *way.steps[2:], tiles)
        tail += (*way.axes[1:], way.split, computed_in(plan.dtype), *block, ahead)
        self.launch = Launch(_device.norm_backward, programs, plan.device, tail, each)


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
    wide_weight: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """The state in `dtype` and its norm, which autocast may widen; None where the kernel does not take the operands.

    `wide_weight`: the weight may be in float32 beside a state that is not.
    """
    for small in (scale, mask, weight, bias):
        if small is not None and not (plain(small) and small.device == skip.device):
            return None
    if mask is not None and mask.requires_grad:
        return None
    if dtype == torch.float64 and h != 1:  # a number reaches a kernel in fp32
        scale, h = in_double(h, scale, skip), 1.0
    plan = _plan(skip, branch, scale, mask, weight, bias, eps, kind, dtype, autocast, wide_weight)
    if plan is None:
        return None
    learned = (skip, branch, scale, weight, bias)
    try:
        if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in learned]):
            both: tuple[Tensor, Tensor] = apply(_StepNorm, *learned, mask, float(h), plan)
            return both
        return _forward(skip, branch, scale, mask, weight, bias, float(h), plan, kept=False)[:2]
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
    wide_weight: bool,
) -> Plan | None:
    shape = skip.shape
    if shape != branch.shape:
        return None
    key = (
        shape, skip.stride(), branch.stride(), skip.dtype, branch.dtype, skip.device, branch.device, dtype,
        eps, kind, autocast, wide_weight, described(scale), described(mask), described(weight), described(bias),
    )  # fmt: skip
    try:
        return _plans[key]
    except KeyError:
        pass
    if len(_plans) >= MOST_PLANS:
        _plans.clear()
    plan = _plans[key] = _new_plan(skip, branch, scale, mask, weight, bias, eps, kind, dtype, autocast, wide_weight)
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
    wide_weight: bool,
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
        if not widened(kind, skip.device):
            return None
        normed_dtype = torch.promote_types(dtype, torch.float32)
    elif not wide_weight and any(t.dtype != dtype for t in affine):
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
    mixed = len({skip.dtype, branch.dtype, normed_dtype}) > 1
    plan = Plan(way, normed, skip.device, eps, kind == "layer_norm", dtype, normed_dtype, mixed)
    plan.alike = alike(way, skip, dtype) and normed_dtype == dtype and normed == way.strides
    return plan


def widened(kind: str, device: torch.device) -> bool:
    """Whether autocast widens this norm; what it makes of others differs from version to version."""
    return kind == "layer_norm" and device.type == "cuda"


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
    kept: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The state, its norm, and where it is to be kept what the norm subtracted and divided by."""
    way = plan.way
    if plan.alike:
        state, normed = torch.empty_like(skip), torch.empty_like(skip)
    else:
        state = room(way, skip, plan.dtype)
        normed = skip.new_empty_strided(way.shape, plan.normed, dtype=plan.normed_dtype)
    rstd = skip.new_empty(plan.rows, dtype=plan.wide) if kept else None
    mean = skip.new_empty(plan.rows, dtype=plan.wide) if kept and plan.centred else None
    small = (dense(scale), dense(mask), dense(weight), dense(bias))
    (plan.forward_kept if kept else plan.forward)((skip, branch, *small, state, normed, mean, rstd), h)
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
    parts = [rstd.new_empty(shape) if wanted else None for shape, wanted in zip(backward.parts, wants[2:], strict=True)]
    operands = (state_grad, normed_grad, state, branch, dense(scale), dense(mask), dense(weight))
    statistics = (dense(mean), dense(rstd))
    backward.launch((*operands, *statistics, skip_grad, branch_grad, *parts), ctx.h)
    summed = [
        torch.empty_like(scale, memory_format=torch.contiguous_format) if wants[2] else None,
        torch.empty_like(weight) if wants[3] else None,
        rstd.new_empty(way.inner, dtype=ctx.bias_dtype) if wants[4] else None,
    ]
    if backward.single is not None:
        backward.single((parts[0], None, None, summed[0], None, None), ctx.h)
        parts[0] = None
    if backward.sums is not None:
        backward.sums((*parts, *summed), ctx.h)
    if shared:
        branch_grad = skip_grad
    return [skip_grad if wants[0] else None, branch_grad, *summed]


def _block(way: Layout, elements: int) -> tuple[int, int]:
    """Whole rows, as many as have so many elements."""
    columns = power_of_two(way.inner)
    return max(1, min(elements // columns, power_of_two(way.rows))), columns
