"""`activation(skip + h * mask * gamma * branch)` and its gradients, one kernel each."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from eulernet._errors import EulernetError
from eulernet.kernels import _device, plain
from eulernet.kernels._layout import INNER, MIDDLE, OUTER, PROGRAMS, SINGLE, Layout, cdiv, launch, room, walk

ACTIVATIONS = {None: 0, "relu": 1, "silu": 2, "gelu": 3}
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


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
    small = [t for t in (scale, mask) if t is not None]
    if any(t.dtype not in FLOATS for t in (skip, branch, *small)):
        return None
    if not all(plain(t) and t.device == skip.device for t in small) or (mask is not None and mask.requires_grad):
        return None
    way = walk(skip, branch, scale, mask)
    if way is None:
        return None
    if out is not None and not (
        plain(out) and out.dtype == dtype and out.shape == skip.shape and out.device == skip.device
    ):
        return None
    if dtype == torch.float64 and h != 1:  # a number reaches a kernel in fp32
        scale, h = in_double(h, scale, skip), 1.0
        way = walk(skip, branch, scale, mask)
        assert way is not None
    h, code = float(h), ACTIVATIONS[activation]
    if out is not None:
        if out.stride() != way.strides:
            return None
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in (skip, branch, *small))):
            _forward(skip, branch, h, scale, mask, code, way, out)
            if not out.is_inference():
                torch.autograd.graph.increment_version(out)
            return out
        # In place with gradients: backward must not need what is overwritten, and only autograd can refuse a leaf.
        if code > 1 or scale is not None or out.is_leaf or out._is_view():
            return None
    into = None if out is None else out is branch
    stepped: Tensor = _Step.apply(skip, branch, h, scale, mask, code, way, dtype, into)
    return stepped


def _forward(
    skip: Tensor,
    branch: Tensor,
    h: float,
    scale: Tensor | None,
    mask: Tensor | None,
    activation: int,
    way: Layout,
    out: Tensor,
) -> None:
    rows, columns = way.block
    programs = cdiv(way.rows, rows) * cdiv(way.inner, columns)
    scale, mask = _dense(scale), _dense(mask)
    args = (skip, branch, scale, mask, out, h, way.middle, way.inner, way.rows, *way.skip, *way.branch)
    launch(_device.step_forward, programs, skip, *args, *way.axes, activation, *_constants(way, out.dtype))


def in_double(h: float, scale: Tensor | None, like: Tensor) -> Tensor:
    """h * scale as a tensor."""
    return like.new_full((), h, dtype=torch.float64) if scale is None else scale.double() * h


def _constants(way: Layout, dtype: torch.dtype) -> tuple[Any, ...]:
    """SPLIT, T, BR, BC"""
    return way.outer > 1, computed_in(dtype), *way.block


def computed_in(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _dense(small: Tensor | None) -> Tensor | None:
    return None if small is None else small.contiguous()


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        skip: Tensor,
        branch: Tensor,
        h: float,
        scale: Tensor | None,
        mask: Tensor | None,
        activation: int,
        way: Layout,
        dtype: torch.dtype,
        into: bool | None,  # None: a new tensor; else whether branch or skip is written into
    ) -> Tensor:
        if into is None:
            out = room(way, skip, dtype)
        else:
            out = branch if into else skip
            ctx.mark_dirty(out)
        _forward(skip, branch, h, scale, mask, activation, way, out)
        smooth = activation > 1  # its derivative needs the state before it, which is computed again
        ctx.save_for_backward(
            skip if smooth else None,
            branch if smooth or ctx.needs_input_grad[3] else None,
            out if activation == 1 else None,
            scale,
            mask,
        )
        ctx.h, ctx.activation, ctx.way = h, activation, way
        ctx.dtypes = skip.dtype, branch.dtype, dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        differentiable_once()
        skip, branch, out, scale, mask = ctx.saved_tensors
        way, activation = ctx.way, ctx.activation
        skip_dtype, branch_dtype, dtype = ctx.dtypes
        wants_skip, wants_branch, _, wants_scale, *_ = ctx.needs_input_grad
        grad = ordered(grad, way.strides)
        passes = activation == 0 and skip_dtype == dtype  # the gradient of skip is the one that came
        skip_grad = torch.empty_like(grad, dtype=skip_dtype) if wants_skip and not passes else None
        branch_grad = torch.empty_like(grad, dtype=branch_dtype) if wants_branch else None
        blocks = cdiv(way.inner, way.block[1])
        tiles, lanes = 1, cdiv(way.rows, way.block[0])
        parts = None
        if wants_scale:
            axis = way.axes[0]
            if axis in (INNER, SINGLE):
                tiles = cdiv(lanes * blocks, PROGRAMS)
                lanes = cdiv(lanes, tiles)
            shapes = {INNER: (lanes, way.inner), SINGLE: (lanes * blocks,)}
            shape = shapes.get(axis, (way.outer, way.middle, blocks))
            parts = grad.new_empty(shape, dtype=torch.promote_types(dtype, torch.float32))
        if skip_grad is not None or branch_grad is not None or parts is not None:
            operands = (grad, skip, branch, out, _dense(scale), _dense(mask), skip_grad, branch_grad, parts)
            sizes = (ctx.h, way.middle, way.inner, way.rows, *way.skip, *way.branch, tiles)
            constants = (*way.axes, activation, *_constants(way, dtype))
            launch(_device.step_backward, lanes * blocks, grad, *operands, *sizes, *constants)
        scale_grad = None
        if parts is not None:
            over = {INNER: (0,), SINGLE: (0,), MIDDLE: (0, 2), OUTER: (1, 2)}[way.axes[0]]
            scale_grad = parts.sum(over).to(scale.dtype).view(scale.shape)
        if wants_skip and passes:
            skip_grad = grad
        return skip_grad, branch_grad, None, scale_grad, *[None] * 5


def differentiable_once() -> None:
    """Called in a backward: refuses what a kernel's gradients can't be part of."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        raise EulernetError(
            "the kernels of eulernet have no second derivative and no batched one. Do without create_graph=True and "
            'is_grads_batched=True, or run the forward within: with eulernet.kernels.mode("torch"): ...'
        )


def ordered(grad: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A gradient with the strides of the result that it belongs to; a copy only where it has others."""
    return grad if grad.stride() == strides else grad.new_empty_strided(grad.shape, strides).copy_(grad)
