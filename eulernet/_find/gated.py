"""Gated updates: `(1 - z) * n + z * s`, `s + z * (n - s)`, `n + z * (s - n)`, `lerp`: one function in four spellings.

`s` is the state, `n` (or `z` alone) was computed from it, `z` is the gate. Such an update says itself how far it goes,
so it is left alone unless it is asked for; then it becomes `s + h * (what it was - s)`. A cell such as `nn.GRUCell` is
one as well, and so is `a * s + b * n` with a sigmoid for each of both. Where `z` is a number the update goes a fixed
part of the way, and is a step like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from eulernet._find.graph import Graph, MatchKind, StepCall
from eulernet._find.operations import CASTS, VIEWS
from eulernet._find.trace import CELLS, Addition, Node, Ref, Trace

_PRODUCTS = frozenset("mul multiply rmul imul".split())
_SUMS = frozenset("add radd iadd".split())
_DIFFERENCES = frozenset("sub subtract isub".split())
_PLAIN = _SUMS | _DIFFERENCES
_ONES = frozenset("ones ones_like new_ones".split())


class _Update(NamedTuple):
    """Two tensors, state and candidate in either order, and how far it goes from the one to the other."""

    one: int
    other: int
    gate: int | None  # None: a number
    inner: int | None = None  # the difference of the two
    plain: int | None = None  # the one that the rest is added to
    apart: bool = False  # gates of their own for both


def gated(graph: Graph, trace: Trace) -> tuple[dict[int, StepCall | None], set[int]]:
    """The gated updates of a run, by the node of their result, and the differences in them, no sums of their own.

    None where something is gated that is no update of a state, as where two siblings are mixed.
    """
    found: dict[int, StepCall | None] = {}
    inner: set[int] = set()
    for addition in trace.additions:
        if addition.op in CELLS:
            cell = {addition.result}
            found[addition.result] = StepCall(
                addition, "gated", addition.left, addition.result, True, addition.left, cell, mixture=True
            )
            continue
        for update in _updates(graph, addition):
            step_call = _step_call(graph, addition, update)
            if step_call is None and (update.gate is None or update.apart):
                continue  # the other rules see more
            found[addition.result] = step_call
            inner |= {update.inner} if update.inner is not None else set()
            if step_call is not None and update.gate is not None and graph.constant[update.gate]:
                inner.update(_of_coupling(graph, trace, step_call))
            break
    return found, inner


def _of_coupling(graph: Graph, trace: Trace, update: StepCall) -> Iterator[int]:
    """The sums that add to a state what was made of it behind a mask alone, in an update that a mask divides: a flow's.

    The mask takes one part of the state for what is done to the other.
    """
    masked = {n for n in graph.readers.get(update.state, ()) if graph.is_diagonal(n)}
    for addition in trace.additions:
        if addition.result in update.within and len(addition.right) == 1:
            for one, other in ((addition.left, addition.right[0]), (addition.right[0], addition.left)):
                made_of = graph.ancestors(other, 0, update.state, without=masked)
                if update.state in graph.same(one, 0) and update.state not in made_of:
                    yield addition.result


def _step_call(graph: Graph, addition: Addition, update: _Update) -> StepCall | None:
    """The update as a step; None where neither is the state of the other."""
    shape = graph.nodes[addition.result].shape
    both = (update.one, update.other), (update.other, update.one)
    pairs = [(state, candidate) for state, candidate in both if graph.nodes[state].shape == shape]
    ways = [(skip, candidate, state) for skip, candidate in pairs for state in _leading(graph, skip, candidate)]
    if not ways and update.gate is not None:  # the gate alone knows of the state
        ways = [(skip, update.gate, state) for skip, _ in pairs for state in _leading(graph, skip, update.gate)]
    if len(ways) != 1:
        return None
    ((skip, branch, state),) = ways
    direct = skip == update.plain and addition.op in _PLAIN  # s + z (n - s): the branch is at hand
    if direct:
        branch = addition.right[0] if skip == addition.left else addition.left
    within = set(graph.path(state, branch, graph.ancestors(branch, 0, state))) - {state}
    kind: MatchKind = "identity" if update.gate is None else "gated"
    return StepCall(addition, kind, skip, branch, skip == addition.left, state, within, mixture=not direct)


def _leading(graph: Graph, skip: int, node: int) -> list[int]:
    """What a skip is a view, cast, copy or norm of, and a node was computed from by a map: the first such state."""
    for state in graph.raw(skip, by_hand=True):
        if state < node and graph.mixes(graph.path(state, node, graph.ancestors(node, 0, state)), state):
            return [state]
    return []


def _updates(graph: Graph, addition: Addition) -> Iterator[_Update]:
    node = graph.nodes[addition.result]
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("value", 1) != 1:
        return
    if addition.op == "lerp" and len(addition.right) in (1, 2):
        gate = addition.right[1] if len(addition.right) == 2 else None
        if gate is None or _is_gate(graph, gate):
            yield _Update(addition.left, addition.right[0], gate, plain=addition.left)
    elif addition.op == "addcmul" and len(addition.right) == 2:
        a, b = addition.right
        yield from _of_two(graph, addition.left, [(a, b), (b, a)])
    elif len(addition.right) == 1 and addition.op in _SUMS:
        left, right = addition.left, addition.right[0]
        yield from _of_two(graph, left, _factors(graph, right))
        yield from _of_two(graph, right, _factors(graph, left))
    elif len(addition.right) == 1 and addition.op in _DIFFERENCES:
        yield from _of_two(graph, addition.left, _factors(graph, addition.right[0]), subtracted=True)


def _of_two(
    graph: Graph,
    plain: int,
    factors: list[tuple[int | None, int]],
    subtracted: bool = False,
) -> Iterator[_Update]:
    """`plain + gate * (other - plain)`, `plain - gate * (plain - other)`, and `(1 - gate) * one + gate * other`.

    In the last one the gates may have nothing to do with each other, where the candidate is made of the state itself,
    and not of what its gate leaves of it.
    """
    for gate, value in factors:
        if gate is not None and not _is_gate(graph, gate):
            continue
        operands = _tensors(graph.nodes[value], _DIFFERENCES)
        if operands is not None and operands[not subtracted] == plain:
            yield _Update(plain, operands[subtracted], gate, value, plain)
        for other_gate, other in _factors(graph, plain) if not subtracted else ():
            if gate is None or other_gate is None:
                continue
            if _is_rest(graph, gate, other_gate) or _is_rest(graph, other_gate, gate):
                yield _Update(other, value, gate)
            elif _are_squashed(graph, gate, other_gate) and other in graph.ancestors(value, 0, other, without={plain}):
                yield _Update(other, value, gate, apart=True)


def _tensors(node: Node, ops: frozenset[str]) -> tuple[int, int] | None:
    """The two tensors of one of these operations."""
    two = node.op in ops and len(node.args) == 2 and all(isinstance(a, Ref) for a in node.args)
    return (int(node.args[0]), int(node.args[1])) if two and node.kwargs.get("alpha", 1) == 1 else None


def _factors(graph: Graph, number: int) -> list[tuple[int | None, int]]:
    """The factors of a product, each with the other one; None for a number.

    With a factor of a factor stands the whole product, for what is beside it has no node of its own.
    """
    node = graph.nodes[number]
    operands = _tensors(node, _PRODUCTS)
    if operands is not None:
        inner = [gate for each in operands for gate, _ in _factors(graph, each) if gate is not None]
        return [operands, operands[::-1], *((gate, number) for gate in inner)]
    refs = [int(a) for a in node.args if isinstance(a, Ref)] if node.op in _PRODUCTS else []
    return [(None, refs[0])] if len(refs) == 1 else []


def _is_gate(graph: Graph, gate: int) -> bool:
    """Whether a factor is computed or learned, and no mask."""
    return not graph.bare[gate] or any(graph.nodes[n].op == "parameter" for n in graph.ancestors(gate, 0, 0))


def _are_squashed(graph: Graph, *gates: int) -> bool:
    """Whether these are parts of what a sigmoid gave."""
    for gate in gates:
        while graph.nodes[gate].op in VIEWS | CASTS and len(graph.nodes[gate].inputs) == 1:
            (gate,) = graph.nodes[gate].inputs
        if graph.nodes[gate].op != "sigmoid":
            return False
    return True


def _is_rest(graph: Graph, number: int, gate: int) -> bool:
    """Whether a node is `1 - gate`."""
    number, gate = _seen_through(graph, number), _seen_through(graph, gate)
    node = graph.nodes[number]
    if node.op not in _PLAIN | {"rsub"} or len(node.args) < 2 or any(a != 1 for a in node.args[2:]):
        return False
    orders = [node.args[:2]] if node.op in _DIFFERENCES else [node.args[1::-1]]
    for one, taken in orders + ([node.args[:2]] if node.op in _SUMS else []):
        ones = graph.nodes[one].op in _ONES if isinstance(one, Ref) else one == 1
        if ones and isinstance(taken, Ref):
            made = graph.nodes[taken]
            if node.op not in _SUMS:
                return _seen_through(graph, int(taken)) == gate
            return made.op in ("neg", "negative") and _seen_through(graph, made.inputs[0]) == gate  # -z + 1
    return False


def _seen_through(graph: Graph, node: int) -> int:
    """What a node is a view or a cast of, as a gate of one number a row is spread over its columns."""
    while graph.nodes[node].op in VIEWS | CASTS and len(graph.nodes[node].inputs) == 1:
        (source,) = graph.nodes[node].inputs
        if graph.size(source) != graph.size(node):
            break
        node = source
    return node
