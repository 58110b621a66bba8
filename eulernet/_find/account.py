"""Every sum is accounted for: what was left out and why, what still computes at h = 0, and what a trace has seen twice.

All of it is read off the trace, beside the rules: a missed block shows by its name whatever the rules said of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from eulernet._find.graph import Graph, StepCall
from eulernet._find.operations import NORMS
from eulernet._find.trace import Addition, Trace
from eulernet._plot import ranges
from eulernet._step import ROOT, LeftOut, Outside, Reason

Names = Mapping[nn.Module, str]
Originals = Mapping[nn.Module, nn.Module]  # a copy's modules -> the model's


class Origin(NamedTuple):
    """The module that makes a sum, and where it stands."""

    module: nn.Module
    file: str
    line: int
    function: str
    columns: tuple[int | None, ...] = ()


def origin_of(addition: Addition, trace: Trace, originals: Originals, model: nn.Module) -> Origin:
    """Where a sum stands; one that an operator makes without a frame belongs to the module that was called."""
    called = originals.get(trace.calls[addition.call].module, model) if trace.calls else model
    module = next((originals[m] for f in addition.frames if (m := f.module) is not None and m in originals), called)
    if not addition.frames:
        return Origin(module, "", 0, "")
    code = addition.frames[0].code
    line, _, *columns = list(code.co_positions())[addition.frames[0].lasti // 2]
    return Origin(module, code.co_filename, line or code.co_firstlineno, code.co_qualname, tuple(columns))


# ---- what was left out


def left_out(seen: Iterable[tuple[Origin, Reason, int]], names: Names, ends: Mapping[int, int]) -> list[LeftOut]:
    """One entry a place and reason, in the order of execution.

    Args:
        seen: each with the node of its result.
        ends: the nodes at which steps end -> the indices of the steps.
    """
    counts: Counter[tuple[str, str, str, int, str, Reason]] = Counter()
    first: dict[tuple[str, str, str, int, str, Reason], int | None] = {}
    for at, why, node in seen:
        key = names[at.module], type(at.module).__name__, at.file, at.line, at.function, why
        counts[key] += 1
        if key not in first:
            last = max((end for end in ends if end < node), default=None)
            first[key] = None if last is None else ends[last]
    return [LeftOut(*key, calls, first[key]) for key, calls in counts.items()]


def unequal_twins(seen: Iterable[tuple[Origin, bool]], names: Names) -> Iterator[str]:
    """Sums of one place in the source, outside of all branches, that are steps in some modules and none in others."""
    places: dict[tuple[type[nn.Module], str, int, Any], tuple[dict[str, None], dict[str, None]]] = {}
    for origin, is_step in seen:
        key = type(origin.module), origin.file, origin.line, origin.columns
        places.setdefault(key, ({}, {}))[not is_step][names[origin.module]] = None
    for (cls, file, line, _), (steps, others) in places.items():
        without = [name for name in others if name not in steps]
        if steps and without:
            yield (
                f"the addition at {file}:{line} is a step in {len(steps)} of {len(steps) + len(without)} modules of "
                f"class {cls.__name__}, and none in {', '.join(without[:5])}{' ...' if len(without) > 5 else ''}; "
                "left_out and unsupported of eulernet.find_steps(model) say why"
            )


# ---- what still computes at h = 0


def reached_at_zero(graph: Graph, steps: Iterable[StepCall]) -> set[int]:
    """The nodes that the output comes from where each step is its skip only: the main stream, and what makes it."""
    cut = {e.addition.result: e.skip for e in steps}
    seen: set[int] = set()
    pending = list(graph.outputs)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            made = graph.nodes[node]
            read = tuple(a for a in made.args if isinstance(a, int)) if made.op == "detach" else made.inputs
            pending += [cut[node]] if node in cut else read[1:] if _is_written_anew(graph, node) else read
    return seen


def _is_written_anew(graph: Graph, node: int) -> bool:
    """Whether it is a view of a tensor that was written in place as a whole: of its old value nothing is left."""
    made = graph.nodes[node]
    if made.op != "overwritten":
        return False
    view, write = made.inputs
    return graph.size(view) == graph.size(write) and not set(graph.nodes[write].inputs).isdisjoint(graph.same(view, 0))


def outside(graph: Graph, trace: Trace, originals: Originals, names: Names, reached: Collection[int]) -> Outside:
    """Which parameters lie outside of all branches, by the outermost modules that hold no others.

    The norms between two steps, which a post-norm network has everywhere, are counted and not named. Nothing is known
    where no tensor was returned.
    """
    if not trace.outputs:
        return Outside()
    inside: dict[str, int] = {}
    beyond: dict[str, int] = {}
    shown: dict[str, int] = {}  # with the nodes
    known: set[int] = set()
    for twin, module in originals.items():
        for name, parameter in twin.named_parameters(recurse=False):
            node = trace.used.get(id(parameter))
            if node is None or id(parameter) in known:
                continue
            known.add(id(parameter))
            name = f"{names[module]}.{name}".removeprefix(f"{ROOT}.")
            (beyond if node in reached else inside)[name] = parameter.numel()
            if node in reached and not _is_between_steps(graph, node):
                shown[name] = node
    held = {prefix for name in inside for prefix in prefixes(name)}
    in_order = sorted(shown, key=lambda name: shown[name])
    outermost = dict.fromkeys(next(p for p in (*prefixes(name), name) if p not in held) for name in in_order)
    total = sum(inside.values()) + sum(beyond.values())
    return Outside(tuple(_in_ranges(outermost)), sum(beyond.values()), total)


def _is_between_steps(graph: Graph, parameter: int) -> bool:
    """Whether a parameter is one of a norm alone that takes the result of a sum, and whose result is added to again."""
    readers = graph.readers.get(parameter, set())
    norms = [n for n in readers if graph.nodes[n].op in NORMS]
    return len(norms) == len(readers) > 0 and all(
        graph.sums.intersection(graph.nodes[n].inputs) and graph.sums.intersection(graph.readers.get(n, ()))
        for n in norms
    )


def prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _in_ranges(names: Iterable[str]) -> list[str]:
    """`up.0.fc.0`, `up.0.fc.1`, `up.1.fc.0`, `up.1.fc.1` as `up.0-1.fc.0-1`: names that differ in one number."""
    split = [re.split(r"(\d+)", name) for name in names]
    for place in range(1, max(map(len, split), default=0), 2):
        groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[list[str]]] = {}
        for parts in split:
            groups.setdefault((tuple(parts[:place]), tuple(parts[place + 1 :])), []).append(parts)
        split = []
        for (before, after), group in groups.items():
            numbers = [int(parts[place]) for parts in group if len(parts) > place]
            split += [[*before, text, *after] for text in ranges(numbers)] if numbers else group
    return ["".join(parts) for parts in split]
