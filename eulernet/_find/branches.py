"""Which parameters a branch holds."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from eulernet._find.absorb import parameters_read
from eulernet._find.graph import StepCall
from eulernet._find.search import Search
from eulernet._find.trace import Node


def branch_parameters(search: Search) -> dict[nn.Parameter, int]:
    """The parameters that one branch reads, and no other, each with the index of its step.

    They are those that the operations between a step's state and its branch read, as they are or made into something
    else first (a weight that is standardised, keys and values of another sequence). Where a step lies in the branch of
    another, what it holds is its own. What several runs of steps read, as the blocks of an ALBERT or the position bias
    of a T5, is held by none.
    """
    holders: dict[nn.Parameter, set[int]] = defaultdict(set)
    several: set[nn.Parameter] = set()
    for number, (trace, run) in enumerate(zip(search.traces, search.runs, strict=True)):
        parameters = parameters_read(trace, run)
        calls = [
            (index, call)
            for index, of_step in search.step_calls.items()
            for at, call in of_step
            if at == number and not call.long
        ]
        skips = {call.addition.result: call.skip for _, call in calls}
        reading: dict[int, list[tuple[int, StepCall]]] = defaultdict(list)
        for index, call in calls:
            for node in _read(call, trace.nodes, skips) & parameters.keys():
                reading[node].append((index, call))
        for node, by in reading.items():
            inner = [(i, c) for i, c in by if not any(o.addition.result in c.within for _, o in by if o is not c)]
            several |= {parameters[node]} if len({_run(c) for _, c in inner}) > 1 else set()
            holders[parameters[node]] |= {index for index, _ in inner}
    return {p: min(steps) for p, steps in holders.items() if len(steps) == 1 and p not in several}


def _run(call: StepCall) -> int:
    """One number for the places of one parallel step, in one run."""
    while call.first is not None:
        call = call.first
    return call.addition.result


def _read(call: StepCall, nodes: list[Node], skips: dict[int, int]) -> set[int]:
    """The nodes behind what the operations from the state to the branch read, but for what the state came from without
    its branches, and what is behind the result of another step, as the encoder that a decoder looks at."""
    behind: set[int] = set()
    pending = [call.state]
    while pending:
        node = pending.pop()
        if node not in behind:
            behind.add(node)
            pending += [skips[node]] if node in skips else nodes[node].inputs
    inside = call.within - {call.state}
    found: set[int] = set()
    pending = [i for node in inside for i in nodes[node].inputs]
    while pending:
        node = pending.pop()
        if node not in found and node not in behind and node not in inside and node not in skips:
            found.add(node)
            pending += nodes[node].inputs
    return found
