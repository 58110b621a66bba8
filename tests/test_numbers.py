"""One rule for a number, wherever one is given: those of Python and of NumPy are taken alike, else it is an error."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import eulernet
from eulernet import EulernetError, EulernetWarning
from eulernet._checks import positive, whole_number

X = torch.zeros(2, 5, 8)


def layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)


def patched() -> nn.Module:
    return eulernet.patch(layer(), h=0.5, example_inputs=X)


REAL: dict[str, Callable[[Any], Any]] = {
    "h": lambda value: eulernet.steps(eulernet.patch(layer(), h=value, example_inputs=X)),
    "set_h": lambda value: eulernet.steps(eulernet.set_h(patched(), value)),
    "rule": lambda value: eulernet.schedules.inverse(c=value)(eulernet.steps(patched())[0]),
    "gain": lambda value: eulernet.suggest_h(8, gain=value).bounds,
    "noise": lambda value: str(eulernet.diagnose(patched(), X + 1, noise=value)),
    "lr": lambda value: [g["lr"] for g in eulernet.param_groups(patched(), value, h=0.5, example_inputs=X)],
    "end": lambda value: eulernet.HScheduler(patched(), end=value, total_steps=2).end,
}
WHOLE: dict[str, Callable[[Any], Any]] = {
    "depth": lambda value: eulernet.suggest_h(value).bounds,
    "every": lambda value: eulernet.watch(patched(), every=value)._every,
    "total_steps": lambda value: eulernet.HScheduler(patched(), total_steps=value).total_steps,
    "seed": lambda value: str(eulernet.diagnose(patched(), X + 1, seed=value)),
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_a_real_number_of_numpy_is_taken_as_one_of_python(name: str, kind: type) -> None:
    torch.manual_seed(0)
    expected = REAL[name](0.25)
    torch.manual_seed(0)
    assert REAL[name](kind(0.25)) == expected


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_a_whole_number_of_numpy_is_taken_as_one_of_python(name: str, kind: type) -> None:
    torch.manual_seed(0)
    expected = WHOLE[name](3)
    torch.manual_seed(0)
    assert WHOLE[name](kind(3)) == expected


@pytest.mark.parametrize("value", [0, -1, True, "1", None, float("nan"), float("inf"), 10**400, torch.ones(2)])
def test_what_is_no_positive_number_is_refused_with_an_example(value: object) -> None:
    with pytest.raises(EulernetError, match=r"^h must be a positive, finite number, not .*; for example h=0\.1$"):
        positive(value, "h", "h=0.1")


@pytest.mark.parametrize("value", [0, True, 1.0, np.float64(2), "1", None, 9])
def test_what_is_no_whole_number_in_bounds_is_refused_with_an_example(value: object) -> None:
    with pytest.raises(EulernetError, match=r"^n must be a whole number, from 1 to 8, not .*; for example n=2$"):
        whole_number(value, "n", "n=2", least=1, most=8)


@pytest.mark.parametrize("h", [np.linspace(0.1, 0.2, 2), torch.linspace(0.1, 0.2, 2)])
def test_h_of_each_step_may_be_an_array(h: Any) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    eulernet.patch(model, h, example_inputs=torch.zeros(2, 3, 8))
    assert [step.h for step in eulernet.steps(model)] == h.tolist()


@pytest.mark.parametrize("bounds", [(np.float32(0.01), np.float64(1)), np.array([0.01, 1.0])])
def test_bounds_of_calibrate_may_be_of_numpy(bounds: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 64, 0.0, batch_first=True) for _ in range(6)))
    batch = torch.randn(4, 5, 8)
    with pytest.warns(EulernetWarning, match=r"at h = 0\.01 and .* at h = 1, below the target"):
        assert eulernet.calibrate(model, batch, target=1e9, bounds=bounds, quantity="noise") == 1
