"""Where no source can be rewritten, `s + f` becomes `s + h * ((s + f) - s)`, by the expression that gives the sum.

It is the last resort: scripted and compiled functions, `sum`, a sum over a stack, fused operations, functions with a
backward of their own, gated updates. One more run of the copies proves, by the identity of the trace's nodes, that the
value of the expression is the sum each time it runs, that the skip is at hand there and was not written into, and that
nothing else reads the sum.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from eulernet._errors import EulernetError
from eulernet._find.locate import Location, locate
from eulernet._find.sandbox import Sandbox
from eulernet._find.search import Run
from eulernet._find.sites import TracedSite, Unplaced
from eulernet._find.trace import ADDITIONS, HANDED_ON, Ref, Trace
from eulernet._patch.subclass import patched_class
from eulernet._run.factor import StepFactor
from eulernet._run.patched import CALL_VIA, FACTORS, PROBE, STEPS, Patched, restore_class
from eulernet._source import TO_BE_SEEN, Span, Unsupported

_OTHERS = "what gives it as its value runs for others as well"


@dataclass(eq=False)
class _Place:
    """An expression of a module's method, or of a function that it calls, that may give a sum as its value."""

    host: nn.Module
    location: Location
    seen: dict[bool, list[_Seen]] = field(default_factory=dict)  # training -> its runs

    @property
    def to_be_seen(self) -> Any:
        *calls, (target, span) = self.location.targets
        return (*calls, (target, replace(span, skip=TO_BE_SEEN)))


class _Seen(NamedTuple):
    """One run of an expression: the nodes of its value and of that as it was handed on, of the variables, of the
    operands."""

    value: int | None
    handed_on: int
    names: dict[str, int]
    operands: dict[Span, int]


def by_difference(sums: Sequence[Unplaced], runs: Sequence[Run], traces: Sequence[Trace]) -> list[TracedSite | str]:
    """For each sum the place at which it is scaled by difference, or the reason why there is none."""
    registered = {twin for run in runs for twin in run.sandbox.copy.modules()}
    known = (item for run in runs for item in run.sandbox.original.items())
    originals = {twin: module for twin, module in known if twin in registered}
    places: dict[Any, _Place] = {}
    around = [list(_places_around(each, originals, places)) for each in sums]
    before = {run.training: trace for run, trace in zip(runs, traces, strict=True)}
    after: dict[bool, Trace] = {}
    try:
        for sandbox in {id(run.sandbox): run.sandbox for run in runs}.values() if places else ():
            _probe(sandbox, [run for run in runs if run.sandbox is sandbox], [*places.values()], after)
    except Exception as error:
        return [f"{each.reason} (and a look at its value failed: {type(error).__name__})" for each in sums]
    return [_proven(each, at, before, after) for each, at in zip(sums, around, strict=True)]


def _places_around(sum_: Unplaced, originals: Any, places: dict[Any, _Place]) -> Iterator[_Place]:
    """The expressions that may give the sum, from the innermost one outwards."""
    calls = [*sum_.step_calls[False], *sum_.step_calls[True]]
    addition = calls[0].addition
    if any(e.coupled or not e.sums for e in calls):
        return
    for outwards in range(addition.inside, len(addition.frames)):
        try:
            twin, location = locate(addition, True, outwards)
        except (Unsupported, EulernetError):
            continue
        if twin in originals:
            place = _Place(originals[twin], location)
            yield places.setdefault((place.host, location.targets), place)


# ---- the run


def _probe(sandbox: Sandbox, runs: Sequence[Run], places: list[_Place], traces: dict[bool, Trace]) -> None:
    twins: dict[nn.Module, Any] = {module: twin for twin, module in sandbox.original.items()}
    watched: list[Any] = []
    try:
        for host in dict.fromkeys(place.host for place in places):
            mine = [place for place in places if place.host is host]
            twin = twins[host]
            plan = tuple((place.to_be_seen, 0, True, False) for place in mine)
            twin.__dict__[FACTORS], twin.__dict__[STEPS] = [StepFactor(1.0)], []
            twin.__class__ = patched_class(type(twin), plan)
            twin.__dict__[CALL_VIA] = _leniently(twin)
            watched.append((twin, mine))
        for run in runs:
            for twin, mine in watched:
                twin.__dict__[PROBE] = _Probe(sandbox, [place.seen.setdefault(run.training, []) for place in mine])
            traces[run.training] = sandbox.run(run.args, run.kwargs, training=run.training)
    finally:
        for twin, _ in watched:
            twin.__dict__.pop(PROBE, None)
            twin.__dict__.pop(CALL_VIA, None)
            restore_class(twin)


def _leniently(twin: Any) -> Any:
    """Calls what is called, where that is not what was seen: then the expression in it does not run."""

    def call(callee: Any, number: int) -> Any:
        try:
            return Patched._euler_via(twin, callee, number)
        except (EulernetError, Unsupported):
            return callee

    return call


