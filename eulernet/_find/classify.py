"""What is a step: classify the additions of a trace.

A residual step is an addition of a skip `s` and a branch `f` where `f` was computed from `s` (identity), where both
came from one state, `s` by a shape-matching map only (projection), or where `f` is a further branch of the state of a
step that `s` is the result of (parallel). A step whose branch runs through other steps is long.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations, pairwise, permutations
from typing import Any, NamedTuple

from eulernet._find.conditions import shifted
from eulernet._find.depths import number_streams
from eulernet._find.gated import gated
from eulernet._find.graph import Graph, Match, StepCall
from eulernet._find.mixtures import is_carried, mixtures
from eulernet._find.operations import NORMS, REARRANGES, REDUCTIONS, SCALES, SQUARES, SQUASHES, UPSAMPLES, VIEWS
from eulernet._find.streams import of_their_skip, steps_of
from eulernet._find.trace import ADDITIONS, FUSED_ADDITIONS, JOINS, PRODUCTS, RUNNING, SLICES, Addition, Trace
from eulernet._step import Reason


class Sums(NamedTuple):
    """What the sums of one run are, each in the order in which it ran."""

    graph: Graph
    steps: list[StepCall]  # long and unsupported ones included
    left_out: list[tuple[Addition, Reason]]


def classify(trace: Trace) -> Sums:
    """The sums of one run: the steps, and for each other one why it is none."""
    graph = Graph(trace)
    step_calls: list[StepCall] = []
    results: dict[int, StepCall] = {}
    ruled = mixtures(graph, trace)
    updates, inner = gated(graph, trace)
    inner -= ruled.keys()
    for addition in trace.additions:
        if addition.result in inner:
            continue
        if addition.result in ruled:
            step_call = ruled[addition.result]
        elif addition.result in updates:
            step_call = updates[addition.result]
        else:
            step_call = _step_call(graph, trace, addition, results)
        if step_call is not None:
            step_calls.append(step_call)
            if step_call.supported and step_call.kind not in ("decomposition", "gated"):
                results[addition.result] = results[step_call.end] = step_call
    by_gates = [e for e in step_calls if e.kind == "gated"]
    kept = steps_of(graph, [e for e in step_calls if e.kind != "gated"], by_gates)
    kept += of_their_skip(graph, by_gates, kept)
    kept.sort(key=lambda e: e.addition.result)
    number_streams(graph, kept)
    kept = [*kept, *_other_halves(graph, trace, kept)]
    known: dict[int, Reason | None] = {id(e.addition): e.reason for e in step_calls if e.reason}
    none = {result for result, step_call in ruled.items() if step_call is None}
    known.update((id(a), "position or injected input") for a in trace.additions if a.result in none)
    known.update((id(e.addition), None) for e in kept)
    crossing = _crossing(graph, trace, [e for e in trace.additions if id(e) not in known])
    kept += crossing
    known.update((id(e.addition), None) for e in crossing)
    branches = [e.within for e in kept if e.supported and not e.left_alone] + [inner]
    left_out = []
    for addition in trace.additions:
        reason = known[id(addition)] if id(addition) in known else _reason(graph, trace, addition, branches)
        if reason is not None:
            left_out.append((addition, reason))
    return Sums(graph, kept, left_out)


def _other_halves(graph: Graph, trace: Trace, steps: list[StepCall]) -> Iterator[StepCall]:
    """The sums of a second stream, where two are changed in turn: `y = y + f(x)` before the step `x + g(y)`."""
    known = {e.addition.result for e in steps}
    for step in steps:
        for addition in trace.additions if step.supported and step.kind != "gated" else ():
            if addition.result not in step.within or addition.result in known or len(addition.right) != 1:
                continue
            for skip, branch in _pairs(addition):
                if _goes_on_beside(graph, step, addition.result, skip, branch):
                    known.add(addition.result)
                    yield StepCall(addition, "identity", skip, branch, skip == addition.left, skip, coupled=True)
                    break


def _goes_on_beside(graph: Graph, step: StepCall, result: int, skip: int, branch: int) -> bool:
    """Whether a sum in a step's branch goes on beside it, and adds a map of the step's state to what is none of it."""
    goes_on = graph.readers.get(result, set()) - step.within - {step.addition.result}
    alike = graph.nodes[skip].shape == graph.nodes[branch].shape == graph.nodes[result].shape
    foreign = skip not in step.within and skip != step.state and not graph.constant[skip] and graph.is_state(skip)
    if all(graph.nodes[n].op in SQUASHES for n in goes_on):  # as a gate
        return False
    if not (alike and foreign and branch in step.within):
        return False
    ancestors = graph.ancestors(branch, step.state, step.state)
    return graph.mixes(graph.path(step.state, branch, ancestors), step.state)


def _crossing(graph: Graph, trace: Trace, additions: list[Addition]) -> list[StepCall]:
    """The sums of two streams that are changed at once, each by the other alone: `a, b = a + f(b), b + g(a)`."""
    alike: dict[Any, list[StepCall]] = defaultdict(list)
    for addition in additions:
        for skip, branch in _pairs(addition) if len(addition.right) == 1 and "sub" not in addition.op else ():
            shapes = {graph.nodes[n].shape for n in (skip, branch, addition.result)}
            if len(shapes) == 1 and not graph.constant[skip] and not graph.constant[branch]:
                one = StepCall(addition, "identity", skip, branch, skip == addition.left, skip, coupled=True)
                alike[addition.call, *shapes].append(one)

    def reads(one: StepCall, other: StepCall) -> bool:
        start = trace.calls[one.addition.call].start
        for state in graph.same(other.skip, start):
            ancestors = graph.ancestors(one.branch, start, state)
            if state in ancestors and graph.mixes(graph.path(state, one.branch, ancestors), state):
                return True
        return False

    found: dict[int, StepCall] = {}
    for group in alike.values():
        for one, other in combinations(group, 2):
            if one.addition is not other.addition and reads(one, other) and reads(other, one):
                found.update((each.addition.result, each) for each in (one, other))
    return list(found.values())


def _reason(graph: Graph, trace: Trace, addition: Addition, branches: list[set[int]]) -> Reason:
    """Why a sum is no step, where neither operand was found to be the skip of the other."""
    operands = (addition.left, *addition.right)
    if any(graph.constant[node] or graph.bare[node] for node in operands):
        return "detached" if any(graph.is_detached(node) for node in operands) else "constant operand"
    if any(map(graph.is_noise, operands)):
        return "noise"
    if any(addition.result in within for within in branches):
        return "inside a branch"
    uses = graph.uses(addition.result)
    if uses and all(graph.nodes[n].op in SQUASHES for n in uses):
        return "gate or score"
    start = trace.calls[addition.call].start
    ancestors = [graph.ancestors(node, start, 0) for node in operands]
    for skip, branch in permutations(range(len(operands)), 2):
        if operands[skip] in ancestors[branch]:
            if _is_score(graph, operands[branch], start):
                return "gate or score"
            fits = graph.nodes[operands[skip]].shape == graph.nodes[addition.result].shape
            return "no map between" if fits else "broadcast"
    common = set.intersection(*ancestors)
    if not common:
        return "unrelated"
    near = (n for node in operands for n, _ in graph.matched(node, start) if n not in common)
    if any(UPSAMPLES.search(graph.nodes[n].op) for n in near):
        return "resolutions"
    return "siblings"


def _step_call(graph: Graph, trace: Trace, addition: Addition, results: dict[int, StepCall]) -> StepCall | None:
    pairs = [
        (skip, branch)
        for skip, branch in _pairs(addition)
        if (graph.fits(skip, addition.result) or addition.op in RUNNING)
        and not _is_series(graph, skip, branch)
        and not (_is_total(graph, skip) and _is_total(graph, branch))
        and not graph.is_noise(branch)
    ]
    # Mapped skips last: beside the result of a step, `b(x) + (x + a(x))`, a single map is a branch.
    for mapped in (False, True):
        for skip, branch in pairs:
            for start in _starts(graph, trace, addition, skip, results):
                if mapped:
                    found = _mapped(graph, addition, skip, branch, start)
                else:
                    found = _identity(graph, skip, branch, start, addition.op in PRODUCTS)
                    found = found or _joined(graph, skip, branch, start)
                    found = found or shifted(graph, skip, branch, start)
                    found = found or _parallel(graph, addition, skip, branch, start, results)
                    found = found or _detached(graph, skip, branch)
                if found and not _is_score(graph, branch, start):
                    kind, state, within, first = found
                    if kind == "identity" and "sub" in addition.op and _takes_out(graph, addition.result, within):
                        kind = "decomposition"
                    call = StepCall(addition, kind, skip, branch, skip == addition.left, state, within, first=first)
                    call.sums, call.mixture = graph.gives_sum(addition, skip), addition.op == "lerp"
                    if graph.constant[skip] and not graph.constant[state]:  # a state that is detached beside its branch
                        call.source = state
                    return call
    return None


def _mapped(graph: Graph, addition: Addition, skip: int, branch: int, start: int) -> Match | None:
    found = None if graph.is_noise(skip) else _projection(graph, skip, branch, start)
    return None if found and _is_aside(graph, addition.result, branch, found.within) else found


def _starts(graph: Graph, trace: Trace, addition: Addition, skip: int, results: dict[int, StepCall]) -> Iterator[int]:
    """Where the call begins that adds, and those of its callers for as long as the skip was handed on as it is.

    What steps of the call that adds have made of a state is that state: ladder residual.
    """
    call = trace.calls[addition.call]
    yield call.start
    while call.parent >= 0:
        given, maps = list(graph.matched(skip, call.start))[-1]
        if given >= call.start and given in results and results[given].addition.call == addition.call:
            skip = results[given].source
            continue
        if given >= call.start or maps:
            return
        call = trace.calls[call.parent]
        yield call.start


def _pairs(addition: Addition) -> Iterator[tuple[int, int]]:
    """The operands that may be skip and branch, with the left one as the skip first."""
    operands = (addition.left, *addition.right)
    only_left = "sub" in addition.op or (addition.op in FUSED_ADDITIONS and addition.op != "lerp")
    operands = operands[:2] if addition.op == "lerp" else operands
    for i, skip in enumerate(operands[:1] if only_left else operands):
        yield from ((skip, branch) for j, branch in enumerate(operands) if i != j)


def _identity(graph: Graph, skip: int, branch: int, start: int, multiplied: bool) -> Match | None:
    """A skip that is the state as it is, beside a branch with a map in it; a matrix product in the sum is a map."""
    chain = list(graph.same(skip, start))
    ancestors = graph.ancestors(branch, start, chain[-1])
    for state in chain:
        if state in ancestors and (state != branch or multiplied):
            path = graph.path(state, branch, ancestors)
            if multiplied or graph.mixes(path, state):
                return Match("identity", state, set(path) - {state})
    return None


def _joined(graph: Graph, skip: int, branch: int, start: int) -> Match | None:
    """A skip that is joined of states that were changed apart, beside a branch that is made of each of them."""
    joined = [*graph.same(skip, start)][-1]
    parts = graph.state_inputs(joined) if graph.nodes[joined].op in JOINS else ()
    if len(parts) < 2:
        return None
    chains = [[*graph.same(part, start)] for part in parts]
    ancestors = graph.ancestors(branch, start, min(chain[-1] for chain in chains))
    states = [next((n for n in chain if n in ancestors and n != branch), -1) for chain in chains]
    paths = [graph.path(state, branch, ancestors) for state in states if state >= 0]
    if len(paths) < len(parts) or not all(map(graph.mixes, paths, states)):
        return None
    return Match("identity", max(states), set().union(*paths) - set(states))


def _detached(graph: Graph, skip: int, branch: int) -> Match | None:
    """A branch of the detached state, or the detached state beside its branch.

    Not a branch that is detached itself, as a straight-through estimator's is.
    """
    if graph.constant[skip] == graph.constant[branch]:
        return None
    if graph.constant[skip]:
        before = [n for cut in graph.same(skip, 0) for source in graph.detached(cut) for n in graph.same(source, 0)]
        ancestors = graph.ancestors(branch, 0, min(before, default=0))
        ways = [(state, graph.path(state, branch, ancestors)) for state in before if state in ancestors]
        return next((Match("identity", n, set(way) - {n}) for n, way in ways if graph.mixes(way, n)), None)
    states, ancestors = set(graph.same(skip, 0)), graph.ancestors(branch, 0, -1)
    for cut in (n for n in ancestors.difference(graph.same(branch, 0)) if graph.nodes[n].op == "detach"):
        if any(not states.isdisjoint(graph.ancestors(n, 0, min(states))) for n in graph.detached(cut)):
            path = graph.path(cut, branch, ancestors)
            if graph.mixes(path, cut):
                return Match("identity", cut, set(path) - {cut})
    return None


def _projection(graph: Graph, skip: int, branch: int, start: int) -> Match | None:
    chain = list(graph.matched(skip, start))
    multiples = set(graph.same(skip, start, scaled=True))
    ancestors = graph.ancestors(branch, start, chain[-1][0])
    for state, maps in chain[1:]:
        if state in ancestors:
            path = graph.path(state, branch, ancestors)
            skipped = [node for node, _ in chain[: chain.index((state, maps)) + 1]]
            apart = _other_resolutions(graph, path, skipped) | _gating(graph, path)
            direct = graph.path(state, branch, ancestors - apart)
            passed = max(maps, sum(map(graph.is_map, skipped[:-1])))  # a separable convolution is two in a branch
            if apart and not direct and state in multiples:  # what levels are fused at is no branch of an earlier state
                return None
            deeper = direct and (direct[branch] > passed or (state in multiples and graph.mixes(direct, state)))
            other = _are_other_parts(graph, skipped, path) or graph.leaves_resolution(skipped)
            # Two linear maps, however many each is made of, are one: a low-rank update, kernels of two sizes.
            linear = passed > 0 and _is_linear(graph, direct, state, {node for node, _ in chain})
            if linear and state not in multiples:
                return None
            if deeper and not other:
                return Match("projection", state, set(path) - {state})
    return None


def _is_linear(graph: Graph, path: dict[int, int], state: int, origins: set[int]) -> bool:
    """Whether a way is linear in its state, and what is beside it has nothing to do with where the state came from."""
    nodes = [n for n in path if n != state]
    beside = {i for n in nodes for i in graph.reads(n) if i not in path and not graph.constant[i]}
    made_of = {m for i in beside for m in graph.ancestors(i, 0, -1)}
    # What was computed by way of integers or truth values, as a mask of a comparison, does not show what it is made of.
    given = all(graph.nodes[n].inputs or graph.constant[n] or graph.nodes[n].op == "input" for n in made_of)
    return given and origins.isdisjoint(made_of) and all(graph.is_linear(n, path) for n in nodes)


def _other_resolutions(graph: Graph, path: dict[int, int], skipped: list[int]) -> set[int]:
    """Where a branch is sized up from, or to, a resolution that the skip has nowhere.

    Where all of the branch passes there, levels are fused; where a part of it does not, the other part is a gate.
    """
    if all(graph.keeps_resolution(node) for node in skipped[:-1]):  # the state itself, or cut out of it
        return set()
    return graph.other_resolutions(path, skipped)


def _passes_levels(graph: Graph, path: dict[int, int], state: int, branch: int) -> bool:
    """Whether all of a branch passes another resolution, of which what was made there is read elsewhere too."""
    apart = graph.other_resolutions(path, [state])
    if not apart or graph.path(state, branch, graph.ancestors(branch, 0, state, without=apart)):
        return False
    return any(graph.readers.get(n, set()) - path.keys() for n in path.keys() - {state, branch})


def _gating(graph: Graph, path: dict[int, int]) -> set[int]:
    """The products on a path that it enters by a gate alone, as `r * s` does where `r` is made of another state."""

    def is_gate(node: int) -> bool:
        return any(graph.nodes[n].op in SQUASHES for n in graph.same(node, 0))

    products = ((n, graph.state_inputs(n)) for n in path if graph.nodes[n].op in SCALES)
    return {n for n, of in products if any(i not in path for i in of) and all(is_gate(i) for i in of if i in path)}


def _is_aside(graph: Graph, result: int, branch: int, within: set[int]) -> bool:
    """Whether a sum of two maps is a gate, a score or a sum of exits: made of a state that goes on without it.

    Something that a map made on its branch, before the branch's last, is read elsewhere, and what reads the sum
    squashes it, adds to it, or returns it: `sigmoid(W x + U h)`, where `h` was computed from `x` and is used again.
    """
    last: set[int] = set()
    pending = [branch]
    while pending:
        node = pending.pop()
        if node in within and node not in last:
            last.add(node)
            if not graph.is_map(node):
                pending.extend(graph.nodes[node].inputs)
    own, mapped = within | {result}, set[int]()
    for node in sorted(within):
        if graph.is_map(node) or not mapped.isdisjoint(graph.nodes[node].inputs):
            mapped.add(node)
    goes_on = any(graph.readers.get(node, set()) - own for node in mapped - last)
    unread = result not in graph.readers and result not in graph.outputs  # as the last of WaveNet's

    def is_exit(node: int) -> bool:  # a gate, or a sum, but for one with an earlier state of the stream
        if node not in graph.sums:
            return graph.nodes[node].op in SQUASHES
        return not any(is_carried(graph, [*graph.same(i, 0, scaled=True)], result) for i in graph.state_inputs(node))

    return goes_on and not unread and all(map(is_exit, graph.uses(result)))


def _is_series(graph: Graph, skip: int, branch: int) -> bool:
    """Whether a weight is made of itself, as by a power series (OFT): the branch has no weights but the skip's."""

    def leaves(node: int) -> set[int]:
        return {n for n in graph.ancestors(node, 0, -1) if not graph.nodes[n].inputs}

    return graph.constant[skip] and graph.constant[branch] and leaves(branch) <= leaves(skip)


