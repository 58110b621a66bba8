"""Sums inside sums: which of them carry a stream, which belong to a branch, and which are long.

A *chain* is sums that follow one another from skip to result through at most one map. A *stream* is a chain of two or
more: the places of one parallel step count once, and two projections alone are none. A sum of scores or of gates,
which weights other states and does nothing else, is in no chain, and counts in no branch.

1. A sum whose branch comes from its skip only through the branches of other sums is no step: a position, a score, an
   input that is injected again; unless it carries a stream of its own, and those others are driven by themselves as
   well. Where they are driven by it alone, it is the other half of a reversible network, which is named.
   So is a sum that is read in a branch alone, while its own branch goes on without it, as the skip of another sum,
   and one whose skip was added to its branch's stream before, as a condition that each block adds.
2. A sum with sums inside its branch is long (a) where, with their branches cut, nothing is left of its own (no map,
   norm or pooling; beside a mapped skip, no more maps than there), or what is left passes another resolution; (b)
   around a stream that begins at its own skip, through no map; (c) around a stream, or around several sums that are no
   projections, or projections that begin one at the result of the other, where it is in no stream itself, and not all
   of them have its own skip, as the stages of a Runge-Kutta step have; (d) around another run of the same addition of
   the source, as the skips of a U-Net that one loop adds.
3. Inside the branch of a step that is not long a sum counts only where that branch holds a stream, or where a stream
   that began before goes on through it and beside the step; otherwise it belongs to the branch.
4. A sum of layers, `x + f(x) + g(f(x))`, is no step, but for what `layers.py` says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import combinations
from types import CodeType
from typing import NamedTuple

from torch import nn

from eulernet._find.conditions import mixed_in
from eulernet._find.graph import Graph, StepCall
from eulernet._find.layers import in_two_streams, sums_of_layers
from eulernet._find.operations import NORMS, POOLS, SQUASHES
from eulernet._find.trace import Addition

_Sums = Mapping[int, StepCall]  # by the node of the result


def steps_of(graph: Graph, calls: list[StepCall], by_gates: list[StepCall]) -> list[StepCall]:
    """The sums that are steps, long and unsupported ones included, in the order in which they ran.

    `by_gates`: the gated updates beside them.
    """
    scores = _scores(graph, calls)
    sums = _with_first(_of_the_skip(graph, calls, by_gates, scores))
    ends = {e.addition.result: e for e in sums if e.supported and e.kind != "decomposition" and e not in scores}
    links = links_of(graph, ends)
    of_layers = sums_of_layers(graph, sums, links)
    for call in (*_through_each_other(sums), *_first_of_halves(graph, sums)):
        call.coupled = True
    kept: list[StepCall] = []
    for call in reversed(sums):  # what ends later is outside
        if call.head in of_layers:
            call.reason = "sum of layers"
            continue
        if call.kind == "decomposition":
            call.reason = "error or variance" if any(map(graph.is_map, call.within)) else "what pooling took out"
            continue
        around = [o for o in kept if o.supported and not o.long and call.addition.result in o.within]
        if call.coupled or all(_holds_stream(o, links) or goes_on(graph, call, o, links) for o in around):
            call.long = call.supported and _is_long(graph, call, ends, links)
            kept.append(call)
        else:
            call.reason = "inside a branch"
    kept += in_two_streams(graph, [e for e in sums if e.head in of_layers], kept)
    return _with_first(sorted(kept, key=lambda e: e.addition.result))


def _with_first(calls: list[StepCall]) -> list[StepCall]:
    """Without the further branches of what is no step."""
    still = {id(e) for e in calls}
    for call in calls:
        if call.first is not None and id(call.first) not in still:
            call.reason = call.first.reason
    return [e for e in calls if e.first is None or id(e.first) in still]


# ---- rule 1


def _of_the_skip(
    graph: Graph, calls: list[StepCall], by_gates: list[StepCall], scores: Collection[StepCall]
) -> list[StepCall]:
    """Without what comes from its skip only through the branches of other sums, unless it carries a stream of its own.

    Where those other sums come from theirs through it alone, it is the other half of a pair, and marked as such.
    """
    sums: list[StepCall] = []
    carried: dict[int, list[StepCall]] = defaultdict(list)
    for call in calls:
        for node in graph.raw(call.skip, scaled=True, by_hand=True):
            carried[node].append(call)
    positions = {*_positions(graph, calls, carried), *_reinforced(graph, calls)}
    cut_off = _cut_off(graph, calls)
    for call in calls:
        inner = _inner(call, sums + _of_the_state(graph, call, by_gates))
        if call in positions:
            call.reason = "position or injected input"
        elif graph.constant[call.state] and call not in cut_off and (inner or call.kind == "projection"):
            call.reason = "constant operand"
        elif inner and _is_injected_again(graph, call, _cut(inner)):
            call.reason = "position or injected input"
        elif inner and _own(graph, call, inner) is None:
            taken_out = any(e.kind == "decomposition" for e in inner)
            if call in scores or taken_out or not _is_of_a_stream(graph, call, carried):
                call.reason = "position or injected input"
            else:
                halves = (e for e in inner if e.kind != "gated")
                call.coupled = not all(_is_driven_by_itself(graph, e, calls) for e in halves)
                sums.append(call)
        else:
            sums.append(call)
    return sums


def _cut_off(graph: Graph, calls: list[StepCall]) -> set[StepCall]:
    """The sums of a stream that is detached between its steps, as places that are refined are."""
    by_result = {e.addition.result: e for e in calls}
    found: set[StepCall] = set()
    for call in calls:
        for source in (i for n in graph.same(call.state, 0) for i in graph.detached(n)):
            found.update(e for n in graph.raw(source) if (before := by_result.get(n)) for e in (before, call))
    return found


def _is_injected_again(graph: Graph, call: StepCall, cut: Mapping[int, int]) -> bool:
    """Whether its skip is what was added to the stream that is its branch, `x + c`, before the steps between."""
    return mixed_in(graph, call.state, call.branch, call.within, cut, mapped=call.kind == "projection") == 2


def _is_of_a_stream(graph: Graph, call: StepCall, carried: Mapping[int, list[StepCall]]) -> bool:
    """Whether its skip is read as it is, and is a sum too, or its result another sum's skip."""
    if call.kind != "identity":  # parts of what another stream made are summed up beside it: WaveNet
        return False
    # What was squashed since it was summed up is a position, as boxes that are refined are.
    skips = graph.same(call.skip, 0, scaled=True)
    last = next((n for n in skips if n in graph.sums or graph.nodes[n].op in SQUASHES), None)
    result = call.addition.result
    squashed = any(graph.nodes[n].op in SQUASHES for n in graph.uses(result))
    begins = last is None and not squashed and any(other.head is not call.head for other in carried[result])
    return begins or last in graph.sums


