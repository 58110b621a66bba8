"""Additions that the example does not run, in a function that holds a step: what they add is not known.

The patched function says so where one of them runs after all (`Patched._euler_unseen`), so that none is left at h = 1
in silence: behind another `if`, in another mode, with a cache.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from eulernet._find.locate import Location
from eulernet._find.trace import Trace
from eulernet._source import Span, Unsupported, definition_of, operands_of, positions_of, span_of

_SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_NUMBERS = ast.Constant | ast.JoinedStr | ast.Tuple | ast.List | ast.Dict | ast.Compare
_PLAIN = ast.Name | ast.Attribute | ast.Subscript | ast.Slice | ast.Tuple | ast.Constant | ast.expr_context
_FUSED = frozenset("lerp addcmul baddbmm".split())
_SIZES = frozenset("shape size ndim dim len numel stride dtype device int float range".split())


def with_unseen(
    places: Iterable[tuple[nn.Module, Location]], traces: Iterable[tuple[Trace, Mapping[nn.Module, nn.Module]]]
) -> Iterator[Location]:
    """The places of steps, each with the additions of its function that its module has made in no run.

    Args:
        places: each with the module that makes the addition.
        traces: each with the modules of the copy that ran, and the model's for them.
    """
    ran: dict[tuple[int, nn.Module | None], set[Any]] = {}
    for addition, originals in ((a, of) for trace, of in traces for a in trace.additions):
        module: nn.Module | None = None
        for frame in reversed(addition.frames):  # from the module's method inwards, to functions that it calls
            module = originals.get(frame.module, module) if frame.module is not None else module
            ran.setdefault((id(frame.code), module), set()).add(positions_of(frame.code)[frame.lasti // 2])
    known: dict[tuple[int, nn.Module], tuple[Span, ...]] = {}
    for module, location in places:
        function = location.holder
        if function is None or not location.targets:
            yield location
            continue
        key = id(function.__code__), module
        if key not in known:
            here = set().union(*(ran.get((id(code), module), ()) for code in _codes(function.__code__)))
            known[key] = tuple(_unseen(function, here))
        *calls, (target, span) = location.targets
        spans = known[key]
        yield replace(location, targets=(*calls, (target, replace(span, unseen=spans)))) if spans else location


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of its lambdas and comprehensions."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _unseen(function: FunctionType, ran: set[Any]) -> Iterator[Span]:
    first = function.__code__.co_firstlineno
    pending: list[ast.AST] = list(definition_of(function)[2].body)
    while pending:
        node = pending.pop()
        if isinstance(node, _SCOPES):
            continue  # whose code is another one's
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.expr | ast.stmt) and _adds(node):
            at = (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset)
            if at not in ran:
                yield span_of(node, first)


def _adds(node: ast.AST) -> bool:
    """Whether it may add two tensors, and can be told of when it does."""
    match node:
        case ast.Call(func=ast.Name(id="sum")) | ast.Call(args=[_, _, *_]) if (
            _called(node) in {"sum", "reduce"} | _FUSED
        ):
            return True
        case ast.AugAssign(target=target) if not all(isinstance(n, _PLAIN) for n in ast.walk(target)):
            return False  # to be evaluated twice
        case ast.BinOp() | ast.AugAssign() | ast.Call():
            try:
                left, right, _ = operands_of(node, "")
            except Unsupported:
                return False
            return not (_is_number(left) or _is_number(right))
    return False


def _called(call: ast.Call) -> str:
    return next((n.attr if isinstance(n, ast.Attribute) else n.id for n in _head(call.func)), "")


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