def _is_total(graph: Graph, node: int) -> bool:
    """Whether it is a number for each sample, summed up over all features: a likelihood, a log-determinant."""
    *_, total = graph.same(node, 0, scaled=True)
    made = graph.nodes[total]
    if made.op in ADDITIONS and len(made.inputs) > 1:  # a running sum of them
        return all(graph.constant[n] or _is_total(graph, n) for n in made.inputs)
    of = [len(graph.nodes[n].shape) for n in made.inputs]
    return made.op in REDUCTIONS and len(made.shape) <= 1 < max(of, default=0)


def _is_centred(graph: Graph, result: int, within: set[int]) -> bool:
    """Whether what was subtracted was pooled (Autoformer), or is a mean, of which a variance is made."""
    squared = graph.uses(result)
    return not any(map(graph.is_map, within)) or (bool(squared) and all(graph.nodes[n].op in SQUARES for n in squared))


def _takes_out(graph: Graph, result: int, within: set[int]) -> bool:
    """Whether a difference is what is left over, and no step."""
    return _is_centred(graph, result, within) or _is_coded(graph, within)


def _is_coded(graph: Graph, within: set[int]) -> bool:
    """Whether the way passes a straight-through estimator: the sum is what the codes before have left over."""
    added = (i for n in within & graph.sums for i in graph.nodes[n].inputs)
    return any(graph.nodes[n].op == "detach" for i in added for n in graph.same(i, 0))


