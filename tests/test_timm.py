"""Models that together cover every block class of timm."""

import importlib
import pkgutil
from collections.abc import Callable

import pytest
import torch
from torch import nn

import eulernet
from tests.helpers.checks import check
from tests.helpers.zoo import TIMM, TIMM_SHRUNK, quiet, timm_model

timm = pytest.importorskip("timm")

QUICK = "test_resnet test_vit2 test_convnext levit_128s".split()
WITHOUT_STEPS = """
    densenet121 ese_vovnet19b_slim ese_vovnet19b_slim_dw inception_v3 inception_v4 mobilenetv1_100 rdnet_tiny
    selecsls42 test_efficientnet_evos test_efficientnet_gn test_efficientnet_ln vgg11
""".split()
# Kernels of five dimensions, which have no channels_last.
CANNOT = {"channels_last": ["lambda_resnet26t"]}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.sweep) for n in TIMM])
def test_each_model_of_timm_is_patched(name: str, cover: Callable[..., None]) -> None:
    specimen = timm_model(name)
    if name in WITHOUT_STEPS:
        with pytest.raises(eulernet.EulernetError, match="no residual step"):
            eulernet.patch(specimen.model, example_inputs=specimen.example)
        return
    specimen.fails_as(CANNOT, name)
    steps, folded = check(specimen)
    module = type(specimen.model).__module__.removeprefix("timm.models.")
    cover("timm", module, name, specimen, steps, folded)


# Classes that no registered model holds, whatever its size.
UNUSED = {
    f"timm.models.{name}"
    for name in """
    _features.FeatureGetterNet _features.FeatureHookNet _features_fx.FeatureGraphNet _features_fx.GraphExtractNet
    beit.RelativePositionBias convnext.Downsample csatv2.Dct2dStats efficientformer.Flat
    efficientnet.EfficientNetFeatures hrnet.HighResolutionNetFeatures
    inception_v3.InceptionAux levit.Downsample maxxvit.PartitionAttention2d
    mobilenetv3.MobileNetV3Features mvitv2.MultiScaleAttentionPoolFirst sequencer.RNNIdentity sequencer.Shuffle
    """.split()
}


@pytest.mark.sweep
def test_every_class_of_timm_is_tried() -> None:
    defined: set[type[nn.Module]] = set()
    for info in pkgutil.iter_modules(timm.models.__path__):
        with quiet():  # some are deprecated names of others
            module = importlib.import_module(f"timm.models.{info.name}")
        own = [
            value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__
        ]
        defined |= {cls for cls in own if issubclass(cls, nn.Module)}
    tried: set[type[nn.Module]] = set()
    with quiet(), torch.device("meta"):
        for name in TIMM:
            tried |= {type(m) for m in timm.create_model(name, **TIMM_SHRUNK.get(name, {})).modules()}
    bases = {base for cls in tried for base in cls.__mro__}
    assert {f"{cls.__module__}.{cls.__qualname__}" for cls in defined - bases} <= UNUSED
