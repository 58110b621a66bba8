"""What is added to a stream beside its branches: conditions, hints, positions, an earlier state given again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from eulernet._find.graph import Graph, Match


def shifted(graph: Graph, skip: int, branch: int, start: int) -> Match | None:
    """A skip that is the state `x` to which something else was added first, `(x + c) + f(x)`."""
    last = [*graph.same(skip, start, scaled=True)][-1]
    parts = graph.state_inputs(last) if last in graph.sums else ()
    for part in parts if len(parts) == 2 else ():
        chain = [*graph.same(part, start, scaled=True)]
        ancestors = graph.ancestors(branch, start, chain[-1])
        state = next((n for n in chain if n in ancestors and n != branch), None)
        if state is None or last in ancestors:
            continue
        path = graph.path(state, branch, ancestors)
        (other,) = (i for i in parts if i != part)
        again = {n for n in path if n in graph.sums and _made(graph, graph.state_inputs(n)) == _made(graph, parts)}
        reads = graph.mixes(path, state) and _is_read(graph, state, path, again)
        if graph.other_resolutions(path, chain):  # levels that are fused
            continue
        if reads and _is_foreign(graph, other, state, path.keys() - again):
            return Match("identity", state, set(path) - {state})
    return None


def _made(graph: Graph, parts: Iterable[int]) -> set[object]:
    """By what these nodes were made: two that were made alike are one."""
    return {(graph.nodes[n].op, graph.nodes[n].inputs, graph.nodes[n].output) if graph.is_map(n) else n for n in parts}


def _is_read(graph: Graph, state: int, path: Collection[int], again: Collection[int]) -> bool:
    """Whether a branch reads a state itself, and not only another one to which it was added, as to a position."""
    raw = {state}
    for node in sorted(path):
        if node == state or raw.isdisjoint(graph.nodes[node].inputs):
            continue
        others = [i for i in graph.state_inputs(node) if i not in raw and not graph.constant[i]]
        if node in again or graph.keeps(node):
            raw.add(node)
        elif node not in graph.sums or all(state in graph.ancestors(i, 0, state) for i in others):
            return True
    return False


def _is_foreign(graph: Graph, other: int, state: int, path: Collection[int]) -> bool:
    """Whether what was added to a state has nothing to do with it, is no map of it, or was added to its stream before.

    Nor is it made of another stream that the branch reads, `path`, as where two are changed at once.
    """
    made_of = graph.ancestors(other, 0, -1)
    sums = (n for n in path if n in graph.sums and n != state)
    beside = (i for n in sums for i in graph.state_inputs(n) if i not in path)
    joined = {n for i in beside for n in graph.same(i, 0, scaled=True)}
    if not made_of.isdisjoint(joined):
        return False
    if state in made_of:
        return not graph.mixes(graph.path(state, other, made_of), state)
    before, pending = graph.ancestors(state, 0, -1), [other]
    while pending:
        chain = [*graph.same(pending.pop(), 0, scaled=True)]
        known = [n for n in chain if n in before]
        if known and not any(mixed_in(graph, n, state, before, {}) for n in known):
            return False
        pending += graph.state_inputs(chain[-1]) if chain[-1] in graph.sums and not known else ()
    return True


def mixed_in(
    graph: Graph, node: int, whole: int, within: Iterable[int], cut: Mapping[int, int], mapped: bool = False
) -> int:
    """Whether a state was added to one that is not made of it, which `whole` is since: 1, or 2 after more steps.

    One that steps have changed before is a stream, and what is added to it is not: -1. `within`: the nodes on the way.
    `cut`: the results of steps, which come from their skips. `mapped`: or whether what was made of it was added.
    """
    mixed = {node: 0}
    for one in sorted(within):
        inputs = (cut[one],) if one in cut else graph.state_inputs(one)
        reached = [mixed[i] for i in inputs if i in mixed]
        adds = one in graph.sums and one not in cut
        if reached and (adds or one in cut or graph.keeps(one)):
            others = [i for i in inputs if adds and i not in mixed and not graph.constant[i]]
            foreign = any(node not in graph.ancestors(i, 0, node) for i in others)
            mixed[one] = before = max(reached)
            if one in cut:
                mixed[one] = 2 if before > 0 else -1
            elif before == 0 and foreign:
                mixed[one] = 1
        elif reached and mapped:
            mixed[one] = 0
    return mixed.get(whole, 0)
