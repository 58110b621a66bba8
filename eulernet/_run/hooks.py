"""Stand around the steps of a patched module, to see what they add."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from eulernet._run.patched import (
    ADD_NORM,
    DEFER,
    DEFER_MUL,
    EPILOGUE,
    EPILOGUE_IN_PLACE,
    OBSERVED,
    SCALE,
    STEP,
    STEP_IN_PLACE,
)


class StepInputs(NamedTuple):
    """One addition of a step, before it is made.

    `skip` is None where the addition is an augmented assignment to a slice or an attribute: there only the branch is
    handed over. `place` is the addition's number in the module, `slot` the step's. The branch is added `alpha` times,
    -1 where it is subtracted.
    """

    place: int
    slot: int
    skip: Any
    branch: Any
    alpha: float


# Is called with what is seen and with what makes the addition; returns the latter's result.
StepHook = Callable[[StepInputs, Callable[[], Any]], Any]


def add_step_hook(module: Any, hook: StepHook) -> None:
    """Call `hook` at each addition of a patched module, until `remove_step_hooks`.

    What stands around the addition is not fused with it meanwhile.
    """
    here, cls = weakref.ref(module), type(module)  # not the module itself, which would then hold itself
    places = cls._euler_places

    def around(method: Callable[..., Any]) -> Callable[..., Any]:
        def step(left: Any, right: Any, place: int, alpha: float = 1) -> Any:
            slot, skip_is_left, sign = places[place]
            skip, branch = (left, right) if skip_is_left else (right, left)
            seen = StepInputs(place, slot, skip, branch, sign * alpha if skip_is_left else sign)
            return hook(seen, lambda: method(here(), left, right, place, alpha))

        return step

    def scale(branch: Any, place: int) -> Any:
        method = getattr(cls, SCALE)
        return hook(StepInputs(place, places[place][0], None, branch, 1), lambda: method(here(), branch, place))

    def before_epilogue(step: Callable[..., Any]) -> Callable[..., Any]:
        return lambda then, left, right, place: then(step(left, right, place))

    steps = {name: around(getattr(cls, name)) for name in (STEP, STEP_IN_PLACE)}
    module.__dict__.update({**steps, SCALE: scale, DEFER: lambda before, branch, place: before(branch)})
    module.__dict__[DEFER_MUL] = lambda left, right, gamma_first, place: left * right
    module.__dict__[ADD_NORM] = lambda norm, left, right, place: (steps[STEP](left, right, place), None)
    module.__dict__[EPILOGUE] = before_epilogue(steps[STEP])
    module.__dict__[EPILOGUE_IN_PLACE] = before_epilogue(steps[STEP_IN_PLACE])


def remove_step_hooks(module: Any) -> None:
    """Leave a module as it was before `add_step_hook`."""
    for name in OBSERVED:
        module.__dict__.pop(name, None)