def _is_driven_by_itself(graph: Graph, call: StepCall, calls: list[StepCall]) -> bool:
    """Whether a branch comes from its state beside all other streams too."""
    own = call.within | {call.addition.result, call.state}
    others = _cut(e for e in calls if e.addition.result in call.within)
    streams = {  # which come from outside of the branch, and go on beside it
        n
        for n in call.within & graph.sums
        if n not in others
        and graph.readers.get(n, set()) - own
        and any(i not in own and not graph.constant[i] for i in graph.nodes[n].inputs)
    }
    return bool(_way(graph, call, others, without=streams))


def _positions(graph: Graph, calls: list[StepCall], carried: Mapping[int, list[StepCall]]) -> Iterator[StepCall]:
    """The sums that are read in a branch alone, and whose own branch goes on without them: another sum adds to it.

    That branch may be normed or a multiple where it is a later state of the stream whose earlier one is mixed in.
    `carried`: by node, the sums whose skip it is, as it is, normed or a multiple of it.
    """
    for call in calls:
        result = call.addition.result
        read = graph.readers.get(result, set())
        if carried[result] or not any(result in outer.within and read <= outer.within for outer in calls):
            continue
        branches = graph.raw(call.branch, scaled=True) if _is_later(graph, call, calls) else [call.branch]
        if any(other is not call for branch in branches for other in carried[branch]):
            yield call


