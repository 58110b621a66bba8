"""The releases with which continuous integration runs the quick tests a second time."""

import doctest

from tests import oldest


def test_constraints_are_the_lower_bounds() -> None:
    assert doctest.testmod(oldest, raise_on_error=True).attempted > 0
