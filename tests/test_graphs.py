"""Graphs that hold the h of the moment in which they were made, and share the weights: noticed when h moves."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eulernet

torchvision, timm = pytest.importorskip("torchvision"), pytest.importorskip("timm")
extraction = pytest.importorskip("torchvision.models.feature_extraction")
features = pytest.importorskip("timm.models._features_fx")
IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def network() -> Any:
    return eulernet.patch(timm.create_model("resnet18", zero_init_last=False, num_classes=3).eval(), 1.0)


def of_torchvision(model: nn.Module) -> Callable[[Tensor], Any]:
    extractor = extraction.create_feature_extractor(model, {"fc": "y"})
    return lambda x: extractor(x)["y"]


def of_timm(model: nn.Module) -> Callable[[Tensor], Any]:
    extractor = features.FeatureGraphNet(model, (4,))
    return lambda x: extractor(x)[-1]


MOVES: list[Callable[[Any], Any]] = [
    lambda model: eulernet.set_h(model, 0.3),
    lambda model: eulernet.HScheduler(model, 0.3, 0.1, total_steps=2),
    lambda model: eulernet.HScheduler(model, 1.0, 0.1, total_steps=2).step(),
]


@pytest.mark.parametrize("make", [of_torchvision, of_timm])
@pytest.mark.parametrize("move", MOVES)
def test_an_extractor_keeps_the_h_of_before_and_that_is_said(make: Any, move: Callable[[Any], Any]) -> None:
    model = network()
    extractor = make(model)
    before, output = extractor(IMAGE), model(IMAGE)
    with pytest.warns(eulernet.EulernetWarning, match=r"graphs of torch\.fx.*Make them again now"):
        move(model)
    assert torch.equal(extractor(IMAGE), before) and not torch.allclose(model(IMAGE), output)
    with warnings.catch_warnings():
        warnings.simplefilter("error", eulernet.EulernetWarning)  # it is said once, and again after another one is made
        eulernet.set_h(model, 0.2)
    assert not torch.allclose(make(model)(IMAGE), before)
    with pytest.warns(eulernet.EulernetWarning, match="graphs of torch.fx"):
        eulernet.set_h(model, 0.1)


def test_what_shares_modules_follows_and_nothing_is_said() -> None:
    model = timm.create_model("resnet18", features_only=True, zero_init_last=False).eval()
    eulernet.patch(model, 1.0, example_inputs=IMAGE)
    before = model(IMAGE)[-1]
    hooks = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error", eulernet.EulernetWarning)
        of_torchvision(hooks)
        eulernet.set_h(hooks, 1.0)  # nothing moves
        eulernet.set_h(model, 0.3)
    assert not torch.allclose(model(IMAGE)[-1], before)


def test_a_learned_h_is_a_parameter_of_the_extractor_too() -> None:
    model = eulernet.patch(network(), 1.0, trainable=True)
    extractor = of_torchvision(model)
    eulernet.set_h(model, 0.3)
    torch.testing.assert_close(extractor(IMAGE), model(IMAGE))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_callable_keeps_the_h_of_before_and_that_is_said() -> None:
    model, x = network().cuda().requires_grad_(False), IMAGE.cuda()
    captured = torch.cuda.make_graphed_callables(model, (x,))
    before = captured(x).clone()
    with pytest.warns(eulernet.EulernetWarning, match="graphs of CUDA"):
        eulernet.set_h(model, 0.3)
    assert torch.equal(captured(x), before)
