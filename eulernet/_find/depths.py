"""How deep a network is: the streams of its steps, and how many steps follow one another in each."""

from __future__ import annotations

from eulernet._find.graph import Graph, StepCall
from eulernet._find.streams import goes_on, leads_out, links_of


def _role(call: StepCall) -> tuple[bool, bool]:
    """Steps, long ones and gated ones have streams of their own."""
    return call.long, call.kind == "gated"


def number_streams(graph: Graph, calls: list[StepCall]) -> None:
    """Number the streams, the chains from skip to result, and count the calls in each.

    A step and the steps inside its branch are streams of their own.
    """
    ends = {e.addition.result: e for e in calls if e.supported}
    links = links_of(graph, ends)

    def holds(outer: StepCall, call: StepCall) -> bool:
        if call.addition.result not in outer.within:
            return False
        return not (leads_out(call, outer, links) or goes_on(graph, call, outer, links))

    beside: dict[StepCall, StepCall] = {}  # parts of one sum, written one after the other
    inside = {id(e): frozenset(id(o) for o in calls if holds(o, e)) for e in calls}
    streams = 0
    for role in (False, False), (True, False), (False, True):
        before: list[frozenset[StepCall]] = []  # for each node, the nearest steps of this kind that it comes from
        for index, node in enumerate(graph.nodes):
            call = ends.get(index)
            if call is None:
                before.append(frozenset().union(*(before[i] for i in node.inputs)))
            elif _role(call) != role:
                before.append(before[call.skip])
            else:
                nearest = call.first.before if call.first is not None else before[call.source]
                call.before = tuple(e for e in nearest if inside[id(e)] == inside[id(call)])
                parts = (e for e in call.before if call.kind == "projection" and call.state < e.addition.result)
                if (part := next(parts, None)) is not None:
                    beside[call], call.before = part, part.before
                call.position = 1 + max((e.position for e in call.before), default=0)
                # Where a branch began earlier, there are steps between it and the one that it belongs to.
                between = (e for e in before[call.skip] if call.first not in (None, e, e.first))
                before.append(frozenset((call, *between)))
        members = [e for e in calls if _role(e) == role]
        for call in members:
            start = max(call.before, key=lambda e: e.position, default=call.first or beside.get(call))
            call.stream = streams if start is None else start.stream
            streams += start is None
            call.depth = call.position
        for call in reversed(members):  # D is the length of the longest chain through the step
            for other in (*call.before, *(o for o in (call.first, beside.get(call)) if o is not None)):
                other.depth = max(other.depth, call.depth)
        for call in members:
            if call.first is not None:
                call.depth = call.first.depth