class _Probe:
    """Is called with the value of an expression, and before with those of its operands."""

    def __init__(self, sandbox: Sandbox, seen: list[list[_Seen]]) -> None:
        self.sandbox = sandbox
        self.seen = seen
        self.operands: dict[int, dict[Span, Any]] = {}

    def __call__(self, value: Any, place: int, operand: tuple[int, int, int, int] | None = None) -> Any:
        tracer: Any = self.sandbox.tracer
        if operand is not None:
            self.operands.setdefault(place, {})[Span(*operand)] = value
            return value

        def nodes(held: dict[Any, Any]) -> dict[Any, int]:
            known = {name: tracer.peek(v) for name, v in held.items() if isinstance(v, Tensor)}
            return {name: node for name, node in known.items() if node is not None}

        names, operands = nodes(sys._getframe(1).f_locals), nodes(self.operands.pop(place, {}))
        if not isinstance(value, Tensor):
            self.seen[place].append(_Seen(None, 0, names, operands))
            return value
        node, other = tracer.peek(value), tracer.handed_on(value)
        self.seen[place].append(_Seen(node, tracer.peek(other), names, operands))
        return other


# ---- the proof


def _proven(sum_: Unplaced, places: list[_Place], before: Any, after: dict[bool, Trace]) -> TracedSite | str:
    reasons = []
    for place in places:
        try:
            skip = _skip(sum_, place, before, after)
        except Unsupported as why:
            reasons.append(str(why))
            continue
        *calls, (target, span) = place.location.targets
        location = replace(place.location, targets=(*calls, (target, replace(span, skip=skip))))
        return TracedSite(location, place.host, place.host, True, False, sum_.step_calls)
    told = [why for why in reasons if why != _OTHERS]  # the innermost that runs for it alone
    return f"{sum_.reason}; {told[0]}" if told else sum_.reason


def _skip(sum_: Unplaced, place: _Place, before: dict[bool, Trace], after: dict[bool, Trace]) -> str | Span:
    """The variable or operand that holds the skip each time the expression gives the sum."""
    at_hand: list[set[Any]] = []
    for mode, step_calls in sum_.step_calls.items():
        observed = place.seen.get(mode, [])
        if len(observed) != len(step_calls):
            raise Unsupported(_OTHERS)
        if not observed:
            continue
        trace = after[mode]
        number = _Renumbered(before[mode], trace)
        readers = _readers(trace)
        for one, step_call in zip(observed, step_calls, strict=True):
            chain = _handed(trace, one.value)
            if not chain or chain[-1] != number(step_call.addition.result):
                raise Unsupported("the call that makes it does more with it")
            if any(readers[n] - {one.handed_on} - set(chain) for n in chain):
                raise Unsupported("the sum is kept, or read before it is handed back")
            values = _values(trace, number(step_call.skip))
            held = [*one.names.items(), *one.operands.items()]
            at_hand.append({name for name, node in held if _handed(trace, node)[-1] in values})
    common = set.intersection(*at_hand)
    names = sorted(name for name in common if isinstance(name, str) and name.isidentifier())
    spans = sorted(span for span in common if isinstance(span, Span))
    if not names and not (spans and place.location.keeps):
        raise Unsupported("what it is added to is not at hand where it is called, or was written into")
    return names[0] if names else spans[0]


class _Renumbered:
    """The nodes of a run in another one, in which values were handed on besides."""

    def __init__(self, before: Trace, after: Trace) -> None:
        self.kept = [n for n, node in enumerate(after.nodes) if node.op != HANDED_ON]
        if [n.op for n in before.nodes] != [after.nodes[n].op for n in self.kept]:
            raise Unsupported("it does not run in the same way each time")

    def __call__(self, node: int) -> int:
        return self.kept[node]


def _handed(trace: Trace, node: int | None) -> list[int]:
    """A value, and what it was before expressions in it handed it on."""
    chain = [] if node is None else [node]
    while chain and trace.nodes[chain[-1]].op == HANDED_ON:
        chain += trace.nodes[chain[-1]].inputs
    return chain


def _readers(trace: Trace) -> dict[int, set[int]]:
    """Who reads each node, detached or not; -1 is who called the model."""
    readers: dict[int, set[int]] = {n: set() for n in range(len(trace.nodes))}
    for number, node in enumerate(trace.nodes):
        for read in {*node.inputs, *_refs((node.args, list(node.kwargs.values())))}:
            readers[read].add(number)
    for output in trace.outputs:
        readers[output].add(-1)
    return readers


def _refs(value: Any) -> Iterator[int]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _refs(item)
    elif isinstance(value, dict):
        yield from _refs(list(value.values()))


def _values(trace: Trace, node: int) -> set[int]:
    """The nodes that have the value of a node: sum((x, f)) begins with 0 + x, a script that ran before with aliases."""
    found = {node}
    while (made := trace.nodes[node]).op == "alias" or (
        made.op in ADDITIONS and len(made.inputs) == 1 and 0 in made.args
    ):
        node = _handed(trace, made.inputs[0])[-1]
        found.add(node)
    return found
