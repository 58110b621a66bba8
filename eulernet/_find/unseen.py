"""Additions that the example does not run, in a function that holds a step: what they add is not known.

The patched function says so where one of them runs after all (`Patched._euler_unseen`), so that none is left at h = 1
in silence: behind another `if`, in another mode, with a cache.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any

from eulernet._find.locate import Location
from eulernet._find.trace import Trace
from eulernet._source import Span, definition_of, positions_of, span_of

_SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp
_NUMBERS = ast.Constant | ast.JoinedStr | ast.Tuple | ast.List | ast.Dict | ast.Compare
_SIZES = frozenset("shape size ndim dim len numel stride dtype device int float range".split())


def with_unseen(locations: Iterable[Location], traces: Sequence[Trace]) -> Iterator[Location]:
    """The places of steps, each with the additions of its function that no run has made."""
    ran: dict[int, set[Any]] = {}
    for frame in (f for trace in traces for a in trace.additions for f in a.frames):
        ran.setdefault(id(frame.code), set()).add(positions_of(frame.code)[frame.lasti // 2])
    known: dict[int, tuple[Span, ...]] = {}
    for location in locations:
        function = location.holder
        if function is None or not location.targets:
            yield location
            continue
        if id(function.__code__) not in known:
            known[id(function.__code__)] = tuple(_unseen(function, ran.get(id(function.__code__), set())))
        *calls, (target, span) = location.targets
        spans = known[id(function.__code__)]
        yield replace(location, targets=(*calls, (target, replace(span, unseen=spans)))) if spans else location


def _unseen(function: FunctionType, ran: set[Any]) -> Iterator[Span]:
    first = function.__code__.co_firstlineno
    pending: list[ast.AST] = list(definition_of(function)[2].body)
    while pending:
        node = pending.pop()
        if isinstance(node, _SCOPES | ast.GeneratorExp):
            continue  # whose code is another one's
        pending += ast.iter_child_nodes(node)
        match node:
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                operands = left, right
            case ast.AugAssign(op=ast.Add(), target=ast.Name() as left, value=right):
                operands = left, right
            case _:
                continue
        at = (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset)
        if at not in ran and not any(map(_is_number, operands)):
            yield span_of(node, first)


def _is_number(operand: ast.expr) -> bool:
    """Whether an operand is seen to be no tensor: a constant, a size."""
    if isinstance(operand, _NUMBERS):
        return True
    names = {n.attr if isinstance(n, ast.Attribute) else n.id for n in _head(operand)}
    return not _SIZES.isdisjoint(names)


def _head(operand: Any) -> Iterator[ast.Attribute | ast.Name]:
    """What an expression is a part or a result of: `x.shape`, `len` of `len(x)`, `x.shape` of `x.shape[1] // 2`."""
    while True:
        match operand:
            case ast.Subscript(value=inner) | ast.Call(func=inner) | ast.BinOp(left=inner) | ast.UnaryOp(operand=inner):
                operand = inner
            case ast.Attribute():
                yield operand
                return
            case ast.Name():
                yield operand
                return
            case _:
                return
