"""What is a step: classify the additions of a trace.

A residual step is an addition of a skip `s` and a branch `f` where `f` was computed from `s` (identity), where both
came from one state, `s` by a shape-matching map only (projection), or where `f` is a further branch of the state of a
step that `s` is the result of (parallel). A step whose branch runs through other steps is long.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from eulernet._find.trace import ADDITIONS, SLICES, Addition, Trace

VIEWS = frozenset(
    "view reshape flatten unflatten permute transpose t T mT H mH swapaxes swapdims movedim moveaxis squeeze unsqueeze "
    "ravel contiguous view_as reshape_as unsafe_view as_strided alias data atleast_1d atleast_2d atleast_3d "
    "getitem chunk split tensor_split unbind narrow select slice unsafe_chunk unsafe_split".split()
)
CASTS = frozenset(
    "to to_copy type type_as float half bfloat16 double clone cpu cuda requires_grad lift_fresh copy positive".split()
)
_DROPOUTS = frozenset(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout native_dropout".split()
)
_ACTIVATIONS = frozenset(
    "relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh softplus softsign "
    "logsigmoid prelu rrelu threshold clamp clamp_min clip tanhshrink softshrink hardshrink".split()
)
_NORMS = frozenset(
    "batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm normalize native_batch_norm "
    "native_layer_norm native_group_norm".split()
)
_JOINS = frozenset("cat concat concatenate".split())
_PADS = frozenset("pad constant_pad_nd zeropad2d".split()) | _JOINS
_SCALES = frozenset("mul multiply rmul div divide true_divide imul".split())
_MAPS = re.compile(
    r"conv|linear|matmul|(^|_)(mm|bmm|mv|dot|inner|outer|addr|ger)$|addb?mm|addmv|baddbmm|einsum|tensordot|multi_dot|"
    r"^bilinear$|attention|lstm|gru|rnn|fft|::"
)
_POOLS = re.compile(r"pool")
_REDUCTIONS = frozenset("max amax mean".split())  # pooling by hand, over a reshaped axis
_UPSAMPLES = re.compile(r"interpolate|upsample|conv_transpose|pixel_shuffle")
_SAME = VIEWS | CASTS | _DROPOUTS | _ACTIVATIONS
_MATCHING = _SAME | _NORMS | _PADS | _SCALES | _REDUCTIONS


# A decomposition, x - pool(x), is seen here and is no step.
MatchKind = Literal["identity", "projection", "parallel", "decomposition"]


@dataclass(eq=False)
class StepCall:
    """One addition that is a step, as it ran once."""

    addition: Addition
    kind: MatchKind
    skip: int  # the node of the skip operand
    branch: int
    skip_is_left: bool
    state: int  # the node that skip and branch come from
    within: set[int] = field(default_factory=set)  # the nodes on the way from the state to the branch
    weak: bool = False  # maps away from what its module was given: no step of its own inside another step's branch
    long: bool = False
    coupled: bool = False  # with the step whose branch it is in, and which is in its branch
    first: StepCall | None = None  # parallel: the call of the first place
    before: tuple[StepCall, ...] = ()  # the calls before it in its stream
    position: int = 1  # in its stream, from 1
    stream: int = 0
    depth: int = 1

    @property
    def supported(self) -> bool:
        return self.addition.op in ADDITIONS and not self.coupled


class _Graph:
    """The trace's nodes with what the rules ask of them."""

    def __init__(self, trace: Trace) -> None:
        self.nodes = trace.nodes
        self.constant = [node.constant for node in self.nodes]  # made of parameters, buffers and new tensors only
        self.chains: dict[tuple[int, int, float], dict[int, int]] = {}
        self.bare: list[bool] = []  # a mask, a learned scale: neither given, nor looked up in a table, nor mapped
        for index, node in enumerate(self.nodes):
            made = node.op in ("input", "embedding") or self.is_map(index)
            self.bare.append(not made and all(self.bare[i] for i in node.inputs))

    def state_inputs(self, node: int) -> tuple[int, ...]:
        """What it was made of, without the constants, scales and masks where there is a state beside them."""
        inputs = self.nodes[node].inputs
        states = [i for i in inputs if not self.constant[i]] or inputs
        return tuple(i for i in states if not self.bare[i]) or tuple(states)

    def is_map(self, node: int) -> bool:
        return bool(_MAPS.search(self.nodes[node].op))

    def size(self, node: int) -> int:
        size = 1
        for n in self.nodes[node].shape:
            size *= n
        return size

    def same(self, node: int, start: int) -> Iterator[int]:
        """`node` and what it is a mere view, cast, dropout or activation of, back to the call's start."""
        yield node
        while node >= start:
            inputs = self.state_inputs(node)
            # Adding a number keeps a tensor what it is: sum((x, f)) begins with 0 + x.
            op = self.nodes[node].op
            same = op in _SAME or (op in ADDITIONS and len(self.nodes[node].inputs) == 1)
            if not same or len(inputs) != 1 or self.size(inputs[0]) != self.size(node):
                return
            node = inputs[0]
            yield node

    def matched(self, node: int, start: int, most: float = 1) -> Iterator[tuple[int, int]]:
        """`node` and what it comes from by a shape-matching map only, each with the number of maps (at `most`)."""
        maps = 0
        yield node, maps
        while node >= start:
            op = self.nodes[node].op
            inputs = self.state_inputs(node)
            maps += self.is_map(node)
            if op in _JOINS and len(inputs) > 1:
                whole = self._whole(inputs, start, most)
                if whole is None or maps + whole[1] > most:
                    return
                node, maps = whole[0], maps + whole[1]
                yield node, maps
                continue
            simple = op in _MATCHING or _POOLS.search(op)
            if len(inputs) != 1 or maps > most or not (simple or self.is_map(node)):
                return
            node = inputs[0]
            yield node, maps

    def _whole(self, parts: tuple[int, ...], start: int, most: float) -> tuple[int, int] | None:
        """What all parts come from by shape-matching maps only, as where the class token is taken apart for pooling."""
        for part in parts:  # kept, since what was joined may be joined again, and again
            if (part, start, most) not in self.chains:
                self.chains[part, start, most] = dict(self.matched(part, start, most))
        chains = [self.chains[part, start, most] for part in parts]
        common = set(chains[0]).intersection(*chains[1:])
        return (max(common), max(chain[max(common)] for chain in chains)) if common else None

    def ancestors(self, node: int, start: int, floor: int) -> set[int]:
        """The nodes that `node` was computed from, within a call that began at `start`, none older than `floor`."""
        found = {node}
        pending = [node]
        while pending:
            current = pending.pop()
            if current >= start and current > floor:
                for i in self.nodes[current].inputs:
                    if i >= floor and i not in found:
                        found.add(i)
                        pending.append(i)
        return found

    def path(self, state: int, branch: int, ancestors: set[int]) -> dict[int, int]:
        """The nodes on the way from `state` to `branch`, each with the largest number of maps passed so far."""
        maps = {state: 0}
        for node in sorted(ancestors):
            if node > state:
                passed = [maps[i] for i in self.nodes[node].inputs if i in maps]
                if passed:
                    maps[node] = max(passed) + self.is_map(node)
        if branch not in maps:
            return {}
        back = {branch}  # keep only what leads on to the branch
        for node in sorted(maps, reverse=True):
            if node in back and node != state:
                back.update(i for i in self.nodes[node].inputs if i in maps)
        return {node: maps[node] for node in maps if node in back}

    def mixes(self, path: dict[int, int], state: int) -> bool:
        return any(n != state and (self.is_map(n) or _POOLS.search(self.nodes[n].op)) for n in path)


