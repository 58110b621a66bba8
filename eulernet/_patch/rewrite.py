"""Rewrite one expression of one function.

An addition is found in the source by the column positions that Python keeps for each instruction. The file is parsed,
and compiling it unchanged must give the very code object that runs; then the addition becomes a method call on the
module, the file is compiled again (never executed), and the one code object is bound to the function's own globals and
closure. So names, closures, `super()`, private names and line numbers stay what they were.
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections import Counter
from collections.abc import Sequence
from types import FunctionType
from typing import Any

from eulernet._find.surroundings import epilogue
from eulernet._run.patched import (
    ADD_NORM,
    CALL_VIA,
    DEFER,
    DEFER_MUL,
    DIFFERENCE,
    EPILOGUE,
    EPILOGUE_IN_PLACE,
    FUNCTION,
    HOLD,
    MATERIALIZE,
    PROBE,
    SCALE,
    STEP,
    STEP_IN_PLACE,
    TAKE_GIVEN,
    TAKE_NORM,
    UNSEEN,
    UNSEEN_CALL,
    UNSEEN_IN_PLACE,
)
from eulernet._source import (
    TO_BE_SEEN,
    Span,
    bind,
    compiled,
    definition_of,
    operands_of,
    receiver_of,
    span_of,
    stands_at,
    without_variables,
)

_RECEIVER = "_euler_self"  # the first parameter that a free function gets


def rewrite(
    function: FunctionType, edits: dict[Span, tuple[str, int]], free: bool, slots: Sequence[int | None]
) -> FunctionType:
    """The function with each addition ("step", place) made a step, each call ("call", k) led to a rewritten function.

    ("via", k) is a call whose callee is asked for when it is called.

    A `free` function gets the module as a first parameter of its own. `slots` has the step's number for each place.
    """
    tree, statement, definition = definition_of(function)
    copied = copy.deepcopy(statement)
    mine = next(
        n
        for n in ast.walk(copied)
        if isinstance(n, ast.FunctionDef) and n.name == definition.name and n.lineno == definition.lineno
    )
    first = function.__code__.co_firstlineno
    if free:
        receiver = _RECEIVER
        if "__class__" in function.__code__.co_freevars:
            _name_super(mine)
        mine.args.posonlyargs.insert(0, ast.arg(receiver)) if mine.args.posonlyargs else mine.args.args.insert(
            0, ast.arg(receiver)
        )
    else:
        receiver = receiver_of(mine.args)
    for span in edits:
        if span.epilogue:
            node = next(
                n for n in ast.walk(mine) if isinstance(n, ast.BinOp | ast.AugAssign) and stands_at(n, span, first)
            )
            call, block, i = epilogue(mine, node)
            if block and call is not None:  # two statements become the second one, around what the first one adds
                call.args = [node]  # type: ignore[list-item]
                del block[i]
    for span, (_, place) in edits.items():
        if span.add_norm and not any(stands_at(sum_, span, first) for sum_ in _assigned(mine.body)):
            _unset(_normed_name(place), mine.body)  # the addition stands in an `if`
    keys = _keep_keys(mine, edits, first)
    held = _hold_factors(mine, edits, slots, receiver, first)
    editor = _Editor(edits, function, receiver, keys, held)
    visited = [editor.visit(node) for node in mine.body]
    mine.body = [s for result in visited for s in (result if isinstance(result, list) else [result])]
    code = compiled(tree, statement, ast.fix_missing_locations(copied), function)
    assert code is not None
    return bind(function, code)


def _name_super(definition: ast.FunctionDef) -> None:
    """`super()` means the first parameter, which is to be another one: it becomes `super(__class__, self)`."""
    parameters = [*definition.args.posonlyargs, *definition.args.args]
    scopes = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
    nested = [n for n in ast.walk(definition) if isinstance(n, scopes) and n is not definition]
    elsewhere = {id(n) for scope in nested for n in ast.walk(scope)}
    for node in ast.walk(definition) if parameters else ():
        match node:
            case ast.Call(ast.Name("super"), [], []) if id(node) not in elsewhere:
                names = (ast.Name(name, ast.Load()) for name in ("__class__", parameters[0].arg))
                node.args = [ast.copy_location(name, node.func) for name in names]


def _keep_keys(definition: ast.FunctionDef, edits: dict[Span, tuple[str, int]], first: int) -> dict[int, list[int]]:
    """The calls, by their ids, whose callee is a key, and the places that it is the key of.

    Calls of the same expression elsewhere, as in the other half of an `if`, are treated alike. The variable is None at
    the start of each run of the innermost loop (or function) that holds both, so that it is never an earlier one's;
    of the one around that, where the call stands behind the sum.
    """
    keys: dict[int, list[int]] = {}
    for span, (_, place) in edits.items():
        if span.key is None:
            continue
        nodes = list(ast.walk(definition))
        call = next(n for n in nodes if isinstance(n, ast.Call) and stands_at(n, span.key, first))
        sum_ = _sum_at(definition, span, first)
        bodies = [definition.body, *_loops(definition)]  # the outer ones first
        inside = [[n for statement in body for n in ast.walk(statement)] for body in bodies]
        around = [i for i, held in enumerate(inside) if call in held and sum_ in held]
        # What stands behind the sum made its branch in the run before.
        number = around[-2 if len(around) > 1 and _ends(sum_) <= (call.lineno, call.col_offset) else -1]
        elsewhere = {id(n) for scope in without_variables(definition) for n in ast.walk(scope)}
        for node in inside[number]:
            if isinstance(node, ast.Call) and id(node) not in elsewhere and ast.dump(node.func) == ast.dump(call.func):
                keys.setdefault(id(node), []).append(place)
        _unset(_key_name(place), bodies[number])
    return keys


def _ends(node: Any) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset


def _hold_factors(
    definition: ast.FunctionDef,
    edits: dict[Span, tuple[str, int]],
    slots: Sequence[int | None],
    receiver: str,
    first: int,
) -> dict[int, str]:
    """The places of steps that are added to more than once in the function, with the variable that holds their h.

    It is read where the function begins, so that whoever sets another h meanwhile has no part in the step.
    """
    steps = [(span, place) for span, (kind, place) in edits.items() if kind == "step" and span.key is None]
    spans = [(span, place) for span, place in steps if span.skip != TO_BE_SEEN]
    number = Counter(slots[place] for _, place in spans)
    looped = {id(n) for body in _loops(definition) for statement in body for n in ast.walk(statement)}
    held = {
        place: f"_euler_h_{slots[place]}"
        for span, place in spans
        if number[slots[place]] > 1 or id(_sum_at(definition, span, first)) in looped
    }
    for name, slot in {name: slots[place] for place, name in held.items()}.items():
        method = ast.Attribute(ast.Name(receiver, ast.Load()), HOLD, ast.Load())
        _begin(name, ast.Call(method, [ast.Constant(slot)], []), definition.body)
    return held


def _sum_at(definition: ast.FunctionDef, span: Span, first: int) -> ast.AST:
    sums = ast.BinOp | ast.AugAssign | ast.Call
    return next(n for n in ast.walk(definition) if isinstance(n, sums) and stands_at(n, span, first))


def _loops(definition: ast.FunctionDef) -> list[list[ast.stmt]]:
    return [n.body for n in ast.walk(definition) if isinstance(n, ast.For | ast.AsyncFor | ast.While)]


def _unset(name: str, body: list[ast.stmt]) -> None:
    """The variable is None at the start of these statements."""
    _begin(name, ast.Constant(None), body)


def _begin(name: str, value: ast.expr, body: list[ast.stmt]) -> None:
    """The variable has that value at the start of these statements, after a docstring."""
    at = 1 if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and len(body) > 1 else 0
    unset = ast.Assign([ast.Name(name, ast.Store())], value)
    line = body[at].lineno
    unset.lineno, unset.end_lineno, unset.col_offset, unset.end_col_offset = line, line, 0, 0
    body.insert(at, ast.fix_missing_locations(unset))


def _assigned(body: list[ast.stmt]) -> list[ast.BinOp]:
    return [s.value for s in body if isinstance(s, ast.Assign) and isinstance(s.value, ast.BinOp)]


_ADDING = ast.BinOp | ast.AugAssign | ast.Call


class _Editor(ast.NodeTransformer):
    def __init__(
        self,
        edits: dict[Span, tuple[str, int]],
        function: FunctionType,
        receiver: str,
        keys: dict[int, list[int]],
        held: dict[int, str],
    ) -> None:
        self.keys = keys
        keyed = {place: _key_name(place) for span, (_, place) in edits.items() if span.key is not None}
        self.variables = {**keyed, **held}  # which say what h an addition takes
        self.edits = edits
        self.skips = {span.skip: place for span, (_, place) in edits.items() if isinstance(span.skip, Span)}
        self.function = function
        self.receiver = receiver
        self.first = function.__code__.co_firstlineno
        self.unseen = {at for span in edits for at in span.unseen}
        parameters = inspect.signature(function, follow_wrapped=False).parameters if self.unseen else {}
        self.optional = {name for name, parameter in parameters.items() if parameter.default is None}
        self.around = {at: (kind, place) for span, (_, place) in edits.items() for kind, at in span.edits}

    def visit(self, node: ast.AST) -> Any:
        if self.skips and isinstance(node, ast.expr) and (at := span_of(node, self.first)) in self.skips:
            name = ast.Name(_skip_name(self.skips.pop(at)), ast.Store())  # evaluated once, where it was
            return ast.copy_location(ast.NamedExpr(name, self.visit(node)), node)
        whole = self._edit(node, by_difference=True)
        new = self._changed(node)
        return new if whole is None else self._by_difference(new, whole[0].skip, whole[1][1])

    def _changed(self, node: ast.AST) -> Any:
        match node:
            case ast.Call(args=[sum_]) if (edit := self._edit(sum_)) and edit[0].epilogue:
                return self._with_epilogue(node, sum_, edit[1][1])
            case ast.Assign(targets=[target], value=sum_) if (edit := self._edit(sum_)) and edit[0].add_norm:
                return self._with_add_norm(node, target, sum_, edit[1][1], edit[0].add_norm)
        edit = self._edit(node)
        self.generic_visit(node)
        if isinstance(node, ast.Call):
            for place in self.keys.get(id(node), ()):  # evaluated once, where it was, and kept until the addition
                kept = ast.NamedExpr(ast.Name(_key_name(place), ast.Store()), node.func)
                node.func = ast.copy_location(kept, node.func)
        if edit is None:
            if isinstance(node, _ADDING) and self.unseen and span_of(node, self.first) in self.unseen:
                return self._unseen(node)
            return self._surrounding(node) if isinstance(node, ast.expr) else node
        _, (kind, index) = edit
        if kind == "via":
            assert isinstance(node, ast.Call)
            call = ast.Call(self._attribute(CALL_VIA), [node.func, ast.Constant(index)], [])
            node.func = ast.copy_location(call, node.func)
            return node
        if kind == "call":
            assert isinstance(node, ast.Call)
            node.func = ast.copy_location(self._attribute(f"{FUNCTION}{index}"), node.func)
            return node
        left, right, keywords = operands_of(node, self.function.__qualname__)
        in_place = isinstance(node, ast.AugAssign) or (isinstance(node, ast.Call) and self._is_in_place(node))
        if isinstance(node, ast.AugAssign) and not isinstance(node.target, ast.Name):
            node.value = ast.copy_location(self._call(SCALE, [node.value], index, []), node.value)
            return node
        if isinstance(node, ast.AugAssign):
            assert isinstance(left, ast.Name)
            call = self._call(STEP_IN_PLACE, [ast.Name(left.id, ast.Load()), right], index, [])
            return ast.copy_location(ast.Assign([left], ast.copy_location(call, node)), node)
        return ast.copy_location(self._call(STEP_IN_PLACE if in_place else STEP, [left, right], index, keywords), node)

    def _unseen(self, node: ast.BinOp | ast.AugAssign | ast.Call) -> ast.AST:
        """An addition that tells when it runs."""
        if isinstance(node, ast.Call):
            func = self._attribute(UNSEEN_CALL)
            return ast.copy_location(ast.Call(func, [node.func, *node.args], node.keywords), node)
        left, right, _ = operands_of(node, self.function.__qualname__)
        given = [ast.Constant(isinstance(part, ast.Name) and part.id in self.optional) for part in (left, right)]
        if isinstance(node, ast.BinOp):
            minus = [ast.Constant(True)] if isinstance(node.op, ast.Sub) else []
            return ast.copy_location(ast.Call(self._attribute(UNSEEN), [left, right, *given, *minus], []), node)
        before = copy.deepcopy(node.target)
        before.ctx = ast.Load()
        node.value = ast.copy_location(
            ast.Call(self._attribute(UNSEEN_IN_PLACE), [before, node.value, *given], []), node.value
        )
        return node

    def _by_difference(self, node: Any, skip: str | Span | None, index: int) -> Any:
        """The expression gives the sum as it did, to a method that takes the skip as well."""
        if isinstance(node, ast.AugAssign):  # written into its target, which gets another value then
            if not isinstance(node.target, ast.Name):
                return node
            sum_ = ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target)
            if skip == TO_BE_SEEN:
                node = self._seen(node, index)
            target = ast.copy_location(ast.Name(node.target.id, ast.Store()), node.target)
            value = self._with_skip(sum_, skip, index)
            return [node, ast.copy_location(ast.Assign([target], value), node)]
        if skip == TO_BE_SEEN:
            node = self._seen(node, index)
        return self._with_skip(node, skip, index)

    def _with_skip(self, sum_: Any, skip: str | Span | None, index: int) -> ast.expr:
        if skip == TO_BE_SEEN:
            return ast.copy_location(self._call(PROBE, [sum_], index, []), sum_)
        held = ast.Name(skip if isinstance(skip, str) else _skip_name(index), ast.Load())
        return ast.copy_location(self._call(DIFFERENCE, [sum_, held], index, []), sum_)

    def _seen(self, node: Any, index: int) -> Any:
        """An expression whose operands and arguments are shown to the probe as they are evaluated."""

        def seen(part: Any) -> Any:
            plain = isinstance(part, ast.Name | ast.Constant | ast.Starred | ast.GeneratorExp)
            if plain or not hasattr(part, "lineno"):  # or of an expression inside that is shown as well
                return part
            span = span_of(part, self.first)
            if isinstance(part, ast.BinOp | ast.UnaryOp | ast.Call | ast.List | ast.Tuple):
                part = self._seen(part, index)
            at = ast.Tuple(
                [ast.Constant(n) for n in (span.line, span.end_line, span.column, span.end_column)], ast.Load()
            )
            return ast.copy_location(ast.Call(self._attribute(PROBE), [part, ast.Constant(index), at], []), part)

        match node:
            case ast.BinOp():
                node.left, node.right = seen(node.left), seen(node.right)
            case ast.AugAssign():
                node.value = seen(node.value)
            case ast.UnaryOp():
                node.operand = seen(node.operand)
            case ast.List() | ast.Tuple():
                node.elts = [seen(part) for part in node.elts]
            case ast.Call():
                node.args = [seen(part) for part in node.args]
                for keyword in node.keywords:
                    keyword.value = seen(keyword.value)
                if isinstance(node.func, ast.Attribute):
                    node.func.value = seen(node.func.value)
        return node

    def _with_epilogue(self, call: ast.Call, node: ast.AST, index: int) -> ast.expr:
        """The activation or norm is handed over with the operands of the sum."""
        left, right, _ = operands_of(node, self.function.__qualname__)
        left, right = self.visit(left), self.visit(right)
        if isinstance(node, ast.AugAssign):
            assert isinstance(left, ast.Name)
            left = ast.copy_location(ast.Name(left.id, ast.Load()), left)
        method = EPILOGUE_IN_PLACE if isinstance(node, ast.AugAssign) else EPILOGUE
        return ast.copy_location(self._call(method, [call.func, left, right], index, []), node)

    def _with_add_norm(self, node: ast.Assign, target: ast.expr, sum_: ast.AST, index: int, norm: str) -> ast.Assign:
        """A variable keeps what the norm makes of the sum until the norm is called."""
        left, right, _ = operands_of(sum_, self.function.__qualname__)
        call = self._call(ADD_NORM, [ast.Constant(norm), self.visit(left), self.visit(right)], index, [])
        targets = ast.Tuple([target, ast.Name(_normed_name(index), ast.Store())], ast.Store())
        assigned = ast.Assign([ast.copy_location(targets, target)], ast.copy_location(call, sum_))
        return ast.copy_location(assigned, node)

    def _surrounding(self, node: ast.expr) -> ast.expr:
        kind, index = self.around.get(span_of(node, self.first), (None, 0))
        match kind, node:
            case "materialize", _:
                new = ast.Call(self._attribute(MATERIALIZE), [node], [])
            case "defer", ast.Call(func=func, args=[argument]):
                new = self._call(DEFER, [func, argument], index, [])
            case "take norm", ast.Call(func=func, args=[argument]):
                new = ast.Call(
                    self._attribute(TAKE_NORM), [func, argument, ast.Name(_normed_name(index), ast.Load())], []
                )
            case "take given", ast.Call(func=func, args=[argument]):
                new = ast.Call(self._attribute(TAKE_GIVEN), [func, argument], [])
            case "forget norm", _:
                forgotten = ast.NamedExpr(ast.Name(_normed_name(index), ast.Store()), ast.Constant(None))
                always = ast.Compare(forgotten, [ast.Is()], [ast.Constant(None)])
                return ast.copy_location(ast.BoolOp(ast.And(), [node, always]), node)
            case _, ast.BinOp(left=left, right=right) | ast.Call(func=ast.Attribute(value=left), args=[right]) if kind:
                first = ast.Constant(kind == "gamma first")
                new = self._call(DEFER_MUL, [left, right, first], index, [])
            case _:
                return node
        return ast.copy_location(new, node)

    def _edit(self, node: ast.AST, by_difference: bool = False) -> tuple[Span, tuple[str, int]] | None:
        if isinstance(node, ast.BinOp | ast.AugAssign | ast.Call):
            for span, edit in self.edits.items():
                if (span.skip is not None) != by_difference or not stands_at(node, span, self.first):
                    continue
                if edit[0] == "step" or isinstance(node, ast.Call):
                    return span, edit
        return None

    @staticmethod
    def _is_in_place(node: ast.Call) -> bool:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        return (name.endswith("_") and not name.endswith("__")) or name.strip("_") in ("iadd", "isub")

    def _call(self, method: str, operands: list[ast.expr], index: int, keywords: list[ast.keyword]) -> ast.Call:
        if (variable := self.variables.get(index)) is not None:
            keywords = [*keywords, ast.keyword("key", ast.Name(variable, ast.Load()))]
        return ast.Call(self._attribute(method), [*operands, ast.Constant(index)], keywords)

    def _attribute(self, name: str) -> ast.Attribute:
        return ast.Attribute(ast.Name(self.receiver, ast.Load()), name, ast.Load())


def _skip_name(place: int) -> str:
    return f"_euler_skip_{place}"


def _key_name(place: int) -> str:
    return f"_euler_key_{place}"


def _normed_name(place: int) -> str:
    return f"_euler_normed_{place}"
