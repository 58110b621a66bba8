"""Rewrite one expression of one function.

An addition is found in the source by the column positions that Python keeps for each instruction. The file is parsed,
and compiling it unchanged must give the very code object that runs; then the addition becomes a method call on the
module, the file is compiled again (never executed), and the one code object is bound to the function's own globals and
closure. So names, closures, `super()`, private names and line numbers stay what they were.
"""

from __future__ import annotations
import __future__

import ast
import copy
import hashlib
import importlib
import inspect
import linecache
import sys
import tokenize
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, wraps
from types import CodeType, FunctionType
from typing import Any, TypeVar

from torch import nn

from eulernet import _around
from eulernet._errors import EulernetError
from eulernet._trace import Addition, Frame

STEP, STEP_IN_PLACE, SCALE, FUNCTION = "_euler_step", "_euler_step_", "_euler_scale", "_euler_function_"
TAIL, TAIL_IN_PLACE, AHEAD, NORMED = "_euler_tail", "_euler_tail_", "_euler_ahead", "_euler_normed"
LATER, TIMES, NOW = "_euler_later", "_euler_times", "_euler_now"
T = TypeVar("T")
_RECEIVER = "_euler_self"  # the first parameter that a free function gets
_FLAGS = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)


class Unsupported(Exception):
    """An addition that cannot be rewritten; the reason."""


@dataclass(frozen=True, order=True)
class Span:
    """Where an expression stands: lines counted from the function's first one, columns in bytes."""

    line: int
    end_line: int
    column: int
    end_column: int
    # What stands around an addition, as `_around` finds it. Not compared: whether it is written out or not, what is
    # computed is the same.
    edits: tuple[tuple[str, Span], ...] = field(default=(), compare=False)
    ahead: str | None = field(default=None, compare=False)
    tail: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Target:
    """A function that holds an expression to rewrite.

    `owner` and `name` find it: the class (module, qualified name) and attribute, or a module and a qualified name for a
    free function, which becomes a method of the patched class. `path` leads through decorators' closures.
    """

    owner: tuple[str, str] | None
    name: str
    path: tuple[str, ...]
    digest: str


# The method first; in each the call of the next, in the last the addition.
Targets = tuple[tuple[Target, Span], ...]


@dataclass(frozen=True)
class Site:
    """Where an addition stands, and the calls of free functions that lead to it from a method of a module."""

    targets: Targets
    file: str
    position: tuple[int, int, int, int]  # line, last line, column, end column
    function: str

    @property
    def line(self) -> int:
        return self.position[0]


# ---- finding the expression


def locate(addition: Addition, skip_is_left: bool) -> tuple[nn.Module, Site]:
    """The place of an addition in the source, and the module whose method (or whose callee) holds it."""
    frames = addition.frames
    for i, frame in enumerate(frames):
        found = frame.module is not None and _method(type(frame.module), frame.code)
        if not found:
            continue
        assert frame.module is not None
        owner, name, path, function = found
        if "forward" in vars(frame.module) and name == "forward":
            raise Unsupported(
                f"{type(frame.module).__name__} has a forward of its own, set on the instance, which hides its "
                "class's; "
                "remove it (accelerate: remove_hook_from_module), patch, and set it again"
            )
        inner = [j for j in range(i) if _contains(frame.code, frames[j].code)]
        targets = []
        if inner:  # the addition stands in a function nested in the method
            if inner[0] != 0:
                raise Unsupported("it is made by a function that is called from a nested function")
            span = _span(frames[0], function)
        else:
            span = _span(frame, function)
        definition = _statement(function)[2]
        _check_receiver(definition, definition.args, function)
        targets.append((Target((owner.__module__, owner.__qualname__), name, path, digest(function)), span))
        if not inner:
            for j in range(i - 1, -1, -1):
                callee = _callee(frames[j + 1], function, frames[j], frame.module)
                function = callee
                target = Target(None, _address(callee), (), digest(callee))
                targets.append((target, _span(frames[j], callee)))
        _check(addition, function, targets[-1][1])
        if len(targets) == 1 and not inner:
            targets = [(targets[0][0], _with_surroundings(span, function, frame.module, skip_is_left))]
        code = frames[0].code
        return frame.module, Site(tuple(targets), code.co_filename, _position(frames[0]), code.co_qualname)
    if frames and frames[-1].module is not None:
        raise Unsupported(
            f"it is made by {frames[-1].code.co_qualname}, which is no method of the class "
            f"{type(frames[-1].module).__name__}: a forward set on the instance"
        )
    raise Unsupported(
        "it is not made by a method of a module, but by another function or a forward set on the instance"
    )


