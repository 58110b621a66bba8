"""Find the steps of a model: run a copy of it, in eval and in train mode, and classify what it added."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from eulernet._checks import described, short
from eulernet._draws import Draws
from eulernet._errors import EulernetError
from eulernet._find.account import Names, Origin, left_out, origin_of, outside, prefixes, reached_at_zero, unequal_twins
from eulernet._find.apart import alone, apart
from eulernet._find.classify import Sums, classify
from eulernet._find.graph import StepCall
from eulernet._find.hints import example_for
from eulernet._find.inputs import as_arguments, guess_inputs
from eulernet._find.leftovers import Leftovers, nothing_left
from eulernet._find.locate import Location
from eulernet._find.sandbox import Sandbox
from eulernet._find.sites import (
    Group,
    TracedSite,
    Unplaced,
    grouped,
    is_left_alone,
    next_norm,
    normed,
    origin,
    pair_modes,
    site_of,
    step_calls_of,
    with_callees,
    without_place,
)
from eulernet._find.tensors import all_modules
from eulernet._find.trace import Trace
from eulernet._find.unseen import with_unseen
from eulernet._plot import together
from eulernet._run.patched import restore_class
from eulernet._source import Unsupported
from eulernet._step import LEFT_ALONE, ROOT, Outside, Place, Reason, Step, StepKind, Steps, step_name


@dataclass(frozen=True)
class Run:
    """One run of a copy of the model."""

    sandbox: Sandbox
    training: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Site:
    """One addition of a step: where it stands, which operand is the skip, and how often it runs in each mode."""

    location: Location
    skip_is_left: bool
    subtracts: bool
    calls: tuple[int, int]  # in eval mode, in training
    next_norm: tuple[nn.Module, str] | None = None  # which takes its state in another block: that, and its name there


@dataclass(frozen=True)
class FoundStep:
    """A step with its module and its additions."""

    step: Step
    module: nn.Module
    sites: tuple[Site, ...]
    host: nn.Module  # that makes the additions; where it is not `module`, that is the one that made the branch
    error: EulernetError | None = None  # why its source cannot be rewritten
    again: bool = False  # whether it is made again in the backward of a function that it runs in


@dataclass
class Search:
    """All that was found, and the runs in which it was, to try a patch in and to look at once more."""

    found: list[FoundStep]
    steps: Steps
    runs: list[Run]
    traces: list[Trace]  # one a run
    main: set[int]  # the indices of what is left alone on the main stream, from the model's input to its output
    step_calls: dict[int, list[tuple[int, StepCall]]]  # the index of a step -> the runs it was seen in, and as what


class Proofs(NamedTuple):
    """What is proven by running the copies once more, with something put in their way."""

    # Which of these sites lead through a call that calls, in these runs, something else than was seen: `_patch.prove`.
    other_callees: Callable[[Sequence[TracedSite], Sequence[Run]], list[TracedSite]]
    # The places at which each of these sums is scaled by difference, or why there is none: `_patch.difference`.
    by_difference: Callable[[Sequence[Unplaced], Sequence[Run], Sequence[Trace]], list[TracedSite | str]]


@contextlib.contextmanager
def search_by(model: nn.Module, example_inputs: Any, proofs: Proofs) -> Iterator[Search]:
    """Find the steps of a model that is not patched, or of the original of one that is."""
    with alone(), nothing_left(model) as leftovers, _disable_current_modes():
        leftovers.foresee(all_modules(model))
        result = apart(lambda: _search(model, example_inputs, leftovers, proofs))
        try:
            yield result
        finally:
            for kept in (result.runs, result.traces, result.step_calls):
                kept.clear()


def _search(model: nn.Module, example_inputs: Any, leftovers: Leftovers, proofs: Proofs) -> Search:
    runs, traces, notes = _run(model, example_inputs, leftovers)
    return _collect(model, runs, traces, notes, proofs)


def _run(model: nn.Module, example_inputs: Any, leftovers: Leftovers) -> tuple[list[Run], list[Trace], list[str]]:
    if example_inputs is None:
        with Draws():
            args, kwargs = _guessed(model, training=False)
            args_train, kwargs_train = _guessed(model, training=True)
    else:
        args, kwargs = args_train, kwargs_train = as_arguments(example_inputs)
    # Fake tensors first: they cost nothing. A model whose code looks at values fails on them and runs for real.
    meta = _on_meta(model)
    attempts = [(True, False)] if meta else [(True, False), (False, False)]
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        attempts += [(fake, True) for fake, _ in attempts]  # some models do their work in hooks
    remaining = iter(attempts)
    sandbox = _sandbox(model, *(attempt := next(remaining)), leftovers)
    runs: list[Run] = []
    traces: list[Trace] = []
    notes: list[str] = []
    for training, arguments in ((False, (args, kwargs)), (True, (args_train, kwargs_train))):
        try:
            # One more trace than runs ends the loop. What failed in eval mode is given up for train mode as well: a
            # sandbox is never gone back to, since both runs are to be of one copy where they can.
            while len(traces) == len(runs):
                try:
                    traces.append(sandbox.run(*arguments, training=training))
                except Exception as error:
                    if "does not require grad" in str(error) and not sandbox.differentiates:
                        sandbox = _sandbox(model, *attempt, leftovers)
                        sandbox.differentiates = True
                    elif (following := next(remaining, None)) is not None:
                        attempt = following
                        leftovers.put_back()
                        sandbox = _sandbox(model, *attempt, leftovers)
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
        except MemoryError:  # of the machine, not of the model
            raise
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
    return runs, traces, notes


def _on_meta(model: nn.Module) -> bool:
    return any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers()))


def _sandbox(model: nn.Module, fake: bool, hooks: bool, leftovers: Leftovers) -> Sandbox:
    try:
        sandbox = Sandbox(model, fake, hooks, leftovers)
    except EulernetError:
        raise
    except Exception as error:
        if fake and not _on_meta(model):  # a tensor of a class of its own, which copies itself
            return _sandbox(model, False, hooks, leftovers)
        raise EulernetError(
            f"{type(model).__name__} cannot be copied, and it is a copy that eulernet runs: {short(error)}. Take "
            "out of its attributes what copy.deepcopy(model) fails on, such as a lock, a generator or the output of a "
            "forward pass, and set it again after patching"
        ) from error
    for module in sandbox.original:  # the copy of a patched model is traced as its original
        restore_class(module)
    return sandbox


def _guessed(model: nn.Module, training: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    guess = guess_inputs(model, training=training)
    if guess is None:
        raise EulernetError(
            f"{type(model).__name__} does not say what it takes. Pass an example in the same call (shapes matter, "
            f"values do not), such as eulernet.patch(model, h=0.1, example_inputs={example_for(model)})"
        )
    return guess


def _collect(model: nn.Module, runs: list[Run], traces: list[Trace], notes: list[str], proofs: Proofs) -> Search:
    names = _names(model)
    sums = [classify(trace) for trace in traces]
    sites, refused = _places(model, runs, traces, sums, names, proofs)
    unsupported = list(dict.fromkeys(refused.values()))
    traced = {run.training: (trace, run.sandbox.original) for run, trace in zip(runs, traces, strict=True)}
    groups = grouped(sites, traced, model)
    left_alone = {e for group in groups if is_left_alone(group) for site in group for e in site.step_calls[False]}
    scaled = [e for e in sums[0].steps if e not in left_alone and not e.left_alone and id(e.addition) not in refused]
    account = _account(model, runs[0], traces[0], sums[0], scaled, refused.keys(), names)
    notes.extend(account.twins)
    if hooked := [names[module] for module in runs[0].sandbox.hooked]:
        notes.append(
            f"{together(hooked)}: forward hooks that return a value were not run, and what they add was not seen"
        )
    breaks = dict.fromkeys(at for trace in traces for at in trace.breaks)
    notes.extend(f"{at}: what is made of it is not traced back to the model's input" for at in breaks)
    notes.extend(pair_modes(groups, [{of.get(c.module) for c in trace.calls} for trace, of in traced.values()], names))
    # What is left alone last, so that those which `patch` scales by default are numbered without gaps.
    last = sorted(groups, key=is_left_alone)
    numbers = {id(g): i for i, g in enumerate(last)}
    taken = normed(traces[0]), traces[0], runs[0].sandbox.original
    found = [
        FoundStep(
            _step(numbers[id(group)], group, groups, names),
            group[0].module,
            tuple(Site(s.location, s.skip_is_left, s.subtracts, s.calls, next_norm(s, *taken)) for s in group),
            group[0].host,
            next((s.error for s in group if s.error is not None), None),
            any(s.again for s in group),
        )
        for group in groups
    ]
    found.sort(key=lambda f: f.step.index)
    ends = {e.addition.result: numbers[id(group)] for group in groups for site in group for e in site.step_calls[False]}
    steps = Steps(
        [f.step for f in found if f.step.kind not in LEFT_ALONE],
        long=[f.step for f in found if f.step.kind == "long"],
        gated=[f.step for f in found if f.step.kind == "gated"],
        unsupported=unsupported,
        unreached=_unreached(runs, traces, names),
        notes=notes,
        left_out=left_out(account.left_out, names, ends),
        outside=account.outside,
    )
    run_of = {run.training: number for number, run in enumerate(runs)}
    seen = {
        numbers[id(g)]: [
            (run_of[mode], step_call) for site in g for mode in site.step_calls for step_call in site.step_calls[mode]
        ]
        for g in groups
    }
    main = {
        f.step.index
        for f in found
        if any(e.left_alone and e.addition.result in account.main for run, e in seen[f.step.index] if run == 0)
    }
    return Search(found, steps, runs, traces, main, seen)


def _places(
    model: nn.Module,
    runs: list[Run],
    traces: list[Trace],
    sums: list[Sums],
    names: dict[nn.Module, str],
    proofs: Proofs,
) -> tuple[list[TracedSite], dict[int, str]]:
    """Where the steps are made; for each addition that cannot be scaled, by its id, a line that says why."""
    sites: dict[Any, TracedSite] = {}
    unplaced: dict[Any, Unplaced] = {}
    refused: dict[int, str] = {}
    registered = set(model.modules())

    def rest(step_call: StepCall, number: int, reason: str) -> None:
        at = origin_of(step_call.addition, traces[number], runs[number].sandbox.original, model)
        place = unplaced.setdefault(origin(step_call, runs[number].sandbox.original), Unplaced(at, reason))
        place.step_calls[runs[number].training].append(step_call)

    again = _made_again(runs, sums)
    for number, (run, trace, (_, step_calls, _)) in enumerate(zip(runs, traces, sums, strict=True)):
        # An addition of the source is rewritten whole. Where it is a step in some of its runs only (a function that
        # adds a residual here and a position there), h would scale what is none, so none of its runs is a step.
        runs_at = Counter(origin(a, run.sandbox.original) for a in trace.additions)
        steps_at = Counter(origin(e, run.sandbox.original) for e in step_calls)
        # A module that runs on the input and on a constant is one function of both.
        of_steps = {id(e.addition) for e in step_calls}
        constant = [a for a in trace.additions if trace.nodes[a.result].constant and id(a) not in of_steps]
        constant_at = Counter(origin(a, run.sandbox.original) for a in constant)
        for step_call in step_calls:
            at = origin(step_call, run.sandbox.original)
            try:
                site = site_of(step_call, run.sandbox.original, sites, at in again)
                if site.host not in registered:
                    raise Unsupported("model.modules() does not know the module that makes it; use nn.ModuleList")
                site.on_constants[run.training] = constant_at[at]
                if others := runs_at[at] - steps_at[at] - constant_at[at]:
                    raise Unsupported(
                        f"it adds {runs_at[at]} times in a forward pass, {others} of them no step, which h would scale"
                    )
                site.step_calls[run.training].append(step_call)
            except Unsupported as reason:
                rest(step_call, number, str(reason))
    for site in sites.values():  # one of its runs cannot be scaled
        for run in runs:
            for step_call in list(site.step_calls[run.training]):
                if (place := unplaced.get(origin(step_call, run.sandbox.original))) is not None:
                    site.step_calls[run.training].remove(step_call)
                    place.step_calls[run.training].append(step_call)
    number_of = {run.training: number for number, run in enumerate(runs)}
    found = [site for site in sites.values() if any(site.step_calls.values())]
    for site in proofs.other_callees(found, runs):
        found.remove(site)
        for mode, step_call in ((mode, e) for mode, calls in site.step_calls.items() for e in calls):
            what = f"it is made by {site.location.function}, which something in between calls that is not"
            rest(step_call, number_of[mode], f"{what} written in Python")
    for place, proven in zip(unplaced.values(), proofs.by_difference([*unplaced.values()], runs, traces), strict=True):
        if isinstance(proven, TracedSite):
            found.append(proven)
            continue
        calls = [*place.step_calls[False], *place.step_calls[True]]
        unscaled = without_place(place, calls, proven)
        if unscaled is not None:
            found.append(unscaled)
        else:
            at = place.at
            refused.update((id(e.addition), f"{names[at.module]} ({at.file}:{at.line}): {proven}") for e in calls)
    with_callees(found)
    ran = [(trace, run.sandbox.original) for run, trace in zip(runs, traces, strict=True)]
    for site, location in zip(found, with_unseen([(s.host, s.location) for s in found], ran), strict=True):
        site.location = location
    return found, refused


def _made_again(runs: list[Run], sums: list[Sums]) -> set[Any]:
    """The additions that functions with a backward of their own make again in it, as checkpoints do."""
    if not any(e.addition.function for _, step_calls, _ in sums for e in step_calls):
        return set()
    again: set[Any] = set()
    for run in (run for run in runs if run.training):
        with contextlib.suppress(Exception):  # no gradient leads there
            trace = run.sandbox.run(run.args, run.kwargs, training=True, backward=True)
            late = (a for a in trace.additions[trace.forward :] if a.function is None)  # in no forward that ran again
            again |= {origin(a, run.sandbox.original) for a in late}
    return again


class _Account(NamedTuple):
    left_out: list[tuple[Origin, Reason, int]]  # with the node of the result
    outside: Outside
    twins: list[str]
    main: set[int]  # the nodes of the main stream, from input to output, and of what makes it


def _account(
    model: nn.Module, run: Run, trace: Trace, sums: Sums, scaled: list[StepCall], refused: Collection[int], names: Names
) -> _Account:
    """What is to be said of the sums of a run, besides the steps."""
    originals = run.sandbox.original
    reached = reached_at_zero(sums.graph, scaled)
    reasons = [(origin_of(addition, trace, originals, model), reason) for addition, reason in sums.left_out]
    twins = [(at, False) for at, reason in reasons if reason != "inside a branch"]
    twins += [(origin_of(e.addition, trace, originals, model), id(e.addition) not in refused) for e in sums.steps]
    return _Account(
        [(at, why, addition.result) for (at, why), (addition, _) in zip(reasons, sums.left_out, strict=True)],
        outside(sums.graph, trace, originals, names, reached),
        list(unequal_twins(twins, names)),
        reached,
    )


def _step(index: int, group: Group, groups: list[Group], names: dict[nn.Module, str]) -> Step:
    step_calls = step_calls_of(group)
    module = group[0].module
    if any(e.long for e in step_calls):
        kind: StepKind = "long"
    elif any(e.kind == "gated" for e in step_calls):
        kind = "gated"
    elif any(e.kind == "parallel" for e in step_calls):
        kind = "parallel"
    else:
        kind = "projection" if step_calls[0].kind == "projection" else "identity"
    others = [g for g in groups if g is not group]
    around = [
        g for g in others if any(o.long and e.addition.result in o.within for o in step_calls_of(g) for e in step_calls)
    ]
    module_name, number = _named(group, groups, names)
    before = sum(not is_left_alone(g) for g in groups[: groups.index(group)])
    return Step(
        index=index,
        name=step_name(module_name, number),
        module_class=type(module).__name__,
        kind=kind,
        places=tuple(_place(s) for s in group),
        calls=sum(e.first is None for e in step_calls) or len(step_calls),
        stream=step_calls[0].stream,
        depth=max(e.depth for e in step_calls),
        position=min(e.position for e in step_calls),
        parent=step_name(*_named(around[0], groups, names)) if around else None,
        module_name=module_name,
        number=number,
        after=before - 1 if before and is_left_alone(group) else None,
    )


def _named(group: Group, groups: list[Group], names: dict[nn.Module, str]) -> tuple[str, int | None]:
    """The name of a step's module, and the step's number where the module has several."""
    module = group[0].module
    mine = [g for g in groups if g[0].module is module]
    return "" if names[module] == ROOT else names[module], mine.index(group) if len(mine) > 1 else None


def _place(site: TracedSite) -> Place:
    line, end_line, column, end_column = site.location.position
    skip: Literal["left", "right"] = "left" if site.skip_is_left else "right"
    return Place(site.location.file, line, column, site.location.function, skip, end_line, end_column)


def _names(model: nn.Module) -> dict[nn.Module, str]:
    names: dict[nn.Module, str] = {module: f"<unregistered {type(module).__name__}>" for module in all_modules(model)}
    names.update({module: name or ROOT for name, module in model.named_modules()})
    return names


def _unreached(runs: list[Run], traces: list[Trace], names: dict[nn.Module, str]) -> list[str]:
    """The outermost modules none of whose parameters was read; of one whose own were not, but those in it, its own."""
    reached: set[str] = set()
    idle: set[str] = set()
    for run, trace in zip(runs, traces, strict=True):
        for twin, module in run.sandbox.original.items():
            own = dict(twin.named_parameters(recurse=False))
            used = any(id(p) in trace.used for p in own.values())
            (reached if used else idle).update(f"{names[module]}.{name}".removeprefix(f"{ROOT}.") for name in own)
    shown = set()
    for name in idle - reached:
        outside = (p for p in prefixes(name) if not any(r.startswith(f"{p}.") for r in reached))
        shown.add(next(outside, name))
    return sorted(shown)
