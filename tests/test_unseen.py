"""Additions that the example did not run: the patched model says so where one of them runs after all."""

import copy
import functools
import operator
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


class Forms(nn.Module):
    """The same step in each form that an addition has."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.kept = mlp(), None

    def forward(self, x: Tensor, form: str = "", labels: Tensor | None = None, mask: Tensor | None = None) -> Any:
        y, states = self.f(x), {"x": x.clone()}
        match form:
            case "function":
                return torch.add(x, y)
            case "keyword":
                return torch.add(input=x, other=y)
            case "method":
                return x.add(y)
            case "in place":
                return y.add_(x)
            case "difference":
                return x - y
            case "entry":
                states["x"] += y
                return states["x"]
            case "attribute":
                self.kept = x.clone()
                self.kept += y
                return self.kept
            case "slice":
                states["x"][:, :2] += y[:, :2]
                return states["x"]
            case "comprehension":
                return torch.stack([a + b for a, b in zip(x, y, strict=True)])
            case "lambda":
                return (lambda a: a + y)(x)
            case "sum":
                return sum([x, y])
            case "sum to a start":
                return sum([y], x)
            case "sum of a generator":
                return sum(part for part in (x, y))
            case "reduce":
                return functools.reduce(operator.add, [x, y])
            case "lerp":
                return torch.lerp(x, y, 0.5)
            case "addcmul":
                return x.addcmul(y, y)
            case "noise":
                return y + 0.1 * torch.randn_like(x)
            case "losses":
                return y.square().mean((1, 2)) + y.abs().mean((1, 2))
        if mask is not None:
            y = y + mask
        x = x + y
        if labels is not None:
            loss = (x - labels).square().mean()
            return loss + 0.1 * x.square().mean() * (torch.tensor(1.0) + torch.tensor(2.0))
        return x


FORMS = "function keyword method difference entry attribute slice comprehension lambda sum reduce lerp addcmul".split()
FORMS += ["sum to a start", "sum of a generator"]


@pytest.mark.parametrize("form", [*FORMS, "in place"])
def test_each_form_of_an_addition_is_told(form: str) -> None:
    model = eulernet.patch(Forms(), 0.3, example_inputs=X)
    with pytest.warns(EulernetWarning, match=SAYS):
        output = model(X, form)
    assert torch.equal(output, eulernet.unpatch(model)(X, form))


@pytest.mark.parametrize("given", ["labels", "mask"])
@pytest.mark.filterwarnings("error")
def test_a_loss_and_what_the_caller_gives_are_no_streams(given: str) -> None:
    eulernet.patch(Forms(), 0.3, example_inputs=X)(X, **{given: torch.zeros_like(X)})


@pytest.mark.parametrize("form", ["noise", "losses"])
@pytest.mark.filterwarnings("error")
def test_what_takes_no_gradient_beside_what_does_is_no_stream(form: str) -> None:
    eulernet.patch(Forms(), 0.3, example_inputs=X)(X.clone().requires_grad_(), form)


class Deeper(nn.Module):
    """Its second block runs where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([TwoWays(True), TwoWays(True)])

    def forward(self, x: Tensor, blocks: int = 1) -> Tensor:
        for block in self.blocks[:blocks]:
            x = block(x)
        return x


def test_a_block_that_no_example_has_reached_is_told_when_its_like_is_patched() -> None:
    with pytest.warns(EulernetWarning, match=r"blocks\.1: the example inputs never reached these modules, and others"):
        eulernet.patch(Deeper(), 0.3, example_inputs=X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(eulernet.steps(eulernet.patch(Deeper(), 0.3, example_inputs={"x": X, "blocks": 2}))) == 2


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


class Asked(nn.Module):
    """Which way each block goes is asked at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([TwoWays(True), TwoWays(False)])

    def forward(self, x: Tensor, first: tuple[bool, ...] = (True, False)) -> Tensor:
        for block, way in zip(self.blocks, first, strict=True):
            block.first = way
            x = block(x)
        return x


def test_a_way_that_another_block_of_the_class_has_taken_is_told() -> None:
    model = eulernet.patch(Asked(), 0.3, example_inputs=X)
    with pytest.warns(EulernetWarning, match=SAYS) as caught:
        model(X, first=(False, True))
    assert len(caught) == 2
