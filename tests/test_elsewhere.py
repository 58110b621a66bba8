"""Models of other packages, which the extra `elsewhere` installs."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import pytest

import eulernet
from tests.elsewhere import PACKAGES
from tests.elsewhere.case import Case, specimen
from tests.helpers.checks import check
from tests.helpers.coverage import Covered
from tests.helpers.zoo import quiet

pytestmark = [pytest.mark.sweep, pytest.mark.elsewhere]


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize(
    ("package", "case"),
    [
        pytest.param(
            package,
            case,
            id=f"{package} {case}",
            marks=[] if _installed(package) else pytest.mark.skip(reason=f"{package} is not installed"),
        )
        for package, cases in PACKAGES.items()
        for case in cases
    ],
)
def test_elsewhere(package: str, case: Case, record_property: Callable[[str, object], None]) -> None:
    model = specimen(case)
    with quiet():
        found = eulernet.find_steps(model.model, example_inputs=model.example)
    assert (len(found), len(found.long), len(found.unsupported)) == (case.steps, case.long, case.missed)
    if not case.steps:
        with pytest.raises(eulernet.EulernetError), quiet():
            eulernet.patch(model.model, example_inputs=model.example)
        return
    steps, folded = check(model)
    covered = Covered("elsewhere", package, str(case), len(steps), case.long, case.missed, folded)
    record_property("coverage", tuple(covered))  # xdist sends builtin types only


def test_at_least_15_packages_and_250_models_are_tried() -> None:
    models = [(package, str(case)) for package, cases in PACKAGES.items() for case in cases]
    assert len(PACKAGES) >= 15
    assert len(set(models)) == len(models) >= 250
