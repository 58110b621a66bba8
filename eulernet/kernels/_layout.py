"""How a kernel walks over its operands: as rows of elements that are neighbours in memory, without copies."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Along which axis of the walk (or which dimension of a shape) a small operand varies; or one of the negative numbers.
OUTER, MIDDLE, INNER = 0, 1, 2
ABSENT, SINGLE, SEVERAL = -1, -2, -3
TILE = 2048  # elements a program handles at once. Not measured yet
PROGRAMS = 2048  # that share a reduction: a few for each multiprocessor. Not measured yet
Strides = tuple[int, ...]


class Layout(NamedTuple):
    """Three axes, outer, middle and inner, the last with stride 1. The result is dense in this order.

    A row is the inner axis at one position of the others; there are `rows` = outer size * middle size of them.
    """

    outer: int
    middle: int
    inner: int
    skip: tuple[int, int]  # strides of the outer and the middle axis
    branch: tuple[int, int]
    axes: tuple[int, ...]  # of each small operand
    strides: Strides  # of the result, those that an addition gives it
    block: tuple[int, int]  # rows and columns that a program handles at once

    @property
    def rows(self) -> int:
        return self.outer * self.middle


@lru_cache(maxsize=4096)
def layout(shape: Strides, skip: Strides, branch: Strides, small: tuple[int, ...]) -> Layout | None:
    """The walk over two operands of a shape with these strides, and small ones that vary along these dimensions.

    None where three axes do not suffice, the last one has gaps, or a small operand varies along several dimensions.
    """
    if SEVERAL in small:
        return None
    strides = _strides(*(torch.empty_strided(shape, each, device="meta") for each in (skip, branch)))
    axes: list[list[int]] = []  # each a run of dimensions that is one axis for all of them
    for d in sorted(range(len(shape)), key=lambda d: -strides[d]):
        if shape[d] == 1:
            continue
        if axes and d not in small and axes[-1][-1] not in small:
            last = axes[-1][-1]
            if all(each[last] == shape[d] * each[d] for each in (skip, branch, strides)):
                axes[-1].append(d)
                continue
        axes.append([d])
    if len(axes) > 3 or (axes and (skip[axes[-1][-1]] != 1 or branch[axes[-1][-1]] != 1)):
        return None
    sizes, skips, branches = [1] * (3 - len(axes)), [0] * (3 - len(axes)), [0] * (3 - len(axes))
    for axis in axes:
        size = 1
        for d in axis:
            size *= shape[d]
        sizes.append(size)
        skips.append(skip[axis[-1]])
        branches.append(branch[axis[-1]])
    where = {d: 3 - len(axes) + i for i, axis in enumerate(axes) for d in axis}
    places = tuple(where.get(d, d) for d in small)
    block = _block(sizes[0] * sizes[1], sizes[2])
    outer, middle, inner = sizes
    return Layout(outer, middle, inner, (skips[0], skips[1]), (branches[0], branches[1]), places, strides, block)


def _strides(skip: Tensor, branch: Tensor) -> Strides:
    """Those of the sum; on the meta device an addition overlooks that operands with odd strides may be contiguous."""
    dense = skip.is_contiguous() and branch.is_contiguous()
    return torch.empty(skip.shape, device="meta").stride() if dense else torch.add(skip, branch).stride()


def _block(rows: int, inner: int) -> tuple[int, int]:
    """Rows and columns of a tile, powers of two."""
    columns = min(power_of_two(inner), TILE)
    divisor = inner & -inner  # columns of this size leave no lane idle at the end of a row
    if 64 <= divisor < columns and rows >= TILE // divisor:
        columns = divisor
    return min(TILE // columns, power_of_two(rows)), columns


def power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def varying(small: Tensor | None, shape: torch.Size) -> int:
    """The dimension of `shape` along which a small operand varies, as `layout` takes it."""
    if small is None:
        return ABSENT
    offset = len(shape) - small.dim()
    dims = [d for d in range(small.dim()) if small.shape[d] != 1]
    if offset < 0 or len(dims) > 1 or (dims and small.shape[dims[0]] != shape[dims[0] + offset]):
        return SEVERAL
    return dims[0] + offset if dims else SINGLE


def walk(skip: Tensor, branch: Tensor, *small: Tensor | None) -> Layout | None:
    """The layout for two operands and the small ones that broadcast with them."""
    shape = skip.shape
    if shape != branch.shape or skip.numel() == 0 or skip.device != branch.device:
        return None
    return layout(shape, skip.stride(), branch.stride(), tuple([varying(t, shape) for t in small]))


def room(way: Layout, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the result of a walk."""
    return torch.empty_strided(like.shape, way.strides, dtype=dtype, device=like.device)


def launch(kernel: Any, programs: int, on: Tensor, *args: Any, **constants: Any) -> None:
    """Run a kernel on the device of a tensor."""
    if on.is_cuda and on.device.index != torch.cuda.current_device():
        with torch.cuda.device(on.device):
            kernel[(programs,)](*args, **constants)
    else:
        kernel[(programs,)](*args, **constants)
