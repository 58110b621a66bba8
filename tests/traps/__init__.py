"""Small residual networks with one trap each: a file for each theme, for test_traps.py and others.

They live here and not in the test files because pytest rewrites the asserts of a test file, so that the source of a
function there is no longer what runs. Each trap says what is to be found in it (``expected``, in the order in which the
steps run) and holds its own reference: the same forward written by hand with a step factor for each expected step.

>>> from tests.traps import TRAPS, UNSUPPORTED  # both lists, whole
"""

from tests.traps import (
    beside,
    branches,
    callees,
    calls,
    classes,
    conditions,
    coupled,
    difference,
    forms,
    loops,
    nested,
    places,
    positions,
    shortcuts,
    spelled,
    steps,
    streams,
    sums,
    unsupported,
)
from tests.traps.base import TRAPS, UNSUPPORTED, Trap

__all__ = [
    "TRAPS",
    "UNSUPPORTED",
    "Trap",
    "beside",
    "branches",
    "callees",
    "calls",
    "classes",
    "conditions",
    "coupled",
    "difference",
    "forms",
    "loops",
    "nested",
    "places",
    "positions",
    "shortcuts",
    "spelled",
    "steps",
    "streams",
    "sums",
    "unsupported",
]
