"""Which part of a tensor an operation reads or writes: an index of numbers and slices."""

from __future__ import annotations

from typing import Any


def part_of(op: str, args: Any, kwargs: Any, output: int, shape: tuple[int, ...]) -> Any:
    """The index of the part of a tensor that an operation gives, by numbers and slices; None where it is not known.

    Example:
        >>> part_of("narrow", [0, 1, 2, 3], {}, 0, (4, 6))
        (slice(None, None, None), slice(2, 5, None))
    """
    if op == "getitem":
        return args[1]
    if op not in ("narrow", "select", "slice", "unbind", "chunk", "split"):
        return None
    names = {"narrow": "dim start length", "select": "dim index", "slice": "dim start end step", "unbind": "dim"}
    given = dict(zip(names.get(op, "sizes dim").split(), args[1:], strict=False)) | kwargs
    dim = given.get("dim", 0)
    start, sizes = given.get("start", 0), given.get("sizes", given.get("split_size_or_sections", given.get("chunks")))
    if not all(type(n) is int for n in (dim, start)) or not shape:
        return None
    part: Any = None
    if op == "narrow":
        part = slice(start, start + given["length"])
    elif op == "select":
        part = given["index"]
    elif op == "slice":
        part = slice(start, given.get("end"), given.get("step", 1))
    elif op == "unbind":
        part = output
    elif op in ("chunk", "split"):
        n = shape[dim]
        each = -(-n // sizes) if op == "chunk" and type(sizes) is int else sizes
        sizes = [each] * (n // each) if type(each) is int else each
        part = slice(sum(sizes[:output]), min(n, sum(sizes[: output + 1])) if output < len(sizes) else n)
    return None if part is None else (slice(None),) * (dim % len(shape)) + (part,)


def same_part(one: Any, other: Any, shape: tuple[int, ...]) -> bool:
    """Whether two indices of a tensor of this shape are the same; those of other tensors are, where they are equal."""
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