def _reinforced(graph: Graph, calls: list[StepCall]) -> Iterator[StepCall]:
    """Sums one in another's branch that each add another map of one state, three and more: an image, given again."""
    again: dict[int, list[StepCall]] = defaultdict(list)
    for call in calls:
        if call.kind == "projection":
            *_, (origin, _) = graph.matched(call.state, 0, 0)
            nested = again[origin]
            if not nested or nested[-1].addition.result in call.within:
                nested.append(call)
    for nested in again.values():
        if len(nested) > 2:
            yield from nested


def _is_later(graph: Graph, call: StepCall, calls: list[StepCall]) -> bool:
    """Whether between the skip and the branch there is nothing but other sums and norms."""
    cut = _cut(_inner(call, calls))
    way = _way(graph, call, cut) - {call.state} if cut else set()
    return bool(way) and not any(n not in cut and (graph.is_map(n) or POOLS.search(graph.nodes[n].op)) for n in way)


def _of_the_state(graph: Graph, call: StepCall, by_gates: list[StepCall]) -> list[StepCall]:
    """The gated updates of a stream from which the state of a sum was computed, not those of that state itself."""
    found: dict[int, StepCall] = {}
    own = set(graph.raw(call.state))
    for update in by_gates:
        earlier = update.skip not in own and update.skip in graph.ancestors(call.state, 0, update.skip)
        if earlier or any(node in found for node in graph.raw(update.skip)):
            found[update.addition.result] = update
    return list(found.values())


def _inner(call: StepCall, calls: list[StepCall]) -> list[StepCall]:
    return [e for e in calls if e.supported and e.addition.result in call.within]


def _cut(calls: Iterable[StepCall]) -> dict[int, int]:
    """Sums whose branches are cut: by the node of the result, that of the skip, from which alone it comes."""
    return {e.addition.result: e.skip for e in calls}


def of_their_skip(graph: Graph, calls: list[StepCall], steps: list[StepCall]) -> list[StepCall]:
    """The gated updates whose candidate comes from the state not only through the branches of steps."""
    for call in calls:
        inner = [e for e in steps if e.supported and not e.long and e.addition.result in call.within]
        if inner and not _way(graph, call, _cut(inner)):
            call.reason = "position or injected input"
    return [call for call in calls if call.reason is None]


class _Own(NamedTuple):
    """What is left of a branch with the branches of the sums inside it cut."""

    nothing: bool  # no map, norm or pooling, or beside a mapped skip no more maps than there
    resized: bool  # all of it passes another resolution


def _own(graph: Graph, call: StepCall, inner: Iterable[StepCall]) -> _Own | None:
    """What is left of the branch; None where it does not come from the skip any more."""
    cut = _cut(inner)
    way = _way(graph, call, cut)
    if not way:
        return None
    own = [node for node in way if node != call.state and node not in cut]
    ops = [graph.nodes[node].op for node in own]
    skipped = [node for node, _ in graph.matched(call.skip, 0) if node >= call.state]
    upsampled = graph.other_resolutions(way, skipped)
    maps = {call.state: 0}
    spread = {  # multiples of the state by a learned vector, as the skip of the one sum inside
        n
        for skip in (cut.values() if len(cut) == 1 else ())
        for n in graph.same(skip, 0, scaled=True)
        if graph.is_diagonal(n) and call.state in graph.same(n, 0, scaled=True)
    }
    for node in sorted(way - {call.state}):
        passed = max(maps[i] for i in _inputs(graph, node, cut) if i in maps)
        maps[node] = passed + (node not in cut and (graph.is_map(node) or node in spread))
    of_skip = next((m for n, m in graph.matched(call.skip, 0) if n == call.state), 0)
    nothing = not maps[call.branch] and not any(op in NORMS or POOLS.search(op) for op in ops)
    return _Own(
        nothing=nothing or (call.kind == "projection" and maps[call.branch] <= of_skip),
        resized=bool(upsampled) and not _way(graph, call, cut, without=upsampled),
    )


