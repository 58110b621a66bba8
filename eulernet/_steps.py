"""What is a step: classify the additions of a record.

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

from eulernet._trace import ADDITIONS, SLICES, Addition, Record

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


@dataclass(eq=False)
class Event:
    """One addition that is a step, as it ran once."""

    addition: Addition
    kind: str  # identity, projection, parallel, or decomposition, x - pool(x), which is seen here and is no step
    skip: int  # the node of the skip operand
    branch: int
    skip_is_left: bool
    state: int  # the node that skip and branch come from
    within: set[int] = field(default_factory=set)  # the nodes on the way from the state to the branch
    weak: bool = False  # maps away from what its module was given: no step of its own inside another step's branch
    long: bool = False
    coupled: bool = False  # with the step whose branch it is in, and which is in its branch
    first: Event | None = None  # parallel: the event of the first place
    before: tuple[Event, ...] = ()  # the events before it in its stream
    position: int = 1  # in its stream, from 1
    stream: int = 0
    depth: int = 1

    @property
    def supported(self) -> bool:
        return self.addition.op in ADDITIONS and not self.coupled


class _Graph:
    """The record's nodes with what the rules ask of them."""

    def __init__(self, record: Record) -> None:
        self.nodes = record.nodes
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

    def way(self, state: int, branch: int, ancestors: set[int]) -> dict[int, int]:
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

    def mixes(self, way: dict[int, int], state: int) -> bool:
        return any(n != state and (self.is_map(n) or _POOLS.search(self.nodes[n].op)) for n in way)


def classify(record: Record) -> list[Event]:
    """The steps of one run, long ones and unsupported ones included, in the order in which they ran."""
    graph = _Graph(record)
    events: list[Event] = []
    results: dict[int, Event] = {}
    for addition in record.additions:
        event = _event(graph, record, addition, results)
        if event is not None:
            events.append(event)
            if event.supported and event.kind != "decomposition":
                results[addition.result] = event
    kept = _keep(graph, events)
    _streams(graph, kept)
    return kept


def _event(graph: _Graph, record: Record, addition: Addition, results: dict[int, Event]) -> Event | None:
    call = record.calls[addition.call]
    parent = record.calls[call.parent] if call.parent >= 0 else None
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
                    return Event(addition, kind, skip, branch, skip_is_left, state, within, weak, first=first)
    return None


_Found = tuple[str, int, set[int], bool, Event | None]


def _identity(graph: _Graph, skip: int, branch: int, start: int) -> _Found | None:
    chain = list(graph.same(skip, start))
    ancestors = graph.ancestors(branch, start, chain[-1])
    for state in chain:
        if state in ancestors and state != branch:
            way = graph.way(state, branch, ancestors)
            if graph.mixes(way, state):
                given, maps = list(graph.matched(state, start, most=math.inf))[-1]
                weak = given < start and maps > 0
                return "identity", state, set(way) - {state}, weak, None
    return None


def _projection(graph: _Graph, skip: int, branch: int, start: int) -> _Found | None:
    chain = list(graph.matched(skip, start))
    ancestors = graph.ancestors(branch, start, chain[-1][0])
    for (after, _), (state, maps) in itertools.pairwise(chain):
        if state in ancestors:
            way = graph.way(state, branch, ancestors)
            resized = any(n != state and _UPSAMPLES.search(graph.nodes[n].op) for n in way)
            if way and way[branch] > maps and not resized and not _are_other_parts(graph, state, after, way):
                return "projection", state, set(way) - {state}, True, None
    return None


def _are_other_parts(graph: _Graph, state: int, skip: int, way: dict[int, int]) -> bool:
    """Whether the skip is one part of the state and the branch begins at other parts only, as in Res2Net."""

    def part(node: int) -> bool:
        return graph.nodes[node].op in SLICES and graph.size(node) < graph.size(state)

    begins = [n for n in way if state in graph.nodes[n].inputs]
    return part(skip) and all(part(n) and n != skip for n in begins)


def _parallel(graph: _Graph, skip: int, branch: int, start: int, results: dict[int, Event]) -> _Found | None:
    for node in graph.same(skip, start):
        first = results.get(node)
        if first is not None:
            ancestors = graph.ancestors(branch, start, first.state)
            if first.state in ancestors and node not in ancestors:
                way = graph.way(first.state, branch, ancestors)
                if graph.mixes(way, first.state):
                    return "parallel", first.state, set(way) - {first.state}, first.weak, first.first or first
            return None
    return None


def _keep(graph: _Graph, events: list[Event]) -> list[Event]:
    """Decide which steps are long, and leave out what is no step of the stream."""
    _mark_long([e for e in events if e.supported], strong_only=True)
    of_the_state = []
    for event in events:
        holder = _holder(event, events) if event.long else None
        # What else is handed down, positions, biases and scores, has another shape than the stream's state.
        event.coupled = (
            holder is not None
            and holder.kind != "decomposition"
            and graph.nodes[event.state].shape == graph.nodes[holder.state].shape
        )
        handed_down = event.long and (graph.constant[event.state] or (holder is not None and not event.coupled))
        if not handed_down and event.kind != "decomposition":
            of_the_state.append(event)
    kept: list[Event] = []
    for event in reversed(of_the_state):  # what ends later is outside
        inside = any(event.addition.result in outer.within and not outer.long for outer in kept)
        if not (event.weak and inside):
            kept.append(event)
    kept.reverse()
    still = {id(e) for e in kept}
    kept = [e for e in kept if e.first is None or id(e.first) in still]
    _mark_long([e for e in kept if e.supported], strong_only=False)
    return kept


def _mark_long(events: list[Event], *, strong_only: bool) -> None:
    """A step is long where its branch runs through other steps that are not long themselves."""
    results: set[int] = set()
    for event in events:
        event.long = not results.isdisjoint(event.within)
        if not event.long and not (strong_only and event.weak):
            results.add(event.addition.result)


def _holder(event: Event, events: list[Event]) -> Event | None:
    """The step in whose branch the "skip" of an event is, while the step is in the event's branch."""
    return next(
        (e for e in events if event.state in e.within and e.addition.result in event.within and not e.long), None
    )


def _streams(graph: _Graph, events: list[Event]) -> None:
    """Number the streams, the chains from skip to result, and count the calls in each.

    A long step and the steps inside its branch are streams of their own.
    """
    inside = {id(e): frozenset(id(o) for o in events if o.long and e.addition.result in o.within) for e in events}
    ends = {e.addition.result: e for e in events if e.supported}
    streams = 0
    for long in (False, True):
        before: list[frozenset[Event]] = []  # for each node, the nearest steps of this kind that it comes from
        for index, node in enumerate(graph.nodes):
            event = ends.get(index)
            if event is None:
                before.append(frozenset().union(*(before[i] for i in node.inputs)))
            elif event.long != long:
                before.append(before[event.skip])
            else:
                nearest = event.first.before if event.first is not None else before[event.skip]
                event.before = tuple(e for e in nearest if inside[id(e)] == inside[id(event)])
                event.position = 1 + max((e.position for e in event.before), default=0)
                before.append(frozenset((event,)))
        members = [e for e in events if e.long == long]
        for event in members:
            start = max(event.before, key=lambda e: e.position, default=event.first)
            event.stream = streams if start is None else start.stream
            streams += start is None
            event.depth = event.position
        for event in reversed(members):  # D is the length of the longest chain through the step
            for other in (*event.before, *([event.first] if event.first is not None else [])):
                other.depth = max(other.depth, event.depth)
        for event in members:
            if event.first is not None:
                event.depth = event.first.depth
