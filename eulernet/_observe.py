"""Stand around the steps of a patched module, to see what they add."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from eulernet._rewrite import SCALE, STEP, STEP_IN_PLACE

# The entries of an observed module's __dict__, which hide the methods of its class.
OBSERVED = (STEP, STEP_IN_PLACE, SCALE)


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
    """Call `see` at each addition of a patched module, until `release`."""
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

    module.__dict__.update({STEP: around(getattr(cls, STEP)), SCALE: scale})
    module.__dict__[STEP_IN_PLACE] = around(getattr(cls, STEP_IN_PLACE))


def release(module: Any) -> None:
    """Leave a module as it was before `observe`."""
    for name in OBSERVED:
        module.__dict__.pop(name, None)