def _way(graph: Graph, call: StepCall, cut: Mapping[int, int], without: Collection[int] = ()) -> set[int]:
    """The nodes from the state to the branch, where a result that is cut comes from its skip only; none: no way."""

    reached = {call.state}
    for node in sorted(call.within.difference(without)):
        if not reached.isdisjoint(_inputs(graph, node, cut)):
            reached.add(node)
    if call.branch not in reached:
        return set()
    leads = {call.branch}
    for node in sorted(reached, reverse=True):
        if node in leads and node != call.state:
            leads.update(i for i in _inputs(graph, node, cut) if i in reached)
    return leads


def _inputs(graph: Graph, node: int, cut: Mapping[int, int]) -> tuple[int, ...]:
    return (cut[node],) if node in cut else graph.nodes[node].inputs


# ---- chains and streams


def _scores(graph: Graph, sums: list[StepCall]) -> set[StepCall]:
    """The sums that weight other states and do nothing else, and those that such sums go on from.

    So attention scores do that talking heads mix by a residual: a part of a branch, however many there are.
    """
    found: set[StepCall] = set()
    for call in reversed(sums):
        result = call.addition.result
        read = graph.readers.get(result, set())
        if graph.weights(result) or any(
            result in graph.same(e.skip, 0) and read <= e.within | {e.addition.result} for e in found
        ):
            found.add(call)
    return found


def links_of(graph: Graph, ends: _Sums) -> dict[StepCall, set[StepCall]]:
    """Each sum's neighbours in its chain; those without one are in no stream."""
    links: dict[StepCall, set[StepCall]] = defaultdict(set)
    ends = {**ends, **{e.end: e for e in ends.values()}}
    for call in {e.head for e in ends.values()}:
        earlier = (ends[n] for n in _back(graph, call.source, ends) if n in ends and ends[n] is not call)
        before = next((e.head for e in earlier), call)
        apart = {call.kind, before.kind} == {"projection"} and before.addition.result not in _back(
            graph, call.skip, {}, 0
        )
        if before is not call and not apart:
            links[call].add(before)
            links[before].add(call)
    return dict(links)


def _back(graph: Graph, node: int, ends: _Sums, most: int = 1) -> Iterator[int]:
    """A node and what it comes from by shape-matching maps only, norms written by hand included."""
    source: int | None = node
    while source is not None:
        chain = list(graph.matched(source, 0, most))
        yield from (n for n, _ in chain)
        last, passed = chain[-1]
        most -= passed
        by_hand = last not in ends and not graph.is_map(last) and len(graph.state_inputs(last)) > 1
        source = graph.one_source(last, ends.__contains__) if by_hand else None


def _holds_stream(outer: StepCall, links: Mapping[StepCall, set[StepCall]]) -> bool:
    def inside(call: StepCall) -> bool:
        return call.addition.result in outer.within

    return any(inside(call) and any(map(inside, near)) for call, near in links.items())


