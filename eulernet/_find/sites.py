"""The places in the source at which the traced steps are made, and which of them are one step.

In a loop, `for attn, ff in self.layers: x = attn(x) + x`, one addition of the source is a step for each layer. What
tells them apart is the module that made the branch, the key: the callee of a call that stands in the same function.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from eulernet._errors import EulernetError
from eulernet._find.account import Origin
from eulernet._find.graph import StepCall
from eulernet._find.locate import Location, keyed, locate, nowhere
from eulernet._find.trace import ADDITIONS, Addition, ModuleCall, Trace
from eulernet._run import known
from eulernet._source import Targets, Unsupported, positions_of

Originals = dict[nn.Module, nn.Module]  # a copy's modules -> the model's
COUPLED = (
    "it and another step run through each other's branches, as in a reversible network, of which eulernet scales one "
    "half at most"
)


@dataclass(eq=False)
class TracedSite:
    """One addition of the source, with the runs in which it is a step."""

    location: Location
    module: nn.Module  # which gives the step its name
    host: nn.Module  # whose method holds the addition; another one than `module` where that is a key
    skip_is_left: bool
    subtracts: bool
    step_calls: dict[bool, list[StepCall]]  # training -> its runs
    error: EulernetError | None = None
    again: bool = False  # whether it is made again in the backward of a function that it runs in
    on_constants: Counter[bool] = field(default_factory=Counter)  # training -> how often it runs on no input besides

    @property
    def calls(self) -> tuple[int, int]:
        eval_, train = (len(self.step_calls[mode]) + self.on_constants[mode] for mode in (False, True))
        return eval_, train


@dataclass(eq=False)
class Unplaced:
    """An addition that is a step, where none of its source can be rewritten as such, and why."""

    at: Origin
    reason: str
    step_calls: dict[bool, list[StepCall]] = field(default_factory=lambda: {False: [], True: []})


def origin(made: Addition | StepCall, originals: Originals) -> Any:
    """Tells the runs of one addition of one module."""
    frames = (made.addition if isinstance(made, StepCall) else made).frames
    last = next((i for i, f in enumerate(frames) if f.module is not None), len(frames))
    modules = (originals.get(f.module, f.module) if f.module is not None else None for f in frames)
    # By the expression and not by the instruction: a call to C has two, and Python changes from one to the other.
    places = ((f.code, positions_of(f.code)[f.lasti // 2]) for f in frames[: last + 1])
    return tuple((*place, id(module)) for place, module in zip(places, modules, strict=False))


def site_of(step_call: StepCall, originals: Originals, sites: dict[Any, TracedSite], again: bool = False) -> TracedSite:
    """Where an addition stands in the source, among the sites that are known already.

    `again`: the backward of the function that it runs in, if it runs in one, makes it again.
    """
    addition = step_call.addition
    if step_call.coupled:
        raise Unsupported(COUPLED)
    if step_call.mixture:
        raise Unsupported("it mixes what it is added to with what is added")
    if "sub" in addition.op and not step_call.skip_is_left:
        raise Unsupported("it subtracts a state from the branch; written as 2 * x - before + f(x) it is scaled")
    if addition.op not in ADDITIONS:
        does = "adds lists of tensors" if addition.op.startswith("foreach") else "adds and does something else"
        raise Unsupported(f"{addition.op} {does} in one operation")
    if addition.function is not None and not again:
        raise Unsupported(
            f"it runs in {addition.function}, a torch.autograd.Function, whose own backward knows nothing of h"
        )
    error = None
    try:
        twin, location = locate(addition, step_call.skip_is_left)
    except EulernetError as reason:
        error, (twin, location) = reason, nowhere(addition)
    module = originals.get(twin)
    if module is None:
        raise Unsupported(f"the {type(twin).__name__} that makes it is no part of the model")
    new = TracedSite(
        location, module, module, step_call.skip_is_left, "sub" in addition.op, {False: [], True: []}, error, again
    )
    site = sites.setdefault((id(module), location.targets or location.position), new)
    if site.skip_is_left != step_call.skip_is_left:
        raise Unsupported("its skip is the left operand in one call and the right one in another")
    return site


def without_place(place: Unplaced, calls: list[StepCall], reason: str) -> TracedSite | None:
    """A gated update that cannot be scaled is reported like others that are left alone: an error where it is asked."""
    if any(e.kind != "gated" for e in calls):
        return None
    try:
        _, location = nowhere(calls[0].addition)
    except Unsupported:
        return None
    module = place.at.module
    at = f"{place.at.file}:{place.at.line}"
    error = EulernetError(f"the update at {at} cannot be scaled: {reason}.")
    return TracedSite(location, module, module, calls[0].skip_is_left, False, place.step_calls, error)


def with_callees(sites: Sequence[TracedSite]) -> None:
    """Let each call that leads to several functions know them all, whichever of their steps will be chosen."""
    callees: dict[Targets, set[str]] = defaultdict(set)
    for site in sites:
        for i, (target, _) in enumerate(site.location.targets):
            callees[site.location.targets[:i]].add(target.digest)
    for site in sites:
        targets = list(site.location.targets)
        for i, (target, span) in enumerate(targets[:-1], 1):
            if len(known := callees[site.location.targets[:i]]) > 1:
                targets[i - 1] = target, replace(span, callees=tuple(sorted(known)))
        site.location = replace(site.location, targets=tuple(targets))


Group = list[TracedSite]  # the sites of one step


def step_calls_of(group: Group) -> list[StepCall]:
    """What ran, in eval mode where anything did."""
    return [e for s in group for e in s.step_calls[False]] or [e for s in group for e in s.step_calls[True]]


def is_left_alone(group: Group) -> bool:
    """Whether a step is scaled only where it is asked for."""
    return any(e.left_alone for e in step_calls_of(group))


def grouped(sites: list[TracedSite], runs: dict[bool, tuple[Trace, Originals]], model: nn.Module) -> list[Group]:
    """The steps, in the order of execution: one a site or a key of it, but parallel branches in one module are one."""
    split = [by_key(site, runs, model) for site in sites]
    pairs = {(part.module, part.host) for parts in split if len(parts) > 1 for part in parts}
    hosts = Counter(key for key, _ in pairs)
    group_of: dict[int, Group] = {}
    groups: list[Group] = []
    for site, parts in zip(sites, split, strict=True):
        for one in [site] if any(hosts[part.module] > 1 for part in parts) else parts:
            step_calls = [*one.step_calls[False], *one.step_calls[True]]
            group = group_of.get(id(step_calls[0].first))
            if group is None or group[0].module is not one.module or group[0].host is not one.host:
                group = []
                groups.append(group)
            group.append(one)
            group_of.update((id(step_call), group) for step_call in step_calls)
    return sorted(groups, key=lambda group: (not any(s.step_calls[False] for s in group), _first(group)))


def _first(group: Group) -> int:
    return min(step_call.addition.result for step_call in step_calls_of(group))


def by_key(site: TracedSite, runs: dict[bool, tuple[Trace, Originals]], model: nn.Module) -> list[TracedSite]:
    """A site for each module that made its branch, where these differ from call to call."""
    if all(len(calls) < 2 for calls in site.step_calls.values()):
        return [site]
    made = [(mode, e, _makers(e, *runs[mode])) for mode, calls in site.step_calls.items() for e in calls]
    if site.error is not None or len(site.location.targets) != 1 or any(e.long for _, e, _ in made):
        return [site]
    at_all = [at for at in made[0][2] if all(at in makers for _, _, makers in made)]
    if len(made) < 2 or not at_all:
        return [site]
    runs_of_one = len({id(e.first or e) for mode, e, _ in made if mode == made[0][0]})
    of_model = set(model.modules()) - {site.host}
    # What tells most apart, and of equals the last call.
    for at in sorted(at_all, key=lambda at: len({makers[at] for _, _, makers in made}), reverse=True):
        keys = dict.fromkeys(makers[at] for _, _, makers in made)
        if not 2 <= len(keys) <= runs_of_one or not of_model.issuperset(keys):  # else the branches of one step
            continue
        location = keyed(made[0][1].addition, site.location, *at)
        if location is not None:
            of_mode = {mode: [(e, of[at]) for m, e, of in made if m == mode] for mode in (False, True)}
            calls = {key: {mode: [e for e, of in of_mode[mode] if of is key] for mode in of_mode} for key in keys}
            return [replace(site, location=location, module=key, step_calls=calls[key]) for key in keys]
    return [site]


def _makers(step_call: StepCall, trace: Trace, originals: Originals) -> dict[tuple[int, str], nn.Module]:
    """The calls in the source, the last first, that stand on the way from skip to branch, each with what it called: a
    module, or one by the name of its method that calls modules, as in `layer.forward(x)`.

    Only what each called last before the addition, which is what a variable set there holds at the addition.
    """
    addition = step_call.addition
    last: dict[tuple[int, str], nn.Module | None] = {}
    leading: set[tuple[int, str]] = set()
    for call in reversed(trace.calls[addition.call + 1 :]):
        if call.parent != addition.call or call.end > addition.result:
            continue
        called: nn.Module | None = call.module
        method = ""
        for frame in call.frames:
            if frame.code is addition.frames[0].code:
                at = frame.lasti, method
                if last.setdefault(at, called) is called and any(call.start <= n < call.end for n in step_call.within):
                    leading.add(at)
                break
            called, method = frame.module, frame.code.co_name
    return {at: originals[m] for at, m in last.items() if at in leading and m in originals}


def normed(trace: Trace) -> dict[int, ModuleCall]:
    """The nodes that norms take which a step knows, each with the first call of one."""
    taken: dict[int, ModuleCall] = {}
    for call in trace.calls:
        if call.parent >= 0 and known.norm(call.module) is not None:
            for node in trace.nodes[call.start : call.end]:
                for read in node.inputs:
                    taken.setdefault(read, call)
    return taken


def next_norm(
    site: TracedSite, taken: dict[int, ModuleCall], trace: Trace, originals: Originals
) -> tuple[nn.Module, str] | None:
    """The norm that takes the state of a site's step, where another block calls it: that, and the norm's name there."""
    found: set[tuple[nn.Module, str] | None] = set()
    for step_call in site.step_calls[False]:
        call = taken.get(step_call.addition.result)
        block = None if call is None else trace.calls[call.parent].module
        if call is None or block is None or originals.get(block) in (None, site.host):
            return None
        found.add(next(((originals[block], name) for name, m in block._modules.items() if m is call.module), None))
    return found.pop() if len(found) == 1 else None


def pair_modes(groups: list[Group], called: list[set[nn.Module | None]], names: dict[nn.Module, str]) -> Iterator[str]:
    """Eval and train mode may add at different places of one module: those are one step, place by place.

    `called`: the modules that ran, for each mode. What has no partner in the other mode is named.
    """
    if len(called) < 2:
        return
    for module, host in dict.fromkeys((g[0].module, g[0].host) for g in groups):
        if not all(module in modules for modules in called):
            continue
        mine = [g for g in groups if g[0].module is module and g[0].host is host]
        only_eval = [g for g in mine if not any(s.step_calls[True] for s in g)]
        only_train = [g for g in mine if not any(s.step_calls[False] for s in g)]
        if len(only_eval) == len(only_train):
            for one, other in zip(only_eval, only_train, strict=True):
                one.extend(other)
                groups.remove(other)
            continue
        for mode, missing in (("training", only_eval), ("eval mode", only_train)):
            for group in missing:
                location = group[0].location
                yield (
                    f"{names[module]} ({type(module).__name__}) runs in both modes, but in {mode} not the step at "
                    f"{location.file}:{location.line}: there h has no effect on it"
                )
