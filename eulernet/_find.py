"""Find the steps of a model: run a copy of it, in eval and in train mode, and classify what it added."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from eulernet._errors import EulernetError
from eulernet._graph import Event
from eulernet._inputs import as_call, guess_inputs
from eulernet._report import ROOT, Place, Step, Steps
from eulernet._rewrite import Site, Unsupported, locate, nowhere
from eulernet._steps import classify
from eulernet._trace import Addition, Record, Sandbox, all_modules, no_fakes_left, undisturbed


@dataclass(frozen=True)
class Run:
    """One run of a copy of the model."""

    sandbox: Sandbox
    training: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Spot:
    """One addition of a step: where it stands, which operand is the skip, and how often it runs in each mode."""

    site: Site
    skip_is_left: bool
    subtracts: bool
    calls: tuple[int, int]  # in eval mode, in training


@dataclass(frozen=True)
class Found:
    """A step with its module and its additions."""

    step: Step
    module: nn.Module
    spots: tuple[Spot, ...]
    error: EulernetError | None = None  # why its source cannot be rewritten


@dataclass
class Search:
    """All that was found, and the runs in which it was, to try a patch in and to look at once more."""

    found: list[Found]
    steps: Steps
    runs: list[Run]
    records: list[Record]  # one a run
    events: dict[int, list[tuple[int, Event]]]  # the index of a step -> the runs it was seen in, and as what


@contextlib.contextmanager
def search(model: nn.Module, example_inputs: Any) -> Iterator[Search]:
    """Find the steps of a model that is not patched, or of the original of one that is."""
    sandboxes: list[Sandbox] = []
    with no_fakes_left(model, sandboxes):
        with undisturbed():
            result = _search(model, example_inputs, sandboxes)
        try:
            yield result
        finally:
            for kept in (result.runs, result.records, result.events):
                kept.clear()


def _search(model: nn.Module, example_inputs: Any, sandboxes: list[Sandbox]) -> Search:
    runs, records, notes = _run(model, example_inputs, sandboxes)
    return _collect(model, runs, records, notes)


def _run(model: nn.Module, example_inputs: Any, sandboxes: list[Sandbox]) -> tuple[list[Run], list[Record], list[str]]:
    if example_inputs is None:
        args, kwargs = _guessed(model, training=False)
        args_train, kwargs_train = _guessed(model, training=True)
    else:
        args, kwargs = args_train, kwargs_train = as_call(example_inputs)
    meta = any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers()))
    ways = [(True, False)] if meta else [(True, False), (False, False)]
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        ways += [(fake, True) for fake, _ in ways]  # some models do their work in hooks
    remaining = iter(ways)
    sandbox = _sandbox(model, *next(remaining), sandboxes)
    runs: list[Run] = []
    records: list[Record] = []
    notes: list[str] = []
    for training, arguments in ((False, (args, kwargs)), (True, (args_train, kwargs_train))):
        try:
            while len(records) == len(runs):
                try:
                    records.append(sandbox.run(*arguments, training=training))
                except Exception as error:
                    way = next(remaining, None)
                    if way is not None:
                        sandbox = _sandbox(model, *way, sandboxes)
                    elif not meta:
                        raise
                    else:
                        tensors = [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)]
                        if any(t.device.type != "meta" for t in tensors):
                            raise EulernetError(
                                f"{type(model).__name__} is on the meta device, and example_inputs are not, with which "
                                f"it failed ({short(error)}). Put them there as well: tensor.to('meta')"
                            ) from error
                        raise EulernetError(
                            f"{type(model).__name__} is on the meta device and cannot be traced without values "
                            f"({short(error)}). Put it on a real device first: model.to_empty(device='cpu')"
                        ) from error
        except EulernetError as error:
            if not training:
                raise
            notes.append(f"the training path was not traced: {error}")
        except Exception as error:
            if not training:
                given = "the guessed inputs" if example_inputs is None else "example_inputs"
                raise EulernetError(
                    f"{type(model).__name__} failed on {given} {described(arguments)}: {short(error)}. "
                    "Pass inputs that the model takes: eulernet.patch(model, h=0.1, example_inputs=(tensor, ...)) or a "
                    "dict of keyword arguments."
                ) from error
            notes.append(
                f"the training path was not traced, only the one in eval mode: {short(error)} "
                "(example_inputs of at least two samples train batch norm)"
            )
        else:
            runs.append(Run(sandbox, training, *arguments))
    return runs, records, notes


def _sandbox(model: nn.Module, fake: bool, hooks: bool, sandboxes: list[Sandbox]) -> Sandbox:
    from eulernet._patch import restore_class  # the copy of a patched model is traced as its original

    try:
        sandbox = Sandbox(model, fake, hooks)
    except Exception as error:
        raise EulernetError(
            f"{type(model).__name__} cannot be copied, and it is a copy that eulernet runs: {short(error)}. Take "
            "out of its attributes what copy.deepcopy(model) fails on, such as a lock, a generator or the output of a "
            "forward pass, and set it again after patching"
        ) from error
    sandboxes.append(sandbox)
    for module in sandbox.original:
        restore_class(module)
    return sandbox


def _guessed(model: nn.Module, training: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    guess = guess_inputs(model, training=training)
    if guess is None:
        raise EulernetError(
            f"{type(model).__name__} does not say what it takes. Pass an example (shapes matter, values do not): "
            "eulernet.patch(model, h=0.1, example_inputs=torch.zeros(2, 3, 224, 224))"
        )
    return guess


@dataclass(eq=False)
class _Spot:
    site: Site
    module: nn.Module
    skip_is_left: bool
    subtracts: bool
    events: dict[bool, list[Event]]  # training -> its runs
    error: EulernetError | None = None

    @property
    def calls(self) -> tuple[int, int]:
        return len(self.events[False]), len(self.events[True])


def _collect(model: nn.Module, runs: list[Run], records: list[Record], notes: list[str]) -> Search:
    names = _names(model)
    spots: dict[Any, _Spot] = {}
    unsupported: dict[str, None] = {}
    everything: list[Event] = []
    for run, record in zip(runs, records, strict=True):
        events = classify(record)
        everything += events
        runs_at = Counter(_origin(a) for a in record.additions)
        steps_at = Counter(_origin(e.addition) for e in events)
        for event in events:
            origin = _origin(event.addition)
            try:
                spot = _spot(event, run.sandbox, spots)
                if steps_at[origin] != runs_at[origin]:
                    raise Unsupported(
                        f"the same addition is a step in {steps_at[origin]} of its {runs_at[origin]} runs"
                    )
                spot.events[run.training].append(event)
            except Unsupported as reason:
                caller = run.sandbox.original.get(record.calls[event.addition.call].module, model)
                unsupported[_unsupported(event, run.sandbox, names, caller, str(reason))] = None
    groups = _group([s for s in spots.values() if any(s.events.values())])
    _pair_modes(groups, runs, records, names, notes)
    numbers = {id(g): i for i, g in enumerate(sorted(groups, key=lambda g: any(e.long for e in _events(g))))}
    found = [
        Found(
            _step(numbers[id(group)], group, groups, names),
            group[0].module,
            tuple(
                Spot(s.site, s.skip_is_left, s.subtracts, (len(s.events[False]), len(s.events[True]))) for s in group
            ),
            next((s.error for s in group if s.error is not None), None),
        )
        for group in groups
    ]
    found.sort(key=lambda f: f.step.index)
    steps = Steps(
        [f.step for f in found if f.step.kind != "long"],
        long=[f.step for f in found if f.step.kind == "long"],
        unsupported=list(unsupported),
        unreached=_unreached(runs, records, names),
        notes=notes,
    )
    run_of = {run.training: number for number, run in enumerate(runs)}
    seen = {
        numbers[id(g)]: [(run_of[mode], event) for spot in g for mode in spot.events for event in spot.events[mode]]
        for g in groups
    }
    return Search(found, steps, runs, records, seen)


def _origin(addition: Addition) -> Any:
    """Tells the runs of one addition of one module."""
    frames = addition.frames
    last = next((i for i, f in enumerate(frames) if f.module is not None), len(frames))
    return tuple((f.code, f.lasti, id(f.module)) for f in frames[: last + 1])


def _spot(event: Event, sandbox: Sandbox, spots: dict[Any, _Spot]) -> _Spot:
    if not event.supported:
        if event.coupled:
            raise Unsupported(
                "it and another step run through each other's branches, as in a reversible network, of which eulernet "
                "scales but one half"
            )
        raise Unsupported(f"{event.addition.op} adds and does something else in one operation")
    if event.addition.function is not None:
        raise Unsupported(
            f"it runs in {event.addition.function}, a torch.autograd.Function, whose own backward knows nothing of h"
        )
    error = None
    try:
        twin, site = locate(event.addition, event.skip_is_left)
    except EulernetError as reason:
        error, (twin, site) = reason, nowhere(event.addition)
    module = sandbox.original.get(twin)
    if module is None:
        raise Unsupported(f"the {type(twin).__name__} that makes it is no part of the model")
    new = _Spot(site, module, event.skip_is_left, "sub" in event.addition.op, {False: [], True: []}, error)
    spot = spots.setdefault((id(module), site.targets or site.position), new)
    if spot.skip_is_left != event.skip_is_left:
        raise Unsupported("its skip is the left operand in one call and the right one in another")
    return spot


def _group(spots: list[_Spot]) -> list[list[_Spot]]:
    """One step a spot, but the places of parallel branches in one module are one step."""
    group_of: dict[int, list[_Spot]] = {}
    groups: list[list[_Spot]] = []
    for spot in spots:
        events = [*spot.events[False], *spot.events[True]]
        group = group_of.get(id(events[0].first))
        if group is None or group[0].module is not spot.module:
            group = []
            groups.append(group)
        group.append(spot)
        group_of.update((id(event), group) for event in events)
    return groups


def _pair_modes(
    groups: list[list[_Spot]], runs: list[Run], records: list[Record], names: dict[nn.Module, str], notes: list[str]
) -> None:
    """Eval and train mode may add at different places of one module: those are one step, place by place."""
    if len(runs) < 2:
        return
    called = [{r.sandbox.original.get(c.module) for c in record.calls} for r, record in zip(runs, records, strict=True)]
    for module in {id(g[0].module): g[0].module for g in groups}.values():
        if not all(module in modules for modules in called):
            continue
        mine = [g for g in groups if g[0].module is module]
        only_eval = [g for g in mine if not any(s.events[True] for s in g)]
        only_train = [g for g in mine if not any(s.events[False] for s in g)]
        if len(only_eval) == len(only_train):
            for one, other in zip(only_eval, only_train, strict=True):
                one.extend(other)
                groups.remove(other)
            continue
        for mode, missing in (("training", only_eval), ("eval mode", only_train)):
            for group in missing:
                site = group[0].site
                notes.append(
                    f"{names[module]} ({type(module).__name__}) runs in both modes, but in {mode} not the step at "
                    f"{site.file}:{site.line}: there h has no effect on it"
                )


def _step(index: int, group: list[_Spot], groups: list[list[_Spot]], names: dict[nn.Module, str]) -> Step:
    events = _events(group)
    module = group[0].module
    mine = [g for g in groups if g[0].module is module]
    if any(e.long for e in events):
        kind = "long"
    else:
        kind = "parallel" if any(e.kind == "parallel" for e in events) else events[0].kind
    around = [g for g in groups if any(o.long and e.addition.result in o.within for o in _events(g) for e in events)]
    return Step(
        index=index,
        name=names[module] + (f":{mine.index(group)}" if len(mine) > 1 else ""),
        module_class=type(module).__name__,
        kind=kind,
        places=tuple(_place(s) for s in group),
        calls=sum(e.first is None for e in events) or len(events),
        stream=events[0].stream,
        depth=max(e.depth for e in events),
        position=min(e.position for e in events),
        parent=names[around[0][0].module] if around else None,
    )


def _place(spot: _Spot) -> Place:
    line, end_line, column, end_column = spot.site.position
    skip = "left" if spot.skip_is_left else "right"
    return Place(spot.site.file, line, column, spot.site.function, skip, end_line, end_column)


def _events(group: list[_Spot]) -> list[Event]:
    """What ran, in eval mode where anything did."""
    return [e for s in group for e in s.events[False]] or [e for s in group for e in s.events[True]]


def _unsupported(event: Event, sandbox: Sandbox, names: dict[nn.Module, str], caller: nn.Module, reason: str) -> str:
    frames = event.addition.frames
    module = next((sandbox.original[f.module] for f in frames if f.module in sandbox.original), caller)
    line = list(frames[0].code.co_positions())[frames[0].lasti // 2][0]
    return f"{names[module]} ({frames[0].code.co_filename}:{line}): {reason}"


def _names(model: nn.Module) -> dict[nn.Module, str]:
    names: dict[nn.Module, str] = {module: f"<unregistered {type(module).__name__}>" for module in all_modules(model)}
    names.update({module: name or ROOT for name, module in model.named_modules()})
    return names


def _unreached(runs: list[Run], records: list[Record], names: dict[nn.Module, str]) -> list[str]:
    """The outermost modules none of whose parameters was read."""
    reached: set[str] = set()
    idle: set[str] = set()
    for run, record in zip(runs, records, strict=True):
        for twin, module in run.sandbox.original.items():
            own = list(twin.parameters(recurse=False))
            if own:
                (reached if any(id(p) in record.used for p in own) else idle).add(names[module])
    idle -= reached
    shown = set()
    for name in idle:
        parts = name.split(".")
        prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
        outside = (p for p in prefixes if not any(r == p or r.startswith(p + ".") for r in reached))
        outer = next(outside, name)  # itself where a part of it was reached
        shown.add(outer)
    return sorted(shown)


def described(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> str:
    def one(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(one, value))}]"
        return repr(value)[:40]

    args, kwargs = arguments
    return "(" + ", ".join([*map(one, args), *(f"{k}={one(v)}" for k, v in kwargs.items())]) + ")"


def short(error: BaseException) -> str:
    first = (str(error).strip() or repr(error)).splitlines()[0]
    return f"{type(error).__name__}: {first[:300]}"