def classify(trace: Trace) -> list[StepCall]:
    """The steps of one run, long ones and unsupported ones included, in the order in which they ran."""
    graph = _Graph(trace)
    step_calls: list[StepCall] = []
    results: dict[int, StepCall] = {}
    for addition in trace.additions:
        step_call = _step_call(graph, trace, addition, results)
        if step_call is not None:
            step_calls.append(step_call)
            if step_call.supported and step_call.kind != "decomposition":
                results[addition.result] = step_call
    kept = _keep(graph, step_calls)
    _streams(graph, kept)
    return kept


def _step_call(graph: _Graph, trace: Trace, addition: Addition, results: dict[int, StepCall]) -> StepCall | None:
    call = trace.calls[addition.call]
    parent = trace.calls[call.parent] if call.parent >= 0 else None
    for skip_is_left in (True, False):
        pairs = [(addition.left, right) if skip_is_left else (right, addition.left) for right in addition.right]
        if not skip_is_left and addition.op not in ("add", "iadd"):
            break
        for skip, branch in pairs:
            given, maps = list(graph.matched(skip, call.start))[-1]
            begun_by_caller = parent is not None and given < call.start and maps == 0
            for start in (call.start, parent.start) if parent is not None and begun_by_caller else (call.start,):
                found = _identity(graph, skip, branch, start) or _parallel(graph, skip, branch, start, results)
                if not found and addition.op in ADDITIONS:
                    found = _projection(graph, skip, branch, start)
                if found:
                    kind, state, within, weak, first = found
                    if kind == "identity" and "sub" in addition.op and not any(map(graph.is_map, within)):
                        kind, weak = "decomposition", True  # the state without what pooling took out of it (Autoformer)
                    return StepCall(addition, kind, skip, branch, skip_is_left, state, within, weak, first=first)
    return None


class Match(NamedTuple):
    """What an addition is found to be; the fields are those of `StepCall`."""

    kind: MatchKind
    state: int
    within: set[int]
    weak: bool
    first: StepCall | None = None


def _identity(graph: _Graph, skip: int, branch: int, start: int) -> Match | None:
    chain = list(graph.same(skip, start))
    ancestors = graph.ancestors(branch, start, chain[-1])
    for state in chain:
        if state in ancestors and state != branch:
            path = graph.path(state, branch, ancestors)
            if graph.mixes(path, state):
                given, maps = list(graph.matched(state, start, most=math.inf))[-1]
                weak = given < start and maps > 0
                return Match("identity", state, set(path) - {state}, weak)
    return None


