"""Sums over layers, `x + f(x) + g(f(x))`, each made of the one before and none of the sum or of `x` itself.

They are no steps: jumping knowledge, the logarithms that a flow adds up. What is added may be a multiple, a part or a
mean of a layer. Where the chain of such a sum has another one, as the next block's, it is a stream after all; and where
each layer is added to a stream as well that begins as the sum does, both are streams, of the same steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from eulernet._find.graph import Graph, StepCall


def sums_of_layers(graph: Graph, sums: list[StepCall], links: Mapping[StepCall, set[StepCall]]) -> set[StepCall]:
    """The sums to which a layer is added that was made of one that was added before, none next to another."""
    layers: dict[StepCall, set[int]] = defaultdict(set)
    found: set[StepCall] = set()
    results: dict[StepCall, set[int]] = defaultdict(set)
    for call in sums:
        head = call.head
        beside = head.kind == "identity" and _reads_beside(graph, call, head, layers[head] | results[head], sums)
        if not beside and any(_is_made_of(graph, call.branch, n, results[head]) for n in layers[head]):
            found.add(head)
        layers[head].update(n for n, _ in graph.matched(call.branch, 0, 0) if n in call.within)
        results[head].add(call.addition.result)
    return {head for head in found if found.isdisjoint(links.get(head, ()))}


def in_two_streams(graph: Graph, of_layers: list[StepCall], steps: list[StepCall]) -> Iterator[StepCall]:
    """The sums of layers that begin as the stream of these layers does: each layer is added to both (ResiDual)."""
    step_of = {e.branch: e for e in steps if e.supported and not e.long and e not in of_layers}
    members: dict[StepCall, list[StepCall]] = defaultdict(list)
    for call in of_layers:
        members[call.head].append(call)
    for head, calls in members.items():
        begins_alike = head.branch in step_of and head.state in graph.same(step_of[head.branch].skip, 0)
        if begins_alike and all(call.branch in step_of for call in calls):
            for call in calls:
                call.kind, call.reason, call.first = "parallel", None, step_of[call.branch].head
                yield call


def _is_made_of(graph: Graph, node: int, layer: int, without: set[int]) -> bool:
    """Whether a layer was made of another one, and is not that itself once more."""
    ancestors = graph.ancestors(node, 0, layer, without=without)
    return layer in ancestors and graph.mixes(graph.path(layer, node, ancestors), layer)


def _reads_beside(graph: Graph, call: StepCall, head: StepCall, layers: set[int], sums: list[StepCall]) -> bool:
    """Whether a layer reads the state not only by way of the layers before it.

    What multiplies a layer by the state is a power of it; a sum of the same two operands is the stream, of which the
    other one sums up the layers (ResiDual).
    """
    without = set(layers)
    for other in sums:
        if other.branch == head.branch and other.addition is not head.addition:
            without.update([other.addition.result] if head.state in graph.same(other.skip, 0) else ())
    for node in call.within:
        inputs = graph.state_inputs(node) if graph.is_map(node) else ()
        if head.state in inputs and any(not layers.isdisjoint(graph.ancestors(i, 0, head.state)) for i in inputs):
            without.add(node)
    return head.state in graph.ancestors(call.branch, 0, head.state, without=without)
