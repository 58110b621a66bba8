"""The source of a function, proven to be what runs, and functions compiled from a changed one."""

from __future__ import annotations
import __future__

import ast
import hashlib
import importlib
import inspect
import linecache
import sys
import tokenize
import types
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import lru_cache, partial, wraps
from types import CodeType, FunctionType
from typing import Any, TypeVar

from eulernet._errors import EulernetError

T = TypeVar("T")
_FLAGS = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)


_FORMER = {"ahead": "add_norm", "tail": "epilogue", "later": "defer", "now": "materialize", "normed": "take norm"}


class Unsupported(Exception):
    """An addition that cannot be rewritten; the reason."""


@dataclass(frozen=True, order=True)
class Span:
    """Where an expression stands: lines counted from the function's first one, columns in bytes."""

    line: int
    end_line: int
    column: int
    end_column: int
    # What stands around an addition, as `_find/surroundings.py` finds it. Not compared: whether it is written out or
    # not, what is computed is the same.
    edits: tuple[tuple[str, Span], ...] = field(default=(), compare=False)
    add_norm: str | None = field(default=None, compare=False)
    epilogue: bool = field(default=False, compare=False)
    given: str | None = field(default=None, compare=False)
    # The call, in the same function, of the module that makes the branch, where each such module has an h of its own.
    key: Span | None = None
    # Where the expression gives the sum and is not taken apart: the variable that holds the skip, or the operand.
    skip: str | Span | None = None
    # Additions of the same function that were not run when the step was found.
    unseen: tuple[Span, ...] = field(default=(), compare=False)
    # Of a call that leads to several functions with steps: the digests of them all.
    callees: tuple[str, ...] = field(default=(), compare=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pickles from before 0.1.0 have other words for the surroundings."""
        self.__dict__.update(
            {"key": None, "skip": None, **{_FORMER.get(name, name): value for name, value in state.items()}}
        )
        self.__dict__["edits"] = tuple((_FORMER.get(kind, kind), at) for kind, at in self.edits)


@dataclass(frozen=True)
class Target:
    """A function that holds an expression to rewrite.

    `owner` and `name` find it: the class (module, qualified name) and attribute, or a module and a qualified name for a
    free function, which becomes a method of the patched class. `path` leads through decorators' closures, and where an
    entry begins with `=` through the default of that keyword. What no name leads to is found when it is called: there
    `name` is VIA and, for messages, a qualified name.
    """

    owner: tuple[str, str] | None
    name: str
    path: tuple[str, ...]
    digest: str


VIA = "via "
TO_BE_SEEN = "?"  # as `Span.skip`: to see what an expression and its operands give

# The method first; in each the call of the next, in the last the addition.
Targets = tuple[tuple[Target, Span], ...]


def free_function(address: str, packages: Collection[str] = ()) -> FunctionType | None:
    """The function at `module:qualified.name`, None where there is none.

    A module that is not imported yet is imported only where it belongs to one of these packages.
    """
    module, _, qualname = address.partition(":")
    value: Any = sys.modules.get(module)
    if value is None and module.partition(".")[0] in packages:
        value = importlib.import_module(module)
    for name in qualname.split("."):
        value = inspect.getattr_static(value, name, None)
    value = value.__func__ if isinstance(value, staticmethod) else value
    return value if isinstance(value, FunctionType) else None


def address_of(function: FunctionType) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def stand_in(code: CodeType) -> FunctionType:
    """A function with this code, of which nobody knows the closure and the globals: to read its source only."""
    return _stand_in(code.co_filename, code)


@lru_cache(maxsize=256)
def _stand_in(filename: str, code: CodeType) -> FunctionType:
    function = FunctionType(code, {}, code.co_name, None, tuple(types.CellType() for _ in code.co_freevars))
    function.__qualname__ = code.co_qualname
    return function


def behind(callee: Any) -> tuple[FunctionType | None, tuple[Any, ...], dict[str, Any]]:
    """The function that a call of `callee` runs, and the arguments that come before and beside those of the call.

    Through partial objects, bound methods and objects with a `__call__`; None where that is no function in Python.
    """
    before: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    while type(callee) is not FunctionType:
        if type(callee) is partial:
            before, keywords = (*callee.args, *before), {**callee.keywords, **keywords}
            callee = callee.func
        elif type(callee) is types.MethodType:
            before, callee = (callee.__self__, *before), callee.__func__
        else:
            call = getattr(type(callee), "__call__", None)  # noqa: B004 (of the class, as Python looks it up)
            if type(call) is not FunctionType:
                return None, (), {}
            before, callee = (callee, *before), call
    return callee, before, keywords


def receiver_of(args: ast.arguments) -> str:
    first = [*args.posonlyargs, *args.args][:1]
    if not first:
        raise Unsupported("its method takes the module as part of *args")
    return first[0].arg


def operands_of(node: ast.AST, where: str) -> tuple[ast.expr, ast.expr, list[ast.keyword]]:
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
    raise Unsupported(
        f"the addition in {where} is compiled, or written in a form that is not supported: {ast.unparse(node)[:80]}"
    )


def positions_of(code: CodeType) -> list[Any]:
    """Where each instruction of a code object stands: line, last line, column, end column."""
    if code not in _positions:
        _positions[code] = list(code.co_positions())
    return _positions[code]


_positions: weakref.WeakKeyDictionary[CodeType, list[Any]] = weakref.WeakKeyDictionary()


def span_of(node: ast.expr | ast.stmt, first: int) -> Span:
    assert node.end_lineno is not None and node.end_col_offset is not None
    return Span(node.lineno - first, node.end_lineno - first, node.col_offset, node.end_col_offset)


def _once_a_function(compute: Callable[[FunctionType], T]) -> Callable[[FunctionType], T]:
    """Keeps what was computed for a function as long as it has its code, and keeps neither alive."""
    kept: weakref.WeakKeyDictionary[FunctionType, tuple[weakref.ref[CodeType], T]] = weakref.WeakKeyDictionary()

    @wraps(compute)
    def look_up(function: FunctionType) -> T:
        of, value = kept.get(function, (None, None))
        if of is None or of() is not function.__code__:  # IPython's autoreload gives a function other code
            kept[function] = weakref.ref(function.__code__), (value := compute(function))
        return value  # type: ignore[return-value]

    return look_up


@lru_cache(maxsize=64)
def _parse(filename: str, text: str) -> ast.Module:
    try:
        return ast.parse(text, filename)
    except (SyntaxError, ValueError):
        return ast.Module([], [])  # holds no function: the file is not what was imported


def text_of(function: FunctionType) -> str:
    filename = function.__code__.co_filename
    linecache.checkcache(filename)
    text = "".join(linecache.getlines(filename, function.__globals__))
    if not text:
        raise EulernetError(
            f"{function.__module__}.{function.__qualname__} has no source ({filename}): eulernet rewrites the source "
            "of the addition. Define the model in a file and import it (in a notebook, in a cell without %%time or "
            "another magic around the class), or use eulernet.functional.euler_step in its forward."
        )
    return text


@_once_a_function
def digest(function: FunctionType) -> str:
    """Identifies the text of a function, so that a pickle notices another version of it."""
    lines = text_of(function).splitlines()
    first = function.__code__.co_firstlineno - 1
    try:
        block = inspect.getblock([f"{line}\n" for line in lines[first:]])
    except (tokenize.TokenError, SyntaxError):
        block = []
    return hashlib.sha256("".join(block).encode()).hexdigest()[:16]


@_once_a_function
def definition_of(function: FunctionType) -> tuple[ast.Module, ast.stmt, ast.FunctionDef]:
    """The file, the statement and the definition of a function, proven to be the source of the code that runs."""
    code = function.__code__
    tree = _parse(code.co_filename, text_of(function))
    for statement in tree.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                if first == code.co_firstlineno and compiled(tree, statement, statement, function) == code:
                    return tree, statement, node
    where = f"{code.co_filename}:{code.co_firstlineno}"
    if code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        raise EulernetError(f"{where}: {code.co_qualname} is a coroutine; write the addition in a function with def.")
    rewritten = "@pytest_ar" in code.co_names or "@pytest_ar" in function.__globals__
    why = (
        "pytest rewrote the assertions of this file when it was imported; move the model to a module of its own, or "
        "call pytest with --assert=plain"
        if rewritten
        else "the file was changed after it was imported; import it anew (restart Python or the notebook's kernel)"
    )
    raise EulernetError(f"{where}: the source of {code.co_qualname} is not what runs: {why}.")


def compiled(tree: ast.Module, old: ast.stmt, new: ast.stmt, function: FunctionType) -> CodeType | None:
    """The code of `function` in a statement of its file, `old` replaced by `new`, which is compiled and not executed.

    Of the rest of the file the compiler looks only at what is imported: an attribute of an import is loaded otherwise.
    """
    code = function.__code__
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    others = [s for s in tree.body if s is not old and not isinstance(s, definitions)]
    module = ast.Module([*others, new], [])
    flags = code.co_flags & _FLAGS | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT  # the cell of a notebook may await
    compiled = compile(module, code.co_filename, "exec", flags, dont_inherit=True)
    pending = [compiled]
    while pending:
        for constant in pending.pop().co_consts:
            if isinstance(constant, CodeType):
                if constant.co_qualname == code.co_qualname and constant.co_firstlineno == code.co_firstlineno:
                    return constant
                pending.append(constant)
    return None


@lru_cache(maxsize=1024)
def nodes_of(tree: ast.AST) -> tuple[ast.AST, ...]:
    """All nodes of a tree that stays as it is."""
    return tuple(ast.walk(tree))


def expression_at(function: FunctionType, span: Span, kinds: tuple[type[ast.AST], ...]) -> ast.AST:
    """The expression (or augmented assignment) of a function that stands at a span."""
    first = function.__code__.co_firstlineno
    for node in nodes_of(definition_of(function)[2]):
        if isinstance(node, kinds) and stands_at(node, span, first):
            return node
    raise Unsupported(
        f"line {span.line + first} of {function.__code__.co_filename} holds no addition at that column; where it was "
        "changed since it was imported (also by %autoreload), import it anew, in a new process or kernel"
    )


def without_variables(definition: ast.FunctionDef) -> list[ast.AST]:
    """What in a function cannot set a variable of it by `:=`: nested functions, and what a comprehension runs over."""
    nested = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    nodes = nodes_of(definition)
    found: list[ast.AST] = [n for n in nodes if isinstance(n, nested) and n is not definition]
    return found + [n.iter for n in nodes if isinstance(n, ast.comprehension)]


def stands_at(node: ast.AST, span: Span, first: int) -> bool:
    return (
        getattr(node, "lineno", None) == span.line + first
        and getattr(node, "end_lineno", None) == span.end_line + first
        and getattr(node, "col_offset", None) == span.column
        and getattr(node, "end_col_offset", None) == span.end_column
    )


def bind(function: FunctionType, code: CodeType) -> FunctionType:
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
    if path[0].startswith("="):
        old = (wrapper.__kwdefaults__ or {})[path[0][1:]]
        new = rebuild(old, path[1:], change)
        built = bind(wrapper, wrapper.__code__)
        built.__kwdefaults__ = {**(wrapper.__kwdefaults__ or {}), path[0][1:]: new}
        if getattr(wrapper, "__wrapped__", None) is old:
            built.__wrapped__ = new  # type: ignore[attr-defined]
        return built
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