def _projection(graph: _Graph, skip: int, branch: int, start: int) -> Match | None:
    chain = list(graph.matched(skip, start))
    ancestors = graph.ancestors(branch, start, chain[-1][0])
    for (after, _), (state, maps) in itertools.pairwise(chain):
        if state in ancestors:
            path = graph.path(state, branch, ancestors)
            resized = any(n != state and _UPSAMPLES.search(graph.nodes[n].op) for n in path)
            if path and path[branch] > maps and not resized and not _are_other_parts(graph, state, after, path):
                return Match("projection", state, set(path) - {state}, weak=True)
    return None


def _are_other_parts(graph: _Graph, state: int, skip: int, path: dict[int, int]) -> bool:
    """Whether the skip is one part of the state and the branch begins at other parts only, as in Res2Net."""

    def part(node: int) -> bool:
        return graph.nodes[node].op in SLICES and graph.size(node) < graph.size(state)

    begins = [n for n in path if state in graph.nodes[n].inputs]
    return part(skip) and all(part(n) and n != skip for n in begins)


def _parallel(graph: _Graph, skip: int, branch: int, start: int, results: dict[int, StepCall]) -> Match | None:
    for node in graph.same(skip, start):
        first = results.get(node)
        if first is not None:
            ancestors = graph.ancestors(branch, start, first.state)
            if first.state in ancestors and node not in ancestors:
                path = graph.path(first.state, branch, ancestors)
                if graph.mixes(path, first.state):
                    return Match("parallel", first.state, set(path) - {first.state}, first.weak, first.first or first)
            return None
    return None


def _keep(graph: _Graph, step_calls: list[StepCall]) -> list[StepCall]:
    """Decide which steps are long, and leave out what is no step of the stream."""
    _mark_long([e for e in step_calls if e.supported], strong_only=True)
    of_the_state = []
    for step_call in step_calls:
        holder = _holder(step_call, step_calls) if step_call.long else None
        # What else is handed down, positions, biases and scores, has another shape than the stream's state.
        step_call.coupled = (
            holder is not None
            and holder.kind != "decomposition"
            and graph.nodes[step_call.state].shape == graph.nodes[holder.state].shape
        )
        handed_down = step_call.long and (
            graph.constant[step_call.state] or (holder is not None and not step_call.coupled)
        )
        if not handed_down and step_call.kind != "decomposition":
            of_the_state.append(step_call)
    kept: list[StepCall] = []
    for step_call in reversed(of_the_state):  # what ends later is outside
        inside = any(step_call.addition.result in outer.within and not outer.long for outer in kept)
        if not (step_call.weak and inside):
            kept.append(step_call)
    kept.reverse()
    still = {id(e) for e in kept}
    kept = [e for e in kept if e.first is None or id(e.first) in still]
    _mark_long([e for e in kept if e.supported], strong_only=False)
    return kept


def _mark_long(step_calls: list[StepCall], *, strong_only: bool) -> None:
    """A step is long where its branch runs through other steps that are not long themselves."""
    results: set[int] = set()
    for step_call in step_calls:
        step_call.long = not results.isdisjoint(step_call.within)
        if not step_call.long and not (strong_only and step_call.weak):
            results.add(step_call.addition.result)


def _holder(step_call: StepCall, step_calls: list[StepCall]) -> StepCall | None:
    """The step in whose branch the "skip" of a call is, while that step is in the call's branch."""
    return next(
        (e for e in step_calls if step_call.state in e.within and e.addition.result in step_call.within and not e.long),
        None,
    )


def _streams(graph: _Graph, step_calls: list[StepCall]) -> None:
    """Number the streams, the chains from skip to result, and count the calls in each.

    A long step and the steps inside its branch are streams of their own.
    """
    inside = {
        id(e): frozenset(id(o) for o in step_calls if o.long and e.addition.result in o.within) for e in step_calls
    }
    ends = {e.addition.result: e for e in step_calls if e.supported}
    streams = 0
    for long in (False, True):
        before: list[frozenset[StepCall]] = []  # for each node, the nearest steps of this kind that it comes from
        for index, node in enumerate(graph.nodes):
            step_call = ends.get(index)
            if step_call is None:
                before.append(frozenset().union(*(before[i] for i in node.inputs)))
            elif step_call.long != long:
                before.append(before[step_call.skip])
            else:
                nearest = step_call.first.before if step_call.first is not None else before[step_call.skip]
                step_call.before = tuple(e for e in nearest if inside[id(e)] == inside[id(step_call)])
                step_call.position = 1 + max((e.position for e in step_call.before), default=0)
                before.append(frozenset((step_call,)))
        members = [e for e in step_calls if e.long == long]
        for step_call in members:
            start = max(step_call.before, key=lambda e: e.position, default=step_call.first)
            step_call.stream = streams if start is None else start.stream
            streams += start is None
            step_call.depth = step_call.position
        for step_call in reversed(members):  # D is the length of the longest chain through the step
            for other in (*step_call.before, *([step_call.first] if step_call.first is not None else [])):
                other.depth = max(other.depth, step_call.depth)
        for step_call in members:
            if step_call.first is not None:
                step_call.depth = step_call.first.depth
