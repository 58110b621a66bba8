"""A callee that no name leads to is known when it is called: whether each such call calls what was seen there.

Between a method and a function that it calls there may be others in C, `functools.reduce` or `map`, of which a trace of
Python frames shows nothing. So the copies run once more, with the calls asked for what they call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from eulernet._errors import EulernetError
from eulernet._find.sandbox import Sandbox
from eulernet._find.search import Proofs, Run, Search, search_by
from eulernet._find.sites import TracedSite
from eulernet._patch.difference import by_difference
from eulernet._patch.subclass import patched_class
from eulernet._run.factor import StepFactor
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
                    _run(sandbox, run)
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


def _run(sandbox: Sandbox, run: Any) -> None:
    sandbox.run(run.args, run.kwargs, training=run.training)
