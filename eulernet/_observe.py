"""Stand around the steps of a patched module, to see what they add."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from eulernet._rewrite import AHEAD, LATER, SCALE, STEP, STEP_IN_PLACE, TAIL, TAIL_IN_PLACE, TIMES

# The entries of an observed module's __dict__, which hide the methods of its class.
OBSERVED = (STEP, STEP_IN_PLACE, SCALE, TAIL, TAIL_IN_PLACE, AHEAD, LATER, TIMES)


class Seen(NamedTuple):
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
See = Callable[[Seen, Callable[[], Any]], Any]


def observe(module: Any, see: See) -> None:
    """Call `see` at each addition of a patched module, until `release`; what stands around it is not fused with it."""
    here, cls = weakref.ref(module), type(module)  # not the module itself, which would then hold itself
    places = cls._euler_places

    def around(method: Callable[..., Any]) -> Callable[..., Any]:
        def step(left: Any, right: Any, place: int, alpha: float = 1) -> Any:
            slot, skip_is_left, sign = places[place]
            skip, branch = (left, right) if skip_is_left else (right, left)
            seen = Seen(place, slot, skip, branch, sign * alpha if skip_is_left else sign)
            return see(seen, lambda: method(here(), left, right, place, alpha))

        return step

    def scale(branch: Any, place: int) -> Any:
        method = getattr(cls, SCALE)
        return see(Seen(place, places[place][0], None, branch, 1), lambda: method(here(), branch, place))

    def before_activation(step: Callable[..., Any]) -> Callable[..., Any]:
        return lambda activation, left, right, place: activation(step(left, right, place))

    steps = {name: around(getattr(cls, name)) for name in (STEP, STEP_IN_PLACE)}
    module.__dict__.update({**steps, SCALE: scale, LATER: lambda before, branch, place: before(branch)})
    module.__dict__[TIMES] = lambda left, right, gamma_first, place: left * right
    module.__dict__[AHEAD] = lambda norm, left, right, place: (steps[STEP](left, right, place), None)
    module.__dict__[TAIL] = before_activation(steps[STEP])
    module.__dict__[TAIL_IN_PLACE] = before_activation(steps[STEP_IN_PLACE])


def release(module: Any) -> None:
    """Leave a module as it was before `observe`."""
    for name in OBSERVED:
        module.__dict__.pop(name, None)
