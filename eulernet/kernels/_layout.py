"""How a kernel walks over its operands: as rows of elements that are neighbours in memory, without copies."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Along which axis of the walk (or which dimension of a shape) a small operand varies; or one of the negative numbers.
OUTER, MIDDLE, INNER = 0, 1, 2
ABSENT, SINGLE, SEVERAL = -1, -2, -3
TILE = 2048  # elements a program handles at once
ALIGNED = 16  # bytes that a thread reads at once; Triton compiles a kernel of its own for pointers that this divides
Strides = tuple[int, ...]


class Layout(NamedTuple):
    """Three axes, outer, middle and inner, the last with stride 1. The result is dense in this order.

    A row is the inner axis at one position of the others; there are `rows` = outer size * middle size of them.
    """

    outer: int
    middle: int
    inner: int
    steps: tuple[int, ...]  # strides of the outer and the middle axis, of each operand in turn
    axes: tuple[int, ...]  # of each small operand
    strides: Strides  # of the result, those that an addition gives it
    block: tuple[int, int]  # rows and columns that a program handles at once
    shape: Strides
    small: tuple[int, ...]  # the dimensions that `axes` stand for

    @property
    def rows(self) -> int:
        return self.outer * self.middle

    @property
    def split(self) -> int:
        """The bits that a row's number is divided with to find its outer position, 0 where it need not be."""
        return 0 if self.outer == 1 else 32 if self.rows < 2**31 else 64

    @property
    def programs(self) -> int:
        """Those that handle one tile each."""
        return cdiv(self.rows, self.block[0]) * cdiv(self.inner, self.block[1])


@lru_cache(maxsize=4096)
def layout(shape: Strides, operands: tuple[Strides, ...], small: tuple[int, ...]) -> Layout | None:
    """The walk over operands of a shape with these strides, and small ones that vary along these dimensions.

    The result has the strides of the sum of the first two. None where three axes do not suffice, the last one has
    gaps, or a small operand varies along several dimensions.
    """
    if SEVERAL in small:
        return None
    strides = _strides(*(torch.empty_strided(shape, each, device="meta") for each in operands[:2]))
    axes: list[list[int]] = []  # each a run of dimensions that is one axis for all of them
    for d in sorted(range(len(shape)), key=lambda d: -strides[d]):
        if shape[d] == 1:
            continue
        if axes and d not in small and axes[-1][-1] not in small:
            last = axes[-1][-1]
            if all(each[last] == shape[d] * each[d] for each in (*operands, strides)):
                axes[-1].append(d)
                continue
        axes.append([d])
    if len(axes) > 3 or (axes and any(each[axes[-1][-1]] != 1 for each in operands)):
        return None
    none = 3 - len(axes)
    outer, middle, inner = [1] * none + [math.prod(shape[d] for d in axis) for axis in axes]
    places = [None] * none + [axis[-1] for axis in axes]
    steps = tuple(0 if d is None else each[d] for each in operands for d in places[:2])
    where = {d: none + i for i, axis in enumerate(axes) for d in axis}
    block = tile(outer * middle, inner)
    return Layout(outer, middle, inner, steps, tuple(where.get(d, d) for d in small), strides, block, shape, small)


def again(way: Layout, branch: Tensor | None, *others: Strides) -> tuple[Layout, bool]:
    """The walk of a backward, over what is dense as the result is, a branch and others; and whether a copy is walked.

    The branch was kept, and may come back with other strides than it had.
    """
    if branch is not None:
        found = layout(way.shape, (way.strides, branch.stride(), *others), way.small)
        if found is not None and _differing(found.strides, way) == []:
            return found, False
    found = layout(way.shape, (way.strides, way.strides, *others), way.small)
    assert found is not None
    return found, branch is not None


def _differing(strides: Strides, way: Layout) -> list[int]:
    """The dimensions in which these strides are not the result's; one of size 1 may have any."""
    return [d for d, n in enumerate(way.shape) if n > 1 and strides[d] != way.strides[d]]


def _strides(skip: Tensor, branch: Tensor) -> Strides:
    """Those of the sum; on the meta device an addition overlooks that operands with odd strides may be contiguous."""
    dense = skip.is_contiguous() and branch.is_contiguous()
    return torch.empty(skip.shape, device="meta").stride() if dense else torch.add(skip, branch).stride()


def tile(rows: int, inner: int, elements: int = TILE) -> tuple[int, int]:
    """Rows and columns of a tile, powers of two."""
    columns = min(power_of_two(inner), elements)
    divisor = inner & -inner  # columns of this size leave no lane idle at the end of a row
    if 64 <= divisor < columns and rows >= elements // divisor:
        columns = divisor
    return min(elements // columns, power_of_two(rows)), columns


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
    return layout(shape, (skip.stride(), branch.stride()), tuple([varying(t, shape) for t in small]))


def alike(way: Layout, skip: Tensor, dtype: torch.dtype) -> bool:
    """Whether `torch.empty_like`, which takes less time, makes room for the result: it is laid out as skip is."""
    return skip.dtype == dtype and skip.stride() == way.strides and skip.numel() == span(skip) // skip.element_size()


def room(way: Layout, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the result of a walk."""
    return like.new_empty_strided(way.shape, way.strides, dtype=dtype)


def ordered(tensor: Tensor, strides: Strides) -> Tensor:
    """A tensor with these strides, which are dense; a copy only where it has others."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def dense(small: Tensor | None) -> Tensor | None:
    return None if small is None else small.contiguous()


def described(small: Tensor | None) -> tuple[Any, ...] | None:
    """What a plan depends on of a small operand."""
    return None if small is None else (small.shape, small.dtype)


def warps(block: tuple[int, int], widest: int) -> int:
    """For a tile of which a thread reads 16 bytes at once, of its widest operand.

    So all operands lie with the same threads, and none has to change them.
    """
    return min(32, max(4, block[0] * block[1] * widest // (32 * ALIGNED)))


def resident(device: torch.device, programs: int) -> int:
    """The programs of a GPU that run at the same time, where a multiprocessor holds so many."""
    return multiprocessors(device) * programs


def stages(device: torch.device, size: int, most: int) -> int:
    """How many tiles a program asks for before it needs them, where those that a multiprocessor holds have this size:
    bytes of all that its programs read of one tile each."""
    return max(1, min(most, shared_memory(device) // size))


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that the programs of a multiprocessor share; in the interpreter those of a small GPU."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return 48 * 1024 if properties is None else int(properties.shared_memory_per_multiprocessor) - 4096


@cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; in the interpreter a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def apart(out: Tensor, operand: Tensor) -> bool:
    """Whether two tensors share no memory, or are the same."""
    if out.numel() == 0 or operand.numel() == 0:
        return True
    if out.untyped_storage().data_ptr() != operand.untyped_storage().data_ptr():
        return True
    if out.data_ptr() == operand.data_ptr() and (out.stride(), out.dtype) == (operand.stride(), operand.dtype):
        return out.shape == operand.shape
    first, second = out.data_ptr(), operand.data_ptr()
    return first + span(out) <= second or second + span(operand) <= first


def span(tensor: Tensor) -> int:
    """The bytes from a tensor's first element to its last; as many as it holds where it is dense."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
