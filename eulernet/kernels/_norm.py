"""The new state of a pre-norm transformer and its norm, in one pass, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eulernet.kernels import _device, plain
from eulernet.kernels._layout import INNER, PROGRAMS, SINGLE, Layout, cdiv, launch, layout, power_of_two, room, varying
from eulernet.kernels._step import FLOATS, computed_in, differentiable_once, in_double, ordered

MOST = 8192  # columns that fit into one tile, so that the registers hold it


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
) -> tuple[Tensor, Tensor] | None:
    """The state in `dtype` and its norm; None where the kernel does not take these operands."""
    columns = skip.shape[-1] if skip.dim() else 0
    affine = [t for t in (weight, bias) if t is not None]
    given = [skip, branch, *affine, *(t for t in (scale, mask) if t is not None)]
    if any(t.dtype not in FLOATS or t.device != skip.device or not plain(t) for t in given):
        return None
    if skip.shape != branch.shape:
        return None
    if not 0 < columns <= MOST or skip.numel() == 0 or any(t.shape != (columns,) for t in affine):
        return None
    normed_dtype = dtype
    if torch.is_autocast_enabled(skip.device.type):
        if kind == "rms_norm" or not skip.is_cuda:
            return None  # what autocast makes of these differs from version to version
        normed_dtype = torch.promote_types(dtype, torch.float32)
    elif any(t.dtype != dtype for t in affine):
        return None  # eager refuses some of these
    last = skip.dim() - 1 if columns > 1 else SINGLE
    along, across = varying(scale, skip.shape), varying(mask, skip.shape)
    if (along >= 0 and along != last) or (mask is not None and mask.requires_grad):
        return None
    way = layout(skip.shape, skip.stride(), branch.stride(), (last, along, across))
    if way is None or way.axes[0] not in (INNER, SINGLE) or way.inner != columns:
        return None
    if dtype == torch.float64 and h != 1:  # a number reaches a kernel in fp32
        scale, h = in_double(h, scale, skip), 1.0
        way = way._replace(axes=(way.axes[0], way.axes[1] if along >= 0 else SINGLE, way.axes[2]))
    both: tuple[Tensor, Tensor] = _StepNorm.apply(
        skip, branch, float(h), scale, mask, weight, bias, eps, kind == "layer_norm", way, dtype, normed_dtype
    )
    return both


def _dense(small: Tensor | None) -> Tensor | None:
    return None if small is None else small.contiguous()


class _StepNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        skip: Tensor,
        branch: Tensor,
        h: float,
        scale: Tensor | None,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centred: bool,
        way: Layout,
        dtype: torch.dtype,
        normed_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # where only the norm takes the state, no zeros are made and read
        stream = room(way, skip, dtype)
        normed = torch.empty_like(stream, dtype=normed_dtype)
        rstd = skip.new_empty(way.rows, dtype=torch.promote_types(dtype, torch.float32))
        mean = torch.empty_like(rstd) if centred else None
        block = _block(way)
        small = (_dense(scale), _dense(mask), _dense(weight), _dense(bias))
        operands = (skip, branch, *small, stream, normed, mean, rstd, h)
        sizes = (way.middle, way.inner, way.rows, *way.skip, *way.branch)
        constants = (*way.axes[1:], eps, way.outer > 1, computed_in(dtype), *block)
        launch(
            _device.norm_forward,
            cdiv(way.rows, block[0]),
            skip,
            *operands,
            *sizes,
            *constants,
            num_warps=_warps(block),
        )
        ctx.save_for_backward(stream, branch if ctx.needs_input_grad[3] else None, scale, mask, weight, mean, rstd)
        ctx.h, ctx.way, ctx.block, ctx.dtypes = h, way, block, (skip.dtype, branch.dtype, dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return stream, normed

    @staticmethod
    def backward(ctx: Any, stream_grad: Tensor | None, normed_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        differentiable_once()
        stream, branch, scale, mask, weight, mean, rstd = ctx.saved_tensors
        way, block = ctx.way, ctx.block
        skip_dtype, branch_dtype, dtype = ctx.dtypes
        wants_skip, wants_branch, _, wants_scale, _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        stream_grad = None if stream_grad is None else ordered(stream_grad, way.strides)
        normed_grad = torch.zeros_like(stream) if normed_grad is None else ordered(normed_grad, way.strides)
        unscaled = ctx.h == 1 and scale is None and mask is None
        shared = wants_branch and unscaled and skip_dtype == branch_dtype  # one gradient for both
        skip_grad = torch.empty_like(stream, dtype=skip_dtype) if wants_skip or shared else None
        branch_grad = torch.empty_like(stream, dtype=branch_dtype) if wants_branch and not shared else None
        programs = cdiv(way.rows, block[0])
        tiles = cdiv(programs, PROGRAMS // 4) if wants_scale or wants_weight or wants_bias else 1
        programs = cdiv(programs, tiles)
        scale_parts, weight_parts, bias_parts = (
            rstd.new_empty(programs, way.inner) if wanted else None
            for wanted in (wants_scale, wants_weight, wants_bias)
        )
        small = (_dense(scale), _dense(mask), _dense(weight))
        operands = (stream_grad, normed_grad, stream, branch, *small, mean, rstd)
        results = (skip_grad, branch_grad, scale_parts, weight_parts, bias_parts)
        sizes = (ctx.h, way.middle, way.inner, way.rows, *way.branch, tiles)
        constants = (*way.axes[1:], way.outer > 1, computed_in(dtype), *block)
        launch(
            _device.norm_backward, programs, stream, *operands, *results, *sizes, *constants, num_warps=_warps(block)
        )
        scale_grad = weight_grad = bias_grad = None
        if scale_parts is not None:
            summed = scale_parts.sum() if way.axes[1] == SINGLE else scale_parts.sum(0)
            scale_grad = summed.to(scale.dtype).view(scale.shape)
        if weight_parts is not None:
            weight_grad = weight_parts.sum(0).to(weight.dtype)
        if bias_parts is not None:
            bias_grad = bias_parts.sum(0).to(ctx.bias_dtype)
        if shared:
            branch_grad = skip_grad
        given = (skip_grad if wants_skip else None, branch_grad, None, scale_grad, None, weight_grad, bias_grad)
        return *given, *[None] * 5


def _warps(block: tuple[int, int]) -> int:
    """16 elements a thread."""
    return max(4, block[0] * block[1] // 512)


def _block(way: Layout) -> tuple[int, int]:
    columns = power_of_two(way.inner)
    return max(1, min(2048 // columns, power_of_two(way.rows))), columns
