"""Additions that the example did not run: the patched model says so where one of them runs after all."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eulernet
from eulernet import EulernetWarning

X = torch.linspace(-1, 1, 48).view(2, 3, 8)
SAYS = "adds here what the example_inputs that it was patched with did not run"


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class Ways(nn.Module):
    """A residual step in each of several ways, and sums that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.norm, self.offset = mlp(), nn.LayerNorm(8), 3

    def forward(self, x: Tensor, cache: Tensor | None = None, way: str = "") -> Tensor:
        count = self.offset + len(x)
        if way == "in place":
            y = x.clone()
            y += self.f(y)
            return y
        if way == "position":
            return x + torch.ones(8) * count
        if way == "number":
            return self.f(x) + count
        if cache is not None:
            y = self.norm(torch.cat([cache, x], 1))
            return x + self.f(y[:, -x.shape[1] :])
        if way == "conditional":
            return x + self.f(x) if x.sum() > -1e9 else x + self.f(-x)
        x = x + self.f(self.norm(x))
        if way:
            return x
        return x + self.f(x)


def patched(**inputs: Any) -> nn.Module:
    return eulernet.patch(Ways(), 0.3, example_inputs={"x": X, **inputs})


@pytest.mark.parametrize(
    "inputs", [{"cache": X}, {"way": "in place"}, {"way": "conditional"}], ids=["a cache", "in place", "a condition"]
)
def test_an_addition_that_was_not_run_is_told(inputs: dict[str, Any]) -> None:
    model = patched()
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.warns(EulernetWarning, match=SAYS) as caught:
            output = one(X, **inputs)
        assert [w.filename for w in caught] == [__file__]
        assert torch.equal(output, eulernet.unpatch(copy.deepcopy(model))(X, **inputs))


@pytest.mark.parametrize("inputs", [{}, {"way": "position"}, {"way": "number"}, {"way": "other"}])
def test_nothing_is_told_of_what_ran_or_is_no_step(inputs: dict[str, Any]) -> None:
    model = patched()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X, **inputs)
        torch.compile(model, backend="eager", fullgraph=True)(X, **inputs)


def test_another_example_that_leads_there_makes_a_step_of_it() -> None:
    model = patched()
    eulernet.patch(model, 0.3, example_inputs={"x": X, "cache": X})
    expected = X + 0.3 * model.f(model.norm(torch.cat([X, X], 1))[:, -3:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(model(X, cache=X), expected)
    with pytest.warns(EulernetWarning, match=SAYS):
        model(X)


class TwoWays(nn.Module):
    """Each block goes one of two ways, as it was configured."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.f, self.first = mlp(), first

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            return x + self.f(x)
        return self.f(x) + x


def test_what_another_block_of_the_class_has_run_is_known() -> None:
    model = nn.Sequential(TwoWays(True), TwoWays(False))
    eulernet.patch(model, 0.3, example_inputs=X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X)


def test_an_addition_of_the_training_path_that_could_not_be_traced_is_told() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.norm = mlp(), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return x + self.f(self.norm(x))
            return x + self.f(x)

    model = Net()
    with pytest.warns(EulernetWarning, match="the training path was not traced"):
        eulernet.patch(model, 0.3, example_inputs=X[:1, 0])
    with pytest.warns(EulernetWarning, match=SAYS):
        model(X[:, 0])