def nowhere(addition: Addition) -> tuple[nn.Module, Site]:
    """What is known of an addition whose source cannot be had."""
    code = addition.frames[0].code
    line = list(code.co_positions())[addition.frames[0].lasti // 2][0] or code.co_firstlineno
    module = next((f.module for f in addition.frames if f.module is not None), None)
    if module is None:
        raise Unsupported("it is not made by a method of a module")
    return module, Site((), code.co_filename, (line, line, 0, addition.frames[0].lasti), code.co_qualname)


def _method(cls: type, code: CodeType) -> tuple[type, str, tuple[str, ...], FunctionType] | None:
    """The class, attribute and decorators' cells that lead to the function that runs this code."""
    for owner in cls.__mro__:
        candidates = [code.co_name, *vars(owner)] if code.co_name in vars(owner) else vars(owner)
        for name in candidates:
            value = vars(owner)[name]
            if isinstance(value, FunctionType):
                for path, function in _wrapped(value):
                    if function.__code__ is code:
                        return owner, name, path, function
    return None


def _wrapped(function: FunctionType, depth: int = 6) -> Iterator[tuple[tuple[str, ...], FunctionType]]:
    """A function and those that its decorators keep in their closures."""
    yield (), function
    if depth:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:
                continue
            if isinstance(content, FunctionType):
                for path, inner in _wrapped(content, depth - 1):
                    yield (name, *path), inner


def _contains(outer: CodeType, inner: CodeType) -> bool:
    return any(c is inner or (isinstance(c, CodeType) and _contains(c, inner)) for c in outer.co_consts)


def _callee(caller: Frame, function: FunctionType, frame: Frame, module: nn.Module) -> FunctionType:
    """The plain function that `caller` calls by name and whose frame is `frame`."""
    node = _expression(function, _span(caller, function), (ast.Call,))
    value: Any = None
    match node:
        case ast.Call(func=ast.Name(id=name)):
            value = _lookup(function, name)
        case ast.Call(func=ast.Attribute(value=ast.Name(id=base), attr=attribute)):
            receiver = caller.code.co_varnames[0] if caller.code.co_argcount else None
            holder = type(module) if base == receiver and caller.module is module else _lookup(function, base)
            value = inspect.getattr_static(holder, attribute, None)
            value = value.__func__ if isinstance(value, staticmethod) else value
    if (
        not isinstance(value, FunctionType)
        or value.__code__ is not frame.code
        or free_function(_address(value)) is not value
    ):
        raise Unsupported(
            f"it is made by {frame.code.co_qualname}, which {function.__qualname__} does not call by name"
        )
    return value


def _address(function: FunctionType) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def free_function(address: str) -> FunctionType | None:
    """The function at `module:qualified.name`, None where there is none."""
    module, _, qualname = address.partition(":")
    value: Any = sys.modules.get(module) or importlib.import_module(module)
    for name in qualname.split("."):
        value = inspect.getattr_static(value, name, None)
    value = value.__func__ if isinstance(value, staticmethod) else value
    return value if isinstance(value, FunctionType) else None


def _lookup(function: FunctionType, name: str) -> Any:
    if name in function.__code__.co_freevars:
        return inspect.getclosurevars(function).nonlocals.get(name)
    return function.__globals__.get(name)


def _position(frame: Frame) -> tuple[int, int, int, int]:
    positions = list(frame.code.co_positions())[frame.lasti // 2]
    line, end_line, column, end_column = positions
    if line is None or end_line is None or column is None or end_column is None:
        raise EulernetError(
            f"{frame.code.co_filename}: {frame.code.co_qualname} was compiled without column positions, which tell one "
            "addition on a line from another. Run Python without -X no_debug_ranges and without "
            "PYTHONNODEBUGRANGES, and "
            "remove the cached .pyc files that were written with it."
        )
    return line, end_line, column, end_column


def _span(frame: Frame, function: FunctionType) -> Span:
    line, end_line, column, end_column = _position(frame)
    first = function.__code__.co_firstlineno
    return Span(line - first, end_line - first, column, end_column)


def _check(addition: Addition, function: FunctionType, span: Span) -> None:
    """The expression must be an addition, written in a form that can be rewritten."""
    node = _expression(function, span, (ast.BinOp, ast.AugAssign, ast.Call))
    _operands(node, function.__qualname__)


def _operands(node: ast.AST, where: str) -> tuple[ast.expr, ast.expr, list[ast.keyword]]:
    """Left and right operand of an addition, and its keywords (alpha)."""
    match node:
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub(), right=right):
            return left, right, []
        case ast.AugAssign(target=target, op=ast.Add() | ast.Sub(), value=value):
            return target, value, []
        case ast.Call(func=func, args=args, keywords=keywords):
            names = {k.arg: k.value for k in keywords}
            called = func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""
            plain = not any(isinstance(a, ast.Starred) for a in args) and None not in names and "out" not in names
            if plain and called.strip("_") in ("add", "sub", "subtract", "iadd", "isub"):
                rest = [k for k in keywords if k.arg == "alpha"]
                operands = [*args, *(names[n] for n in ("input", "other") if n in names)]
                if len(operands) == 1 and isinstance(func, ast.Attribute):
                    operands.insert(0, func.value)
                if len(operands) == 2 and len(operands) + len(rest) >= len(keywords):
                    return operands[0], operands[1], rest
    raise Unsupported(f"the addition in {where} is written in a form that is not supported: {ast.unparse(node)[:80]}")


# ---- what stands around it


def _with_surroundings(span: Span, function: FunctionType, module: nn.Module, skip_is_left: bool) -> Span:
    definition = _statement(function)[2]
    node = _expression(function, span, (ast.BinOp, ast.AugAssign, ast.Call))
    if not isinstance(node, ast.BinOp | ast.AugAssign) or not isinstance(node.op, ast.Add):
        return span
    left, right, _ = _operands(node, function.__qualname__)
    branch = right if skip_is_left else left
    found = _around.around(definition, node, branch, function.__code__, _receiver(definition.args), module)
    first = function.__code__.co_firstlineno
    edits = tuple((kind, _span_of(each, first)) for kind, each in found.edits)
    return replace(span, edits=edits, ahead=found.ahead, tail=found.tail)


def _span_of(node: ast.expr, first: int) -> Span:
    assert node.end_lineno is not None and node.end_col_offset is not None
    return Span(node.lineno - first, node.end_lineno - first, node.col_offset, node.end_col_offset)


# ---- the source


def _once_a_function(compute: Callable[[FunctionType], T]) -> Callable[[FunctionType], T]:
    """Keeps what was computed for a function, and does not keep the function alive."""
    kept: weakref.WeakKeyDictionary[FunctionType, T] = weakref.WeakKeyDictionary()

    @wraps(compute)
    def look_up(function: FunctionType) -> T:
        if function not in kept:
            kept[function] = compute(function)
        return kept[function]

    return look_up


@lru_cache(maxsize=64)
def _parse(filename: str, text: str) -> ast.Module:
    try:
        return ast.parse(text, filename)
    except (SyntaxError, ValueError):
        return ast.Module([], [])  # holds no function: the file is not what was imported


def _text(function: FunctionType) -> str:
    filename = function.__code__.co_filename
    linecache.checkcache(filename)
    text = "".join(linecache.getlines(filename, function.__globals__))
    if not text:
        raise EulernetError(
            f"{function.__module__}.{function.__qualname__} has no source ({filename}): eulernet rewrites the "
            "source of the "
            "addition. Define the model in a file and import it, or use eulernet.functional.euler_step in its forward."
        )
    return text


@_once_a_function
def digest(function: FunctionType) -> str:
    """Identifies the text of a function, so that a pickle notices another version of it."""
    lines = _text(function).splitlines()
    first = function.__code__.co_firstlineno - 1
    try:
        block = inspect.getblock([f"{line}\n" for line in lines[first:]])
    except (tokenize.TokenError, SyntaxError):
        block = []
    return hashlib.sha256("".join(block).encode()).hexdigest()[:16]


@_once_a_function
def _statement(function: FunctionType) -> tuple[ast.Module, ast.stmt, ast.FunctionDef]:
    """The file, the statement and the definition of a function, proven to be the source of the code that runs."""
    code = function.__code__
    tree = _parse(code.co_filename, _text(function))
    for statement in tree.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                if first == code.co_firstlineno and _compile(tree, statement, statement, function) == code:
                    return tree, statement, node
    rewritten = "@pytest_ar" in code.co_names or "@pytest_ar" in function.__globals__
    why = (
        "pytest rewrote the assertions of this file when it was imported; move the model to a module of its "
        "own, or call "
        "pytest with --assert=plain"
        if rewritten
        else "the file was changed after it was imported; import it anew (restart Python or the notebook's kernel)"
    )
    raise EulernetError(
        f"{code.co_filename}:{code.co_firstlineno}: the source of {code.co_qualname} is not what runs: {why}."
    )


def _compile(tree: ast.Module, old: ast.stmt, new: ast.stmt, function: FunctionType) -> CodeType | None:
    """The code of `function` in a statement of its file, `old` replaced by `new`, which is compiled and not executed.

    Of the rest of the file the compiler looks only at what is imported: an attribute of an import is loaded otherwise.
    """
    code = function.__code__
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    others = [s for s in tree.body if s is not old and not isinstance(s, definitions)]
    module = ast.Module([*others, new], [])
    compiled = compile(module, code.co_filename, "exec", code.co_flags & _FLAGS, dont_inherit=True)
    pending = [compiled]
    while pending:
        for constant in pending.pop().co_consts:
            if isinstance(constant, CodeType):
                if constant.co_qualname == code.co_qualname and constant.co_firstlineno == code.co_firstlineno:
                    return constant
                pending.append(constant)
    return None


def _expression(function: FunctionType, span: Span, kinds: tuple[type[ast.AST], ...]) -> ast.AST:
    """The expression (or augmented assignment) of a function that stands at a span."""
    first = function.__code__.co_firstlineno
    for node in ast.walk(_statement(function)[2]):
        if isinstance(node, kinds) and _at(node, span, first):
            return node
    raise Unsupported(f"line {span.line + first} of {function.__code__.co_filename} holds no addition at that column")


def _at(node: ast.AST, span: Span, first: int) -> bool:
    return (
        getattr(node, "lineno", None) == span.line + first
        and getattr(node, "end_lineno", None) == span.end_line + first
        and getattr(node, "col_offset", None) == span.column
        and getattr(node, "end_col_offset", None) == span.end_column
    )


# ---- changing it


def rewrite(function: FunctionType, edits: dict[Span, tuple[str, int]], free: bool) -> FunctionType:
    """The function with each addition ("step", place) made a step, each call ("call", k) led to a rewritten function.

    A `free` function gets the module as a first parameter of its own.
    """
    tree, statement, definition = _statement(function)
    copied = copy.deepcopy(statement)
    mine = next(
        n
        for n in ast.walk(copied)
        if isinstance(n, ast.FunctionDef) and n.name == definition.name and n.lineno == definition.lineno
    )
    first = function.__code__.co_firstlineno
    if free:
        receiver = _RECEIVER
        mine.args.posonlyargs.insert(0, ast.arg(receiver)) if mine.args.posonlyargs else mine.args.args.insert(
            0, ast.arg(receiver)
        )
    else:
        receiver = _receiver(mine.args)
    for span in edits:
        if span.tail:
            node = next(n for n in ast.walk(mine) if isinstance(n, ast.BinOp | ast.AugAssign) and _at(n, span, first))
            call, block, i = _around.tail(mine, node)
            if block and call is not None:  # two statements become the second one, around what the first one adds
                call.args = [node]  # type: ignore[list-item]
                del block[i]
    editor = _Editor(edits, function, receiver)
    mine.body = [editor.visit(node) for node in mine.body]
    code = _compile(tree, statement, ast.fix_missing_locations(copied), function)
    assert code is not None
    return _bind(function, code)


def _receiver(args: ast.arguments) -> str:
    first = [*args.posonlyargs, *args.args][:1]
    if not first:
        raise Unsupported("its method takes the module as part of *args")
    return first[0].arg


def _check_receiver(node: ast.FunctionDef, args: ast.arguments, function: FunctionType) -> None:
    receiver = _receiver(args)
    for inner in ast.walk(node):
        stored = isinstance(inner, ast.Name) and inner.id == receiver and isinstance(inner.ctx, ast.Store | ast.Del)
        shadowed = (
            isinstance(inner, ast.arguments)
            and inner is not node.args
            and any(a.arg == receiver for a in (*inner.posonlyargs, *inner.args, *inner.kwonlyargs))
        )
        if stored or shadowed:
            raise Unsupported(f"{function.__qualname__} gives its first argument {receiver!r} another meaning")


class _Editor(ast.NodeTransformer):
    def __init__(self, edits: dict[Span, tuple[str, int]], function: FunctionType, receiver: str) -> None:
        self.edits = edits
        self.function = function
        self.receiver = receiver
        self.first = function.__code__.co_firstlineno
        self.around = {at: (kind, place) for span, (_, place) in edits.items() for kind, at in span.edits}

    def visit(self, node: ast.AST) -> Any:
        match node:
            case ast.Call(args=[sum_]) if (edit := self._edit(sum_)) and edit[0].tail:
                return self._with_tail(node, sum_, edit[1][1])
            case ast.Assign(targets=[target], value=sum_) if (edit := self._edit(sum_)) and edit[0].ahead:
                return self._with_norm_ahead(node, target, sum_, edit[1][1], edit[0].ahead)
        edit = self._edit(node)
        self.generic_visit(node)
        if edit is None:
            return self._surrounding(node) if isinstance(node, ast.Call | ast.BinOp | ast.Name) else node
        _, (kind, index) = edit
        if kind == "call":
            assert isinstance(node, ast.Call)
            node.func = ast.copy_location(self._attribute(f"{FUNCTION}{index}"), node.func)
            return node
        left, right, keywords = _operands(node, self.function.__qualname__)
        in_place = isinstance(node, ast.AugAssign) or (isinstance(node, ast.Call) and self._is_in_place(node))
        if isinstance(node, ast.AugAssign) and not isinstance(node.target, ast.Name):
            node.value = ast.copy_location(self._call(SCALE, [node.value], index, []), node.value)
            return node
        if isinstance(node, ast.AugAssign):
            assert isinstance(left, ast.Name)
            call = self._call(STEP_IN_PLACE, [ast.Name(left.id, ast.Load()), right], index, [])
            return ast.copy_location(ast.Assign([left], ast.copy_location(call, node)), node)
        return ast.copy_location(self._call(STEP_IN_PLACE if in_place else STEP, [left, right], index, keywords), node)

    def _with_tail(self, call: ast.Call, node: ast.AST, index: int) -> ast.expr:
        """The activation or norm is handed over with the operands of the sum."""
        left, right, _ = _operands(node, self.function.__qualname__)
        left, right = self.visit(left), self.visit(right)
        if isinstance(node, ast.AugAssign):
            assert isinstance(left, ast.Name)
            left = ast.copy_location(ast.Name(left.id, ast.Load()), left)
        method = TAIL_IN_PLACE if isinstance(node, ast.AugAssign) else TAIL
        return ast.copy_location(self._call(method, [call.func, left, right], index, []), node)

    def _with_norm_ahead(self, node: ast.Assign, target: ast.expr, sum_: ast.AST, index: int, norm: str) -> ast.Assign:
        """A variable keeps what the norm makes of the sum until the norm is called."""
        left, right, _ = _operands(sum_, self.function.__qualname__)
        call = self._call(AHEAD, [ast.Constant(norm), self.visit(left), self.visit(right)], index, [])
        targets = ast.Tuple([target, ast.Name(_ahead(index), ast.Store())], ast.Store())
        assigned = ast.Assign([ast.copy_location(targets, target)], ast.copy_location(call, sum_))
        return ast.copy_location(assigned, node)

    def _surrounding(self, node: ast.Call | ast.BinOp | ast.Name) -> ast.expr:
        kind, index = self.around.get(_span_of(node, self.first), (None, 0))
        match kind, node:
            case _around.NOW, _:
                new = ast.Call(self._attribute(NOW), [node], [])
            case _around.LATER, ast.Call(func=func, args=[argument]):
                new = self._call(LATER, [func, argument], index, [])
            case _around.NORMED, ast.Call(func=func, args=[argument]):
                new = ast.Call(self._attribute(NORMED), [func, argument, ast.Name(_ahead(index), ast.Load())], [])
            case _, ast.BinOp(left=left, right=right) | ast.Call(func=ast.Attribute(value=left), args=[right]) if kind:
                first = ast.Constant(kind == _around.GAMMA_FIRST)
                new = self._call(TIMES, [left, right, first], index, [])
            case _:
                return node
        return ast.copy_location(new, node)

    def _edit(self, node: ast.AST) -> tuple[Span, tuple[str, int]] | None:
        if isinstance(node, ast.BinOp | ast.AugAssign | ast.Call):
            for span, edit in self.edits.items():
                if _at(node, span, self.first) and (edit[0] == "step" or isinstance(node, ast.Call)):
                    return span, edit
        return None

    @staticmethod
    def _is_in_place(node: ast.Call) -> bool:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        return (name.endswith("_") and not name.endswith("__")) or name.strip("_") in ("iadd", "isub")

    def _call(self, method: str, operands: list[ast.expr], index: int, keywords: list[ast.keyword]) -> ast.Call:
        return ast.Call(self._attribute(method), [*operands, ast.Constant(index)], keywords)

    def _attribute(self, name: str) -> ast.Attribute:
        return ast.Attribute(ast.Name(self.receiver, ast.Load()), name, ast.Load())


def _ahead(place: int) -> str:
    return f"_euler_ahead_{place}"


def _bind(function: FunctionType, code: CodeType) -> FunctionType:
    """A function like `function` that runs `code`."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    bound = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, tuple(cells[n] for n in code.co_freevars)
    )
    return _like(bound, function)


def _like(new: FunctionType, old: FunctionType) -> FunctionType:
    new.__kwdefaults__ = old.__kwdefaults__
    new.__annotations__ = old.__annotations__
    new.__qualname__ = old.__qualname__
    new.__module__ = old.__module__
    new.__doc__ = old.__doc__
    new.__dict__.update(old.__dict__)
    return new


def rebuild(
    wrapper: FunctionType, path: tuple[str, ...], change: Callable[[FunctionType], FunctionType]
) -> FunctionType:
    """A decorated function built anew around a changed inner one, which the cells named by `path` lead to."""
    if not path:
        return change(wrapper)
    cells = []
    for name, cell in zip(wrapper.__code__.co_freevars, wrapper.__closure__ or (), strict=True):
        if name == path[0]:
            old = cell.cell_contents
            new = rebuild(old, path[1:], change)
            cell = types.CellType(new)
        cells.append(cell)
    built = FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, tuple(cells))
    _like(built, wrapper)
    if getattr(wrapper, "__wrapped__", None) is old:
        built.__wrapped__ = new  # type: ignore[attr-defined]
    return built