def goes_on(graph: Graph, call: StepCall, outer: StepCall, links: Mapping[StepCall, set[StepCall]]) -> bool:
    """Whether a sum in a branch belongs to another stream, which comes from outside of the branch and leaves it."""
    before = (near.addition.result for near in links.get(call.head, ()))
    comes = any(node < call.addition.result and node not in outer.within for node in before)
    own_state = outer.within.union(graph.raw(outer.skip), (outer.state,))
    comes = comes or own_state.isdisjoint(graph.raw(call.skip, scaled=True))
    own = outer.within.union((outer.addition.result,), graph.nodes[outer.addition.result].inputs)  # or its stack
    state = [call.addition.result]  # as it is, normed or a multiple
    for node in state if comes else ():
        readers = graph.readers.get(node, set())
        if readers - own or node in graph.outputs:
            return True
        state += [n for n in readers if node in graph.raw(n, scaled=True) or graph.keeps_resolution(n)]
    return False


def leads_out(call: StepCall, outer: StepCall, links: Mapping[StepCall, set[StepCall]]) -> bool:
    """Whether the chain of a sum in a branch goes on to another one that is neither in the branch nor ends it."""
    pending, seen = [call], {call}
    while pending:
        one = pending.pop()
        later = {e for e in links.get(one.head, ()) if e.addition.result > one.addition.result and e is not outer}
        if any(e.addition.result not in outer.within for e in later):
            return True
        pending += later - seen
        seen |= later
    return False


def _through_each_other(sums: list[StepCall]) -> Iterator[StepCall]:
    """The sums of two streams that are changed at once, each by the other: `a, b = a + f(b), b + g(a)`."""
    members: dict[StepCall, list[StepCall]] = defaultdict(list)
    for call in sums:
        members[call.head].append(call)

    def holds(one: StepCall, other: StepCall) -> bool:
        return any(e.addition.result in o.within for o in members[one] for e in members[other])

    for one, other in combinations([head for head in members if len(members[head]) > 1], 2):
        if holds(one, other) and holds(other, one):
            yield from members[one] + members[other]


def _first_of_halves(graph: Graph, sums: list[StepCall]) -> Iterator[StepCall]:
    """What the sums of another half go on from, where both halves begin alike: `a = x + f(x); b = x + g(a)`."""
    halves = [e for e in sums if e.coupled]
    for half in halves:
        carried = set(graph.same(half.skip, 0))
        between = [e for e in sums if e.addition.result in half.within]
        for call in sums:
            result = call.addition.result
            if result in carried and not call.coupled and any(result in e.within for e in between):
                halves.append(call)
                yield call


# ---- rule 2


def _is_long(graph: Graph, call: StepCall, ends: _Sums, links: Mapping[StepCall, set[StepCall]]) -> bool:
    inner = [e for e in ends.values() if e.addition.result in call.within]
    own = _own(graph, call, inner) if inner else None
    if own is None:
        return False
    if own.nothing or own.resized or any(_is_again(e.addition, call.addition) for e in inner):
        return True
    in_streams = [e for e in inner if any(o.addition.result in call.within for o in links.get(e.head, ()))]
    in_one_itself = any(o.addition.result not in call.within for o in links.get(call.head, ()))
    begins = (e.skip if e.kind == "projection" else e.state for e in inner if e.head in links)
    begins_here = any(call.state in _back(graph, node, {}, 0) for node in begins)
    heads = {head for e in inner if (head := e.head).kind != "projection"}
    stages = all(call.state in graph.same(head.skip, 0) for head in heads)
    projections = [e for e in inner if e.kind == "projection"]
    results = {e.addition.result for e in projections}  # its own comes after its state
    chained = any(not results.isdisjoint(graph.raw(e.state)) for e in projections)
    several = chained or (len(heads) > 1 and not stages)
    return (bool(in_streams) and begins_here) or ((bool(in_streams) or several) and not in_one_itself)


def _is_again(one: Addition, other: Addition) -> bool:
    """Whether two sums are runs of one addition of one module."""

    def made(addition: Addition) -> list[tuple[CodeType, int, nn.Module | None]]:
        return [(frame.code, frame.lasti, frame.module) for frame in addition.frames]

    return bool(one.frames) and made(one) == made(other)