def _is_score(graph: Graph, branch: int, start: int) -> bool:
    """Whether the branch is a distribution, as where attention weights are summed up over time."""
    return any(graph.nodes[node].op == "softmax" for node in graph.same(branch, start, scaled=True))


def _are_other_parts(graph: Graph, skipped: list[int], path: dict[int, int]) -> bool:
    """Whether the skip is one part of the state, or of a view of it, and the branch begins at others: Res2Net, flows.

    Some features of what a map gives are a map of their own, as in a CSP layer that has one convolution for both its
    ways; where the branch's part goes on beside the sum, it is a flow's.
    """
    *rest, skip, state = skipped
    while rest and graph.nodes[skip].op in REARRANGES | VIEWS and skip in path:
        skip, state = rest.pop(), skip
    if _begin_apart(graph, skip, state, path):
        return True
    for n, (part, whole) in enumerate(pairwise(skipped), 1):
        if whole in path and _begin_apart(graph, part, whole, path):
            of_map = any(graph.is_map(m) and graph.is_of_features(part, m) for m in skipped[n:])
            others = (node for node in path if whole in graph.nodes[node].inputs)
            return not of_map or any(graph.readers.get(node, set()) - path.keys() for node in others)
    return False


def _begin_apart(graph: Graph, skip: int, state: int, path: dict[int, int]) -> bool:
    def part(node: int) -> bool:
        return graph.nodes[node].op in SLICES and graph.size(node) < graph.size(state)

    begins, shape = [n for n in path if state in graph.nodes[n].inputs], graph.nodes[skip].shape
    # A branch of one stream that is added to all of them, as in hyper-connections, does not begin at other parts.
    return part(skip) and all(part(n) and n != skip and graph.nodes[n].shape == shape for n in begins)


