"""A callee that no name leads to is known when it is called: whether each such call calls what was seen there.

Between a method and a function that it calls there may be others in C, `functools.reduce` or `map`, of which a trace of
Python frames shows nothing. So the copies run once more, with the calls asked for what they call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from eulernet._checks import short
from eulernet._errors import EulernetError
from eulernet._find.sandbox import Sandbox
from eulernet._find.search import Proofs, Run, Search, search_by
from eulernet._find.sites import TracedSite, origin
from eulernet._patch.difference import by_difference
from eulernet._patch.subclass import patched_class
from eulernet._run.factor import StepFactor
from eulernet._run.hooks import StepInputs, add_step_hook, remove_step_hooks
from eulernet._run.learned import Slot
from eulernet._run.patched import CALL_VIA, FACTORS, STEPS, Patched, restore_class
from eulernet._source import VIA, Target, Unsupported


def search(model: nn.Module, example_inputs: Any) -> AbstractContextManager[Search]:
    """Find the steps of a model that is not patched, or of the original of one that is, and prove what they call."""
    return search_by(model, example_inputs, Proofs(with_other_callees, by_difference))


def with_other_callees(sites: Sequence[TracedSite], runs: Sequence[Run]) -> list[TracedSite]:
    """The sites that lead through a call which calls, in these runs, something else than what was seen below it."""
    unnamed = [s for s in sites if _vias(s)]
    wrong: set[tuple[nn.Module, Target]] = set()
    for sandbox in {id(run.sandbox): run.sandbox for run in runs}.values() if unnamed else ():
        twins = {module: twin for twin, module in sandbox.original.items()}
        watched = [_watch(twins[host], host, unnamed, wrong) for host in dict.fromkeys(s.host for s in unnamed)]
        try:
            for run in runs:
                if run.sandbox is sandbox:
                    sandbox.run_again(run.args, run.kwargs, training=run.training)
        except Exception:
            return unnamed
        finally:
            for twin in watched:
                twin.__dict__.pop(CALL_VIA, None)
                restore_class(twin)
    return [s for s in unnamed if any((s.host, target) in wrong for target in _vias(s))]


def _vias(site: TracedSite) -> list[Target]:
    return [target for target, _ in site.location.targets if target.owner is None and target.name.startswith(VIA)]


def _watch(twin: Any, host: nn.Module, sites: Sequence[TracedSite], wrong: set[tuple[nn.Module, Target]]) -> nn.Module:
    """Give the twin of a module the steps of these sites, with h = 1, and note which calls call something else."""
    mine = [s for s in sites if s.host is host]
    plan = tuple((s.location.targets, 0, s.skip_is_left, s.subtracts) for s in mine)
    twin.__dict__[FACTORS], twin.__dict__[STEPS] = [StepFactor(1.0)], []
    twin.__class__ = patched_class(type(twin), plan)

    def call(callee: Any, number: int) -> Callable[..., Any]:
        try:
            return Patched._euler_via(twin, callee, number)  # type: ignore[no-any-return]
        except (EulernetError, Unsupported):
            wrong.update((host, target) for s in mine for target in _vias(s))
            return callee  # type: ignore[no-any-return]

    twin.__dict__[CALL_VIA] = call
    return twin  # type: ignore[no-any-return]


def not_as_found(search: Search, changes: Sequence[Any], learned: Sequence[Slot]) -> dict[int, str]:
    """Run the patched copies: each step must go through `_euler_step` as often as it was found. Those that do not.

    And all else must be computed as before, which a model does not do that asks for the class of its modules.
    """
    wrong: dict[int, str] = {}
    runs = _that_differ(search)
    strange: list[Run] = []
    for run in runs:
        operations, counts = _run_patched(run, changes)
        if run.sandbox.mode and operations != search.traces[search.runs.index(run)].operations:  # values decide nothing
            strange.append(run)
        for change in changes:
            for slot, found, site in ((i, f, s) for i, f in enumerate(change.found) for s in f.sites):
                place, expected = change.places[site.location.targets], site.calls[run.training]
                passed = counts[id(change.module), place, slot]
                if passed != expected:
                    wrong[found.step.index] = (
                        f"the addition at {site.location.file}:{site.location.line} ran {expected} times, but "
                        f"{passed} times as a step once it was rewritten."
                    )
    for run in strange if not wrong else ():  # caches have been filled since it was traced
        before, (operations, _), after = _run_original(run), _run_patched(run, changes), _run_original(run)
        more, fewer = (", ".join(sorted(some)) for some in (operations - before, _but_sums(before - operations)))
        if (more or fewer) and before == after:  # not another way in each run
            how = " and ".join(f"{what} {some}" for what, some in (("more", more), ("fewer", fewer)) if some)
            raise _goes_astray(run.sandbox.copy, f"computes something else once it is patched ({how})")
    return wrong or _without_gradient(search, changes, learned)


def _but_sums(operations: Counter[str]) -> list[str]:
    """Without `torch.add(x, f, alpha=2)`, which may be a step."""
    return [o for o in operations if not (o.startswith(("add alpha=", "sub alpha=")))]


_Passed = Counter[tuple[int, int, int]]  # by the id of a module, the place in it, and the number of its step


def _run_original(run: Run) -> Counter[str]:
    return run.sandbox.run_again(run.args, run.kwargs, training=run.training)


def _run_patched(run: Run, changes: Sequence[Any]) -> tuple[Counter[str], _Passed]:
    """What a patched copy computes beside its steps, and how often it goes through each of these."""
    sandbox, passed = run.sandbox, _Passed()
    twins = {module: twin for twin, module in sandbox.original.items()}
    for change in changes:
        twin: Any = twins[change.module]
        change.of(twins.__getitem__).make()
        if not sandbox.mode:  # a model that looks at values goes the same way at h = 1 alone
            twin.__dict__[FACTORS] = [StepFactor(1.0) for _ in twin._euler]
        add_step_hook(twin, partial(_count, passed, id(change.module), sandbox))
    try:
        return sandbox.run_again(run.args, run.kwargs, training=run.training), passed
    except (EulernetError, MemoryError):
        raise
    except Exception as error:
        raise _goes_astray(sandbox.copy, f"fails once it is patched: {short(error)}") from error
    finally:
        for change in changes:
            remove_step_hooks(twins[change.module])
            restore_class(twins[change.module])


def _goes_astray(model: nn.Module, how: str) -> EulernetError:
    return EulernetError(
        f"{type(model).__name__} {how}. It may ask for the class of a module, `type(module) is Block`, and that of a "
        "patched module is a subclass. Ask isinstance(module, Block) there, or leave these modules out: "
        'eulernet.patch(model, ..., exclude="...")'
    )


def _that_differ(search: Search) -> list[Run]:
    """One run a mode, or one for both where they make the same sums at the same places, one after the other."""
    added = [
        (id(run.sandbox), [origin(addition, run.sandbox.original) for addition in trace.additions])
        for run, trace in zip(search.runs, search.traces, strict=True)
    ]
    return search.runs[-1:] if all(each == added[0] for each in added) else search.runs


def _without_gradient(search: Search, changes: Sequence[Any], learned: Sequence[Slot]) -> dict[int, str]:
    """The steps in functions that run again in a backward of their own, which may hand no gradient to a learned h."""
    wrong: dict[int, str] = {}
    slots = [s for s in learned if any(f.again for c in changes if c.module is s.module for f in c.found)]
    for run in search.runs if slots else ():
        if not run.training:
            continue
        twins = {module: twin for twin, module in run.sandbox.original.items()}
        copies = [replace(s, parameter=run.sandbox.parameter(s.parameter)) for s in slots]
        for change in changes:
            change.of(twins.__getitem__, [s for s in copies if s.module is change.module]).make()
        run.sandbox.run_again(run.args, run.kwargs, training=True, backward=True)
        for change in changes:
            for slot in copies:
                if slot.module is change.module and slot.parameter.grad is None and change.found[slot.number].again:
                    step = change.found[slot.number].step
                    wrong[step.index] = (
                        "it runs in a function with a backward of its own that runs it again, and hands no gradient to "
                        f"{slot.name}: give that function the module's parameters(), or patch without trainable=."
                    )
            restore_class(twins[change.module])
    return wrong


def _count(passed: _Passed, module: int, sandbox: Sandbox, seen: StepInputs, add: Callable[[], Any]) -> Any:
    passed[module, seen.place, seen.slot] += 1
    return sandbox.step(add)
