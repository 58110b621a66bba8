"""`activation(skip + h * mask * gamma * branch)` and its gradients, one kernel each."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from eulernet.kernels import _device, _formulas, first_order, plain
from eulernet.kernels._launch import Launch, Unavailable, apply
from eulernet.kernels._layout import (
    INNER,
    MIDDLE,
    OUTER,
    SINGLE,
    Layout,
    again,
    alike,
    apart,
    cdiv,
    dense,
    described,
    ordered,
    resident,
    room,
    stages,
    tile,
    walk,
    warps,
)  # fmt: skip
from eulernet.kernels._sums import sums

ACTIVATIONS = {None: 0, "relu": 1, "silu": 2, "gelu": 3}
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
MOST_PLANS = 4096
# Where a backward sums up: elements of a tile, how many tiles a program reads ahead, warps that a multiprocessor holds.
# With these an H200 was fastest.
READ, STAGES, HELD = 1024, 5, 16
SINGLE_WARPS = 4  # of a program that reads one operand: each thread reads more of it
Wants = tuple[bool, ...]  # whether the gradients of skip, branch and scale are asked for, and those that a norm adds


class Plan:
    """How operands of these shapes, strides and dtypes are stepped: the walk, and the kernels with their arguments."""

    def __init__(
        self, way: Layout, device: torch.device, activation: str | None, dtype: torch.dtype, mixed: bool
    ) -> None:
        self.way, self.device, self.activation, self.dtype = way, device, activation, dtype
        # Operands of several dtypes lie with the same threads where each has few elements.
        self.warps = warps(way.block, dtype.itemsize) if mixed else 4
        self.smooth = activation in ("silu", "gelu")  # its derivative needs the state before it
        self.forward, self.forward_kept = self._forward(), self._forward()  # without and with that state
        self.alike = False
        self.backwards: dict[Any, Backward] = {}

    def room(self, skip: Tensor) -> Tensor:
        """Room for the result."""
        return torch.empty_like(skip) if self.alike else room(self.way, skip, self.dtype)

    def _forward(self) -> Launch:
        tail = (*sizes(self.way), *self.constants(self.way, self.way.block))
        return Launch(_device.step_forward, self.way.programs, self.device, tail, self.warps)

    def constants(self, way: Layout, block: tuple[int, int]) -> tuple[Any, ...]:
        """SCALE, MASK, ACT, SPLIT, T, BR, BC"""
        return *way.axes, ACTIVATIONS[self.activation], way.split, computed_in(self.dtype), *block

    def backward(self, branch: Tensor | None, wants: Wants) -> Backward:
        """The one for a branch with these strides, which need not be those that it had."""
        key = wants, None if branch is None else branch.stride()
        if key not in self.backwards:
            self.backwards[key] = Backward(self, branch, wants)
        return self.backwards[key]


class Backward:
    """The kernel for these gradients of skip, branch and scale."""

    def __init__(self, plan: Plan, branch: Tensor | None, wants: Wants) -> None:
        way, self.copies = again(plan.way, branch)
        block, axis = way.block, way.axes[0]
        repeats = wants[2] and axis in (INNER, SINGLE)  # a program makes a part of the sum over several tiles
        if repeats:
            block = tile(way.rows, way.inner, READ)
        blocks, tiles, ahead = cdiv(way.inner, block[1]), 1, 1
        each = SINGLE_WARPS if plan.activation is None else plan.warps
        lanes = cdiv(way.rows, block[0])
        if repeats:
            assert branch is not None
            each = warps(block, plan.dtype.itemsize)
            held = max(1, HELD // each)
            tiles = cdiv(lanes, max(1, resident(plan.device, held) // blocks))
            lanes = cdiv(lanes, tiles)
            read = branch.itemsize + plan.dtype.itemsize * (1 if plan.activation is None else 2)
            ahead = stages(plan.device, held * block[0] * block[1] * read, min(tiles, STAGES))
        if wants[2]:
            self.parts = {
                INNER: (lanes, way.inner, 1), SINGLE: (lanes * blocks, 1, 1),
                MIDDLE: (way.outer, way.middle, blocks), OUTER: (1, way.outer, way.middle * blocks),
            }[axis]  # fmt: skip
            self.sums = sums(*self.parts, 1, plan.device)
        tail = (way.middle, way.inner, way.rows, *way.steps[2:], tiles, *plan.constants(way, block), ahead)
        self.launch = Launch(_device.step_backward, lanes * blocks, plan.device, tail, each)


_plans: dict[Any, Plan | None] = {}


def step(
    skip: Tensor,
    branch: Tensor,
    h: float,
    scale: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor | None:
    """The step in `dtype`; None where the kernel does not take these operands."""
    for small in (scale, mask):
        if small is not None and not (plain(small) and small.device == skip.device):
            return None
    if mask is not None and mask.requires_grad:
        return None
    if dtype == torch.float64 and h != 1:  # a number reaches a kernel in fp32
        scale, h = in_double(h, scale, skip), 1.0
    plan = _plan(skip, branch, scale, mask, activation, dtype)
    if plan is None or (out is not None and not fits(out, plan.way, skip, branch, dtype)):
        return None
    h = float(h)
    differentiable = torch.is_grad_enabled() and (
        skip.requires_grad or branch.requires_grad or (scale is not None and scale.requires_grad)
    )
    try:
        if not differentiable:
            result = plan.room(skip) if out is None else out
            plan.forward((skip, branch, dense(scale), dense(mask), None, result), h)
            if out is not None and not out.is_inference():
                torch.autograd.graph.increment_version(out)
            return result
        # In place with gradients: backward must not need what is overwritten, and only autograd can refuse a leaf.
        if out is not None and (plan.smooth or scale is not None or out.is_leaf or out._is_view()):
            return None
        into = None if out is None else out is branch
        stepped = apply(_Step, skip, branch, scale, mask, h, plan, into)
        with_gradients: Tensor = stepped[0] if plan.smooth else stepped
        return with_gradients
    except Unavailable:
        return None


def _plan(
    skip: Tensor, branch: Tensor, scale: Tensor | None, mask: Tensor | None, activation: str | None, dtype: torch.dtype
) -> Plan | None:
    shape = skip.shape
    if shape != branch.shape:
        return None
    key = (
        shape, skip.stride(), branch.stride(), skip.dtype, branch.dtype, skip.device, branch.device, dtype,
        activation, scale is not None and described(scale), mask is not None and described(mask),
    )  # fmt: skip
    try:
        return _plans[key]
    except KeyError:
        pass
    way = walk(skip, branch, scale, mask)
    dtypes = {t.dtype for t in (skip, branch, scale, mask) if t is not None}
    plan = None
    if way is not None and dtypes <= FLOATS:
        plan = Plan(way, skip.device, activation, dtype, skip.dtype != branch.dtype)
        plan.alike = alike(way, skip, dtype)
    if len(_plans) >= MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def fits(out: Tensor, way: Layout, skip: Tensor, branch: Tensor, dtype: torch.dtype) -> bool:
    """Whether a result can be written there while programs still read the operands."""
    if not (plain(out) and out.dtype == dtype and out.shape == skip.shape and out.device == skip.device):
        return False
    return out.stride() == way.strides and all(apart(out, operand) for operand in (skip, branch))


def in_double(h: float, scale: Tensor | None, like: Tensor) -> Tensor:
    """h * scale as a tensor."""
    return like.new_full((), h, dtype=torch.float64) if scale is None else scale.double() * h


def sizes(way: Layout) -> tuple[int, ...]:
    return way.middle, way.inner, way.rows, *way.steps


def computed_in(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        skip: Tensor,
        branch: Tensor,
        scale: Tensor | None,
        mask: Tensor | None,
        h: float,
        plan: Plan,
        into: bool | None,  # None: a new tensor; else whether branch or skip is written into
    ) -> Any:
        """The result; where the derivative of the activation is smooth also the state before it, which is kept."""
        ctx.set_materialize_grads(False)
        if into is None:
            out = plan.room(skip)
        else:
            out = branch if into else skip
            ctx.mark_dirty(out)
        state = plan.room(skip) if plan.smooth else None
        launch = plan.forward_kept if plan.smooth else plan.forward
        launch((skip, branch, dense(scale), dense(mask), state, out), h)
        wants = ctx.needs_input_grad[:3]
        ctx.save_for_backward(
            branch if wants[2] else None, state, out if plan.activation == "relu" else None, scale, mask
        )
        ctx.h, ctx.plan, ctx.wants, ctx.dtypes = h, plan, wants, (skip.dtype, branch.dtype)
        return out if state is None else (out, state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, state_grad: Tensor | None = None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 4
        if grad is None and state_grad is None:
            return None, None, None, *nothing
        if grad is not None and state_grad is None and first_order(grad):
            try:
                return *_backward(ctx, grad), *nothing
            except Unavailable:
                pass
        branch, state, out, scale, mask = ctx.saved_tensors
        dtype = _formulas.wide(grad, state_grad)
        total = None if grad is None else _formulas.of_activation(grad.to(dtype), state, out, ctx.plan.activation)
        if state_grad is not None:  # in a derivative of the derivative, which the state takes part in
            total = state_grad.to(dtype) if total is None else total + state_grad
        assert total is not None
        return *_formulas.of_sum(total, branch, scale, mask, ctx.h, ctx.dtypes, ctx.wants), *nothing


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients by the kernel. The tensors that were kept may come back with other strides."""
    branch, state, out, scale, mask = ctx.saved_tensors
    plan, (wants_skip, wants_branch, wants_scale) = ctx.plan, ctx.wants
    way = plan.way
    skip_grad = branch_grad = part = scale_grad = None
    passes = wants_skip and plan.activation is None and ctx.dtypes[0] == plan.dtype  # its gradient is the one that came
    if wants_skip and not passes:
        skip_grad = room(way, grad, ctx.dtypes[0])
    if wants_branch:
        branch_grad = room(way, grad, ctx.dtypes[1])
    backward = plan.backward(branch, (wants_skip and not passes, wants_branch, wants_scale))
    if wants_scale:
        part = grad.new_empty(backward.parts, dtype=torch.promote_types(plan.dtype, torch.float32))
        branch = ordered(branch, way.strides) if backward.copies else branch
    if skip_grad is not None or branch_grad is not None or part is not None:
        state = None if state is None else ordered(state, way.strides)
        out = None if out is None else ordered(out, way.strides)
        results = (skip_grad, branch_grad, part)
        operands = (ordered(grad, way.strides), branch, state, out, dense(scale), dense(mask))
        backward.launch((*operands, *results), ctx.h)
    if wants_scale:
        scale_grad = torch.empty_like(scale, memory_format=torch.contiguous_format)
        backward.sums((part, None, None, scale_grad, None, None), ctx.h)
    return grad if passes else skip_grad, branch_grad, scale_grad