def _parallel(
    graph: Graph, addition: Addition, skip: int, branch: int, start: int, results: dict[int, StepCall]
) -> Match | None:
    """A further branch of the state of a step that the skip is the result of, or of one before it.

    A linear map of a state several steps earlier is that state, given again.
    """
    passed: set[int] = set()
    while (node := next((n for n in graph.handed_on(skip, start) if n in results), None)) is not None:
        one = results[node]
        passed.add(node)
        skip = one.source
        if one.first is not None:  # its state is older than its skip
            continue
        ancestors = graph.ancestors(branch, start, one.state)
        if one.state in ancestors and passed.isdisjoint(ancestors):
            path = graph.path(one.state, branch, ancestors)
            way = (n for n in path if n != one.state and graph.nodes[n].op not in NORMS)
            later = any(results[n].head is not one for n in passed)
            injected = later and all(graph.is_linear(n, path) for n in way)
            # A stream of its own from the same state; but a read-out sums up one stream, state by state.
            carries = [is_carried(graph, [one.state], n, as_it_is=True) for n in (branch, one.branch)]
            twin = any(results[n].made_as(one) for n in graph.same(branch, start) if n in results)
            other = injected or twin or carries == [True, False] or _passes_levels(graph, path, one.state, branch)
            if graph.mixes(path, one.state) and not other:
                return Match("parallel", one.state, set(path) - {one.state}, one)
    return None
