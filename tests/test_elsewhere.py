"""Models of other packages, which the extra `elsewhere` installs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

import eulernet
from tests.elsewhere import LEFT_OUT, PACKAGES
from tests.elsewhere.case import Case, specimen
from tests.helpers.checks import check
from tests.helpers.coverage import Covered
from tests.helpers.zoo import quiet

pytestmark = [pytest.mark.sweep, pytest.mark.elsewhere]


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    """Some packages set torch as they are imported: the profiling of TorchScript, Dynamo's limit of recompilations."""
    dynamo = torch._dynamo.config
    before = dynamo.get_config_copy()
    yield
    for name, value in dynamo.get_config_copy().items():
        if value != before[name]:
            setattr(dynamo, name, before[name])
    torch._C._jit_set_profiling_executor(True)
    torch._C._jit_set_profiling_mode(True)


def _installed(package: str) -> bool:
    if package == "VDCNN":  # written here
        return True
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _skipped(package: str) -> pytest.MarkDecorator:
    why = f": {LEFT_OUT[package]}" if package in LEFT_OUT else ""
    return pytest.mark.skipif(not _installed(package), reason=f"{package} is not installed{why}")


@pytest.mark.parametrize(
    ("package", "case"),
    [
        pytest.param(package, case, id=f"{package} {case}", marks=_skipped(package))
        for package, cases in PACKAGES.items()
        for case in cases
    ],
)
def test_each_model_from_elsewhere_is_patched(
    package: str, case: Case, record_property: Callable[[str, object], None]
) -> None:
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


# Models whose configuration says what they take.
GUESSED = {
    "diffusers": """
        AutoencoderKL AutoencoderTiny UNet2DModel UNet2DConditionModel UNet3DConditionModel DiTTransformer2DModel
        PixArtTransformer2DModel SD3Transformer2DModel FluxTransformer2DModel WanTransformer3DModel
    """,
    "litgpt": "GPT",
    "peft": "LoraConfig IA3Config PromptTuningConfig",
    "sentence-transformers": "BERT",
}


@pytest.mark.parametrize("package", [pytest.param(p, marks=_skipped(p)) for p in GUESSED])
def test_the_inputs_are_guessed(package: str) -> None:
    names = GUESSED[package].split()
    cases = [case for case in PACKAGES[package] if str(case).split()[0] in names]
    assert len(cases) >= len(names)
    for case in cases:
        with quiet():
            assert len(eulernet.find_steps(case.model())) == case.steps, case


def test_at_least_15_packages_and_250_models_are_tried() -> None:
    models = [(package, str(case)) for package, cases in PACKAGES.items() for case in cases]
    assert len(PACKAGES) >= 15
    assert len(set(models)) == len(models) >= 250
