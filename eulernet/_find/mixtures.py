"""Sums of several states of one stream and branches of the last of them, in any order and with any factors.

`x + x0 + f(x)` gives an earlier state again, `2 * x - before + f(x)` is leapfrog, `f(x) + k * before + (1 - k) * x` a
linear multistep. The step is the sum in which `f(x)`, and no state, meets the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from eulernet._find.graph import Graph, MatchKind, StepCall
from eulernet._find.trace import ADDITIONS, Addition, Trace


class Expression(NamedTuple):
    """Sums of one call of a module, each read by the next alone, in the order in which they ran; what they add up."""

    sums: list[Addition]
    leaves: list[int]


class _State(NamedTuple):
    """A leaf from which others were computed: for each of these the node that it began at."""

    leaf: int
    branches: dict[int, int]


def mixtures(graph: Graph, trace: Trace) -> dict[int, StepCall | None]:
    """By its result what each sum of such an expression is, a step or none."""
    of_root = {e.sums[-1].result: e for e in _expressions(graph, trace) if len(e.leaves) > 2}
    found: dict[int, _State] = {}
    for root, expression in of_root.items():
        if (state := _state(graph, expression)) is not None:
            found[root] = state
    # What the states of these were added up from is an expression of the same kind: the first block, where the stream
    # has no steps yet.
    for root in sorted(found, reverse=True):
        before = root
        while (before := _last_sum(graph, found[before].leaf, of_root.keys() - found.keys())) >= 0:
            if (state := _state(graph, of_root[before], first=True)) is None:
                break
            found[before] = state
    return {k: v for root, state in found.items() for k, v in _ruled(graph, of_root[root].sums, state).items()}


def _expressions(graph: Graph, trace: Trace) -> list[Expression]:
    of = {a.result: a for a in trace.additions if a.op in ADDITIONS and len(a.right) == 1}
    sums: dict[int, list[Addition]] = {}
    for result in sorted(of, reverse=True):
        readers = graph.readers.get(result, set())
        around = of.get(next(iter(readers))) if len(readers) == 1 and result not in graph.outputs else None
        within = around is not None and around.call == of[result].call and result in (around.left, *around.right)
        sums[result] = sums[around.result] if around is not None and within else []
        sums[result].insert(0, of[result])
    whole = {together[-1].result: together for together in sums.values()}
    return [
        Expression(together, [n for a in together for n in (a.left, *a.right) if n not in {b.result for b in together}])
        for _, together in sorted(whole.items())
    ]


def _state(graph: Graph, expression: Expression, first: bool = False) -> _State | None:
    """The last state among the leaves, where there is an earlier one too, from which it has come, and a branch of it.

    `first`: by maps as well, or the two may be one.
    """
    chains = {leaf: [*graph.same(leaf, 0, scaled=True)] for leaf in expression.leaves}
    for leaf in sorted(chains, key=lambda one: chains[one][-1], reverse=True):
        others = [other for n, other in enumerate(expression.leaves) if n != expression.leaves.index(leaf)]
        is_earlier = is_made_of if first else is_carried
        if any(not graph.constant[other] and is_earlier(graph, chains[other], leaf) for other in others):
            origins = {other: _origin(graph, chains[leaf], other) for other in others}
            branches = {other: origin for other, origin in origins.items() if origin is not None}
            if branches:
                return _State(leaf, branches)
    return None


def is_made_of(graph: Graph, earlier: Sequence[int], node: int) -> bool:
    """Whether it was computed from one of these, of which the last is the oldest."""
    return not graph.ancestors(node, 0, earlier[-1]).isdisjoint(earlier)


def is_carried(graph: Graph, earlier: Sequence[int], node: int, *, as_it_is: bool = False) -> bool:
    """Whether one of these, of which the last is the oldest, has become a node by sums, norms and factors alone.

    `as_it_is`: and was neither normed nor scaled first, as in a branch that has a sum of its own.
    """
    pending, seen = [node], {node}
    while pending:
        one = pending.pop()
        chain = list(graph.raw(one, scaled=True, by_hand=True))
        if not set(graph.same(one, 0) if as_it_is else chain).isdisjoint(earlier):
            return len(seen) > 1
        if chain[-1] in graph.sums and chain[-1] > earlier[-1]:
            pending += [n for n in graph.state_inputs(chain[-1]) if n not in seen]
            seen.update(pending)
    return False


def _last_sum(graph: Graph, state: int, roots: Collection[int]) -> int:
    """The expression among these whose sum a state is, as it is, normed or a multiple of it; -1 for none."""
    return next((n for n in graph.raw(state, scaled=True) if n in roots), -1)


def _origin(graph: Graph, chain: list[int], leaf: int) -> int | None:
    """The node, of a state and what it is a multiple of, that a branch was computed from; not a later state."""
    if is_carried(graph, chain, leaf):
        return None
    ancestors = graph.ancestors(leaf, 0, chain[-1])
    node = next((n for n in chain if n in ancestors and n != leaf), None)
    return node if node is not None and graph.mixes(graph.path(node, leaf, ancestors), node) else None


def _ruled(graph: Graph, sums: Iterable[Addition], state: _State) -> dict[int, StepCall | None]:
    """What each sum is; nothing of one on another line that adds to a step, as a skip around several does."""
    under: dict[int, set[int]] = {}
    found: dict[int, StepCall | None] = {}
    first: StepCall | None = None
    for addition in sums:
        operands = addition.left, addition.right[0]
        sides = [under.get(node, {node}) for node in operands]
        under[addition.result] = sides[0] | sides[1]
        pure = [side <= state.branches.keys() for side in sides]
        if pure[0] == pure[1]:
            if first is None or _statement(addition) == _statement(first.addition):
                found[addition.result] = None
            continue
        branch, skip = operands if pure[0] else operands[::-1]
        origin = min(state.branches[leaf] for leaf in sides[pure.index(True)])
        within = set(graph.path(origin, branch, graph.ancestors(branch, 0, origin))) - {origin}
        kind: MatchKind = "parallel" if first else "identity"
        call = StepCall(addition, kind, skip, branch, pure[1], origin, within, first=first)
        call.source, call.sums = origin, pure[1] or "sub" not in addition.op  # `f(x) - before` is no sum of the two
        first = first or call
        found[addition.result] = call
    for step in found.values():
        if step is not None:
            step.end = max(found)
    return found


def _statement(addition: Addition) -> int | None:
    """The line at which the expression begins that adds."""
    frame = addition.frames[0] if addition.frames else None
    return None if frame is None else list(frame.code.co_positions())[frame.lasti // 2][0]
