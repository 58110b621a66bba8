"""Which part of a tensor an operation reads or writes: an index of numbers and slices."""

from __future__ import annotations

from typing import Any

_ARGUMENTS = {  # behind the tensor
    "narrow": "dim start length",
    "select": "dim index",
    "slice": "dim start end step",
    "unbind": "dim",
    "chunk": "chunks dim",
    "split": "sizes dim",
}


def part_of(op: str, args: Any, kwargs: Any, output: int, shape: tuple[int, ...]) -> Any:
    """The index of the part of a tensor that an operation gives; None where it is not known.

    Args:
        op: the name of the operation.
        args, kwargs: what it was called with, first the tensor.
        output: which of its results is meant.
        shape: that of the tensor.

    Example:
        >>> part_of("narrow", [0, 1, 2, 3], {}, 0, (4, 6))
        (slice(None, None, None), slice(2, 5, None))
        >>> part_of("chunk", [0, 2, -1], {}, 1, (4, 6))
        (slice(None, None, None), slice(3, 6, None))
    """
    if op == "getitem":
        return args[1]
    given = {"dim": 0, **dict(zip(_ARGUMENTS.get(op, "").split(), args[1:], strict=False)), **kwargs}
    sizes: Any = given.get("sizes", given.get("split_size_or_sections", given.get("split_size")))
    dim, start = given["dim"], given.get("start", 0)
    if op not in _ARGUMENTS or not (type(dim) is type(start) is int) or not shape:
        return None
    part: Any = output
    if op == "narrow":
        part = slice(start, start + given["length"])
    elif op == "select":
        part = given["index"]
    elif op == "slice":
        part = slice(start, given.get("end"), given.get("step", 1))
    elif op in ("chunk", "split"):
        each = -(-shape[dim] // given["chunks"]) if op == "chunk" else sizes
        begin = output * each if type(each) is int else sum(each[:output])
        part = slice(begin, min(shape[dim], begin + (each if type(each) is int else each[output])))
    return (slice(None),) * (dim % len(shape)) + (part,)


def same_part(one: Any, other: Any, shape: tuple[int, ...]) -> bool:
    """Whether two indices of a tensor of this shape are the same; those by other tensors are, where they are equal."""
    if one is None or other is None:
        return False
    return bool(one == other or (_ranges(one, shape) and _ranges(one, shape) == _ranges(other, shape)))


def apart(one: Any, other: Any, shape: tuple[int, ...]) -> bool:
    """Whether two indices of a tensor of this shape, of numbers and slices, have no element in common.

    Example:
        >>> apart((slice(None), slice(0, 3)), (slice(None), slice(3, None)), (2, 6))
        True
    """
    ranges = [_ranges(index, shape) for index in (one, other) if index is not None]
    return len(ranges) == 2 and all(ranges) and any(a.isdisjoint(b) for a, b in zip(*ranges, strict=True))


def _ranges(index: Any, shape: tuple[int, ...]) -> list[set[int]]:
    """The positions along each axis, none where an index is something else than a number or a slice."""
    parts = list(index) if isinstance(index, list | tuple) else [index]
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
    parts += [slice(None)] * (len(shape) - len(parts))
    bounds = [b for part in parts for b in ((part.start, part.stop, part.step) if type(part) is slice else (part,))]
    if len(parts) != len(shape) or not all(type(b) is int or b is None for b in bounds) or None in parts:
        return []
    return [
        set(range(n)[part] if isinstance(part, slice) else [part % n]) for part, n in zip(parts, shape, strict=True)
    ]
