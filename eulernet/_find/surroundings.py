"""Where in the source of a method that stands which a step may do as well.

Before the addition: LayerScale, drop path and batch norm, called in the expression of the branch or in the statements
that lead to it. After it: the activation or the norm of the sum. Whether they are fused is decided at each call, by
`eulernet._run.fuse`. Here two things must be right: where a name may hold a deferred branch, it is materialized; and
nothing is deferred whose input could be written into until the addition, by another name that it has.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from itertools import pairwise
from types import CodeType
from typing import Any, Literal

from torch import Tensor, nn

from eulernet._run import known
from eulernet._source import nodes_of

# What an expression is: a module's call or a product with gamma, which can be deferred; a name that is read where
# its branch may be deferred; the call of a norm or an activation that takes what was computed together with the sum;
# the test of an `if` before that call, which forgets it where it is true; the call of a norm that takes what the
# method was given, of which the block before may have computed it.
EditKind = Literal["defer", "gamma first", "gamma last", "materialize", "take norm", "forget norm", "take given"]
Edit = tuple[EditKind, ast.expr]

_SIMPLE = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr)
# Where none of these is, what runs after what is plain to see.
_INVOLVED = (
    *(ast.For, ast.While, ast.AsyncFor, ast.Try, ast.TryStar, ast.With, ast.AsyncWith, ast.Match),
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.GeneratorExp, ast.Delete),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.NamedExpr, ast.Yield, ast.YieldFrom, ast.Await),
)
_READ_ALL_NAMES = frozenset({"locals", "vars", "eval", "exec"})


@dataclass
class Surroundings:
    """What to do with which expressions; the norm that is called next; whether the sum is an activation's or norm's;
    the norm that is called first, with what the method was given."""

    edits: list[Edit] = field(default_factory=list)
    add_norm: str | None = None
    epilogue: bool = False
    given: str | None = None


def surroundings(
    definition: ast.FunctionDef, addition: ast.AST, branch: ast.expr, code: CodeType, receiver: str, module: nn.Module
) -> Surroundings:
    """What stands around an addition in a method of a module, whose operand `branch` is scaled."""
    method = _Method(definition, code, receiver, module)
    found = Surroundings(epilogue=known.after(method.called(epilogue(definition, addition)[0])))
    found.edits, operand = method.chain(branch)
    block, i, plainly = _standing(definition, addition)
    calls = [node for node in nodes_of(addition) if isinstance(node, ast.Call)]
    others = [call for call in calls if not any(call is node for node in nodes_of(branch))]  # of the other operand
    if isinstance(operand, ast.Name):
        alone = len(_names(addition, operand.id, ast.Load)) == 1 and _alone(operand.id, _before(definition, block[i]))
        if found.edits and any(_start(call) > _start(branch) for call in others) and not alone:
            found.edits = []
        elif plainly:
            found.edits += method.statements(operand, block, i, calm=not others)
    match block[i]:
        case ast.Assign(targets=[ast.Name(id=name)], value=value) if value is addition and not found.epilogue:
            call, tests = method.norm_of(name, block[i + 1 :])
            call = call or method.activation_after(name, block, i)
            if call is not None and isinstance(call.func, ast.Attribute):
                found.add_norm = call.func.attr
                found.edits += [("take norm", call), *(("forget norm", test) for test in tests)]
    if (first := method.norm_of_argument()) is not None and isinstance(first.func, ast.Attribute):
        found.given = first.func.attr
        found.edits.append(("take given", first))
    return found


def epilogue(definition: ast.AST, node: ast.AST) -> tuple[ast.Call | None, list[ast.stmt], int]:
    """The call that takes a sum: it stands around it or is the next statement, `x += y; x = f(x)`.

    In the latter case also the block of statements and where in it the two stand.
    """
    for parent in nodes_of(definition):
        if isinstance(parent, ast.Call) and parent.args == [node]:
            return parent, [], 0
        for block in _blocks(parent):
            for i, (first, second) in enumerate(pairwise(block)):
                match first:
                    case ast.AugAssign(target=ast.Name(id=name)) if first is node:
                        pass
                    case ast.Assign(targets=[ast.Name(id=name)], value=value) if value is node:
                        pass
                    case _:
                        continue
                match second:
                    case ast.Assign(targets=[ast.Name(id=to)], value=ast.Call(args=[ast.Name(id=of)]) as call):
                        if to == of == name:
                            return call, block, i
                    case ast.Return(value=ast.Call(args=[ast.Name(id=of)]) as call) if of == name:
                        return call, block, i
    return None, [], 0


@dataclass(frozen=True)
class _Method:
    definition: ast.FunctionDef
    code: CodeType
    receiver: str
    module: nn.Module

    def called(self, node: ast.AST | None) -> Any:
        """The submodule that an expression calls with one argument, `self.name(argument)`; `...` if it calls none."""
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=attribute), args=[argument], keywords=[]):
                if name == self.receiver and not isinstance(argument, ast.Starred):
                    return getattr(self.module, attribute, ...)
        return ...

    def can_be_deferred(self, node: ast.AST) -> bool:
        """Whether an expression calls a module that a step knows, or one that only other modules of this class have."""
        module = self.called(node)
        return module is None or known.before(module) is not None

    def gamma(self, node: ast.AST) -> bool:
        """Whether an expression is a vector of the module, `self.gamma` or `self.gamma.reshape(1, -1, 1, 1)`."""
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name == self.receiver:
                value = getattr(self.module, attribute, None)
                return isinstance(value, Tensor) and sum(n != 1 for n in value.shape) == 1
            case ast.Call(func=ast.Attribute(value=value, attr="reshape" | "view"), keywords=[]):
                return self.gamma(value)
        return False

    def chain(self, node: ast.expr) -> tuple[list[Edit], ast.expr]:
        """The modules and gammas that are applied to an expression, the last one first, and that expression."""
        match node:
            case ast.Call(args=[inner]) if self.can_be_deferred(node):
                kind: EditKind = "defer"
            case ast.BinOp(left=gamma, op=ast.Mult(), right=inner) if self.gamma(gamma):
                kind = "gamma first"
            case ast.BinOp(left=inner, op=ast.Mult(), right=gamma) if self.gamma(gamma):
                kind = "gamma last"
            case ast.Call(func=ast.Attribute(value=inner, attr="mul"), args=[gamma], keywords=[]) if self.gamma(gamma):
                kind = "gamma last"
            case _:
                return [], node
        edits, innermost = self.chain(inner)
        return [(kind, node), *edits], innermost

    def statements(self, operand: ast.Name, block: list[ast.stmt], i: int, calm: bool) -> list[Edit]:
        """What is applied to a name in the statements before the one that adds it, and where else it is read.

        `calm`: that one calls nothing before the addition.
        """
        name, last = operand.id, block[i]
        if name not in self.code.co_varnames or name in self.code.co_cellvars:
            return []
        if not (_READ_ALL_NAMES.isdisjoint(self.code.co_names) and _plain(last) and self._is_last(name, last)):
            return []
        # Backwards from the addition, as long as the name holds the same branch: `y = bn(y)` before `x + y` is
        # deferred, and what was assigned before that may be deferred in turn.
        edits: list[Edit] = []
        stay: list[ast.expr] = [operand]  # where a branch is read that may stay deferred
        before = block[:i] if self._is_augmented(name, last) else _before(self.definition, last)
        outside = len(before) - i  # so many of them stand before an `if` that the addition stands in
        begin = len(before)
        for j in reversed(range(len(before))):
            statement = before[j]
            if not (isinstance(statement, ast.Assign | ast.AugAssign | ast.Expr | ast.If) and _plain(statement, name)):
                break
            nested = isinstance(statement, ast.If)
            blocks: list[list[ast.stmt]] = _blocks(statement) if nested else [[statement]]
            assignments = [_assignments(each, name) for each in blocks]
            if any(len(each) > 1 for each in assignments):
                break
            # An `if` has two ways through it, of which each may assign once, or leave the name what it was.
            old = nested or not any(assignments)  # whether after it the name may hold what it held before it
            for inner, each in zip(blocks, assignments, strict=True):
                match each:
                    case [ast.Assign(targets=[ast.Name()], value=value) as assignment]:
                        found, innermost = self.chain(value)
                        same = isinstance(innermost, ast.Name) and innermost.id == name
                        at_once = calm and outside <= j == len(before) - 1 and inner[-1] is assignment
                        alone = at_once or (same and _alone(name, _before(self.definition, assignment)))
                        if isinstance(innermost, ast.Name) and not alone:
                            continue  # until the addition others may write into what this name holds
                        if found:
                            edits, begin = edits + found, j
                        if found and same:
                            stay.append(innermost)
                            old = True
            if not old:
                break
        # Whoever else reads the name from the first deferred call on gets the tensor.
        if edits:
            reads = [read for statement in (*before[begin:], last) for read in _names(statement, name, ast.Load)]
            if begin < outside:  # the other way too, and what runs after it
                first = _start(before[begin])
                reads = [read for read in _names(self.definition, name, ast.Load) if _start(read) >= first]
            edits += [("materialize", read) for read in reads if not any(read is each for each in stay)]
        return edits

    def _is_augmented(self, name: str, last: ast.stmt) -> bool:
        """Whether another statement than this one augments the name, `x += y`."""
        nodes = [node for node in nodes_of(self.definition) if isinstance(node, ast.AugAssign) and node is not last]
        return any(_names(node.target, name, ast.Store) for node in nodes)

    def _is_last(self, name: str, statement: ast.stmt) -> bool:
        """Whether nothing that runs after a statement reads what the name held before it."""
        match statement:
            case ast.Return():
                return True
            case ast.AugAssign(target=ast.Name(id=target)) | ast.Assign(targets=[ast.Name(id=target)]):
                if target == name:
                    return True
        end = statement.end_lineno or 0, statement.end_col_offset or 0
        return all((read.lineno, read.col_offset) < end for read in _names(self.definition, name, ast.Load))

    def norm_of(self, name: str, following: list[ast.stmt]) -> tuple[ast.Call | None, list[ast.expr]]:
        """The call of a norm with what a name holds, `self.norm(x)`, if it is the next thing to be called.

        Before it the name may get another shape, and there may be an `if` with one way, whose test is given too. It
        may stand in an `if` of its own, which the module takes as it is now.
        """
        tests: list[ast.expr] = []
        for statement in following:
            match statement:
                case ast.Assign(targets=[ast.Name(id=target)], value=value) if target != name and _calls_nothing(value):
                    continue  # `residual = x`, `shape = x.shape`
                case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name and _reshapes(
                    value, name
                ):
                    continue  # `x = x.reshape(batch, -1, channels)`
                case ast.If(test=ast.Attribute(value=ast.Name(id=of), attr=flag), body=body) if (
                    of == self.receiver and getattr(self.module, flag, None) is True
                ):
                    call, inner = self.norm_of(name, body)
                    return call, tests + inner
                case ast.If(test=test, orelse=[]) if _calls_nothing(test) and _plain(test):
                    tests.append(test)
                    continue
            if isinstance(statement, _SIMPLE) and _plain(statement):
                call = _first_call(statement)
                match call:
                    case ast.Call(args=[ast.Name(id=given)]) if given == name and known.norm(self.called(call)):
                        return call, tests
            break
        return None, []

    def norm_of_argument(self) -> ast.Call | None:
        """The first call of a norm with an argument of the method as it was given."""
        arguments = self.definition.args
        given = {argument.arg for argument in (*arguments.posonlyargs, *arguments.args)} - {self.receiver}
        for statement in self.definition.body:
            nodes = nodes_of(statement) if _plain(statement) else ()
            for call in sorted((node for node in nodes if isinstance(node, ast.Call)), key=_start):
                match call.args:
                    case [ast.Name(id=name)] if name in given and known.norm(self.called(call)):
                        return call
            stored = (node for node in nodes_of(statement) if isinstance(node, ast.Name))
            given -= {node.id for node in stored if isinstance(node.ctx, ast.Store)}
        return None

    def activation_after(self, name: str, block: list[ast.stmt], i: int) -> ast.Call | None:
        """The activation of a sum that is the last thing in an `if`: the next statement, `x = self.act(x)`."""
        for outer in (each for node in nodes_of(self.definition) for each in _blocks(node)):
            for choice, statement in pairwise(outer):
                if (
                    isinstance(choice, ast.If)
                    and any(each is block for each in _blocks(choice))
                    and i + 1 == len(block)
                ):
                    match statement:
                        case ast.Assign(targets=[ast.Name(id=target)], value=call) if target == name:
                            pass
                        case ast.Return(value=call):
                            pass
                        case _:
                            return None
                    match call:
                        case ast.Call(args=[ast.Name(id=given)]) if given == name and known.activation(
                            self.called(call)
                        ):
                            return call
        return None


def _alone(name: str, statements: list[ast.stmt]) -> bool:
    """Whether after these statements a name holds the result of an expression that no statement has read since."""
    for n in reversed(range(len(statements))):
        match statements[n]:
            case ast.Assign(targets=[ast.Name(id=target)], value=ast.Call() | ast.BinOp()) if target == name:
                return True
            case ast.If(test=test, body=body, orelse=orelse) as choice if _assignments([choice], name):
                ways = [statements[:n] + way for way in (body, orelse)]
                return not _names(test, name, ast.Load) and all(_alone(name, way) for way in ways)
            case statement if any(isinstance(node, ast.Name) and node.id == name for node in nodes_of(statement)):
                return False
    return False


def _before(node: ast.AST, statement: ast.stmt) -> list[ast.stmt]:
    """The statements that run before one that stands in a node, as far as only `if`s lead from them to it."""
    for block in _blocks(node):
        for n, each in enumerate(block):
            if each is statement:
                return block[:n]
            if any(inner is statement for inner in nodes_of(each)):
                return (block[:n] if isinstance(each, ast.If) else []) + _before(each, statement)
    return []


def _start(node: ast.AST) -> tuple[int, int]:
    return getattr(node, "lineno", 0), getattr(node, "col_offset", 0)


def _first_call(node: ast.AST) -> ast.Call | None:
    """The call that is evaluated first, None where it depends on something."""
    if isinstance(node, ast.IfExp | ast.BoolOp):
        return None
    for child in ast.iter_child_nodes(node):
        if any(isinstance(each, ast.Call) for each in nodes_of(child)):
            return _first_call(child)
    return node if isinstance(node, ast.Call) else None


def _calls_nothing(node: ast.AST) -> bool:
    return not any(isinstance(each, ast.Call) for each in nodes_of(node))


def _reshapes(node: ast.expr, name: str) -> bool:
    """Whether an expression is what a name holds in another shape."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id=of), attr="reshape" | "view" | "flatten"), keywords=[]):
            return of == name and all(_is_size(argument) for argument in node.args) and _plain(node)
    return False


