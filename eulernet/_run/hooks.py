"""Stand around the steps of a patched module, to see what they add."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from eulernet._run.factor import is_begun
from eulernet._run.patched import (
    ADD_NORM,
    DEFER,
    DEFER_MUL,
    DIFFERENCE,
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
    here: Callable[[], Any] = weakref.ref(module)  # not the module itself, which would then hold itself
    cls = type(module)
    places = cls._euler_places

    def around(name: str) -> Callable[..., Any]:
        def step(left: Any, right: Any, place: int, alpha: float = 1, key: Any = None) -> Any:
            _, skip_is_left, sign = places[place]
            skip, branch = (left, right) if skip_is_left else (right, left)
            times = sign * alpha if skip_is_left else sign
            return see(
                place, key, skip, branch, times, lambda: getattr(cls, name)(here(), left, right, place, alpha, key)
            )

        return step

    def see(place: int, key: Any, skip: Any, branch: Any, times: float, add: Callable[[], Any]) -> Any:
        if is_begun(skip, branch) or (slot := here()._euler_slot(place, key)) is None:
            return add()
        return hook(StepInputs(place, slot, skip, branch, times), add)

    def scale(branch: Any, place: int, key: Any = None) -> Any:
        return see(place, key, None, branch, 1, lambda: getattr(cls, SCALE)(here(), branch, place, key))

    def difference(total: Any, skip: Any, place: int, key: Any = None) -> Any:
        def add() -> Any:
            return getattr(cls, DIFFERENCE)(here(), total, skip, place, key)

        return see(place, key, skip, total - skip, 1, add)

    def before_epilogue(step: Callable[..., Any]) -> Callable[..., Any]:
        return lambda then, left, right, place, key=None: then(step(left, right, place, key=key))

    steps = {name: around(name) for name in (STEP, STEP_IN_PLACE)}
    module.__dict__[DIFFERENCE] = difference
    module.__dict__.update({**steps, SCALE: scale, DEFER: lambda before, branch, place, key=None: before(branch)})
    module.__dict__[DEFER_MUL] = lambda left, right, gamma_first, place, key=None: left * right
    module.__dict__[ADD_NORM] = lambda norm, left, right, place, key=None: (
        steps[STEP](left, right, place, key=key),
        None,
    )
    module.__dict__[EPILOGUE] = before_epilogue(steps[STEP])
    module.__dict__[EPILOGUE_IN_PLACE] = before_epilogue(steps[STEP_IN_PLACE])


def remove_step_hooks(module: Any) -> None:
    """Leave a module as it was before `add_step_hook`."""
    for name in OBSERVED:
        module.__dict__.pop(name, None)
