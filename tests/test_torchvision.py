"""All of torchvision's models."""

from collections.abc import Callable

import pytest

import eulernet
from tests.helpers.checks import check
from tests.helpers.zoo import build_torchvision, quiet, torchvision_model, torchvision_names

torchvision = pytest.importorskip("torchvision")

QUICK = "resnet18 quantized_resnet18 mobilenet_v2".split()
WITHOUT_STEPS = "alexnet vgg squeezenet densenet googlenet inception shufflenet s3d ssd300".split()  # families
# They make tensors of float32 whatever they are given.
CANNOT = {"float64": ["raft_large", "raft_small"]}
# More than 130 million parameters: traced only, and these are their steps.
HUGE = {
    "convnext_large": 36,
    "regnet_y_32gf": 20,
    "regnet_y_128gf": 27,
    "vit_h_14": 64,
    "vit_l_16": 48,
    "vit_l_32": 48,
}


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.sweep) for n in torchvision_names() if n not in HUGE],
)
def test_each_model_of_torchvision_is_patched(name: str, cover: Callable[..., None]) -> None:
    specimen = torchvision_model(name)
    if name.removeprefix("quantized_").startswith(tuple(WITHOUT_STEPS)):
        with pytest.raises(eulernet.EulernetError, match="no residual step"):
            eulernet.patch(specimen.model, example_inputs=specimen.example)
        return
    specimen.fails_as(CANNOT, name)
    steps, folded = check(specimen)
    family = type(specimen.model).__module__.removeprefix("torchvision.models.")
    cover("torchvision", family, name, specimen, steps, folded)


@pytest.mark.sweep
@pytest.mark.parametrize("name", HUGE)
def test_huge_models_are_found_on_meta(name: str) -> None:
    with quiet():
        assert len(eulernet.find_steps(build_torchvision(name))) == HUGE[name]