def _is_size(node: ast.expr) -> bool:
    """Whether an expression calls nothing but `x.size(...)`."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(), attr="size"), args=args, keywords=[]):
            return all(map(_calls_nothing, args))
    return _calls_nothing(node)


def _blocks(node: ast.AST) -> list[list[ast.stmt]]:
    given: list[Any] = [getattr(node, name, None) for name in ("body", "orelse", "finalbody")]
    return [block for block in given if isinstance(block, list)]


def _standing(definition: ast.AST, node: ast.AST) -> tuple[list[ast.stmt], int, bool]:
    """The innermost block that holds an expression, where in it its statement is, and whether only `if`s lead there."""
    for block in _blocks(definition):
        for i, statement in enumerate(block):
            if any(each is node for each in nodes_of(statement)):
                inner, j, plainly = _standing(statement, node)
                if inner:
                    return inner, j, plainly and isinstance(statement, ast.If)
                return block, i, isinstance(statement, _SIMPLE)
    return [], 0, False


def _plain(statement: ast.AST, name: str | None = None) -> bool:
    """Whether it is plain to see what a statement reads and sets, and it does not augment the name."""
    for node in nodes_of(statement):
        match node:
            case ast.AugAssign(target=ast.Name(id=target)) if target == name:
                return False
        if isinstance(node, _INVOLVED):
            return False
    return True


def _assignments(block: list[ast.stmt], name: str) -> list[ast.Assign]:
    """Those that set a name."""
    nodes = [node for statement in block for node in nodes_of(statement) if isinstance(node, ast.Assign)]
    return [node for node in nodes if any(_names(target, name, ast.Store) for target in node.targets)]


def _names(tree: ast.AST, name: str, context: type[ast.expr_context]) -> list[ast.Name]:
    nodes = [node for node in nodes_of(tree) if isinstance(node, ast.Name)]
    return [node for node in nodes if node.id == name and isinstance(node.ctx, context)]
