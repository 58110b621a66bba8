"""h as a scale and a learning rate: the parameter groups."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eulernet
from eulernet import EulernetError
from tests.helpers.folding import Residual

# -------------------------------------------------------------------------------------------------------- param_groups


class MLP(nn.Module):
    """A residual network with or without batch norm, in float64.

    Nothing in it has a gradient that is zero but for rounding (a bias before batch norm, a ReLU that is always on),
    which Adam would make as large as any other.
    """

    def __init__(self, norm: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(2, 16)
        self.blocks = nn.Sequential()
        for _ in range(6):
            layers = [nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16, bias=not norm)]
            self.blocks.append(Residual(nn.Sequential(*layers, *([nn.BatchNorm1d(16)] if norm else []))))
        self.head = nn.Linear(16, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


POINTS = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

CLASSES = (POINTS[:, 0] * POINTS[:, 1] > 0).long()

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, eps=1e-30),  # epsilon is not scaled
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-30),
}

RATES = {"sgd": 0.1, "adam": 0.01, "adamw": 0.01}


def losses(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """Of 20 steps of training."""
    result = []
    for _ in range(20):
        loss = F.cross_entropy(model(POINTS), CLASSES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.append(loss.detach())
    return torch.stack(result)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch-norm"])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_h_is_a_scale_and_a_learning_rate(rule: Any, decay: float, norm: bool) -> None:
    """Training behind h equals training with the maps h times as large at their own rate, over 20 steps."""
    lr, build = RATES[rule], OPTIMIZERS[rule]
    h = [0.1, 0.2, 0.3, 0.5, 1.0, 2.0]
    patched = eulernet.patch(MLP(norm), h, example_inputs=POINTS)
    expected = losses(patched, build([{"params": list(patched.parameters()), "lr": lr, "weight_decay": decay}]))

    folded = eulernet.fold(eulernet.patch(MLP(norm), h, example_inputs=POINTS), example_inputs=POINTS)
    groups = eulernet.param_groups(folded, lr, h=h, optimizer=rule, weight_decay=decay, example_inputs=POINTS)
    actual = losses(folded, build(groups))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)
    assert expected[-1] < expected[0]

    # the scale alone, and the rate alone, are something else
    for model, groups in (
        (eulernet.fold(eulernet.patch(MLP(norm), h, example_inputs=POINTS), example_inputs=POINTS), None),
        (plain := MLP(norm), eulernet.param_groups(plain, lr, h=h, optimizer=rule, example_inputs=POINTS)),
    ):
        other = losses(model, build(groups or [{"params": list(model.parameters()), "lr": lr}]))
        assert (other - expected).abs().max() > 1e-3


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_the_learning_rate_of_h_can_be_undone(rule: Any) -> None:
    """On a patched model 1 / h leaves the first effect alone: the maps start smaller, and learn as they would."""
    lr, build = RATES[rule], OPTIMIZERS[rule]
    patched = eulernet.patch(MLP(True), 0.25, example_inputs=POINTS)
    groups = eulernet.param_groups(patched, lr, h=lambda step: 1 / step.h, optimizer=rule, example_inputs=POINTS)
    folded = eulernet.fold(eulernet.patch(MLP(True), 0.25, example_inputs=POINTS), example_inputs=POINTS)
    actual = losses(patched, build(groups))
    expected = losses(folded, build([{"params": list(folded.parameters()), "lr": lr, "weight_decay": 0.0}]))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


def test_each_parameter_is_in_one_group() -> None:
    model = MLP(True)
    groups = eulernet.param_groups(model, 0.1, h={"blocks.0": 0.5, "*": 1.0}, weight_decay=0.01, example_inputs=POINTS)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.1, 0.01), (0.025, 0.04)]
    assert [id(p) for p in groups[1]["params"]] == [id(p) for p in model.blocks[0].f[3].parameters()]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    torch.optim.SGD(groups)
    assert not eulernet.is_patched(model)
    for optimizer, expected in (("adam", (0.05, 0.04)), ("adamw", (0.05, 0.02))):
        _, last = eulernet.param_groups(
            model, 0.1, h={"blocks.0": 0.5, "*": 1.0}, optimizer=optimizer, weight_decay=0.01, example_inputs=POINTS
        )
        assert (last["lr"], last["weight_decay"]) == expected


@pytest.mark.parametrize("before", [False, True], ids=["patched before", "patched after"])
@pytest.mark.parametrize("preserve", [False, True])
def test_an_optimizer_may_be_built_before_or_after_the_patch(before: bool, preserve: bool) -> None:
    model = MLP(True)
    if before:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    eulernet.patch(model, 0.5, example_inputs=POINTS, preserve=preserve)
    if not before:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = eulernet.patch(MLP(True), 0.5, example_inputs=POINTS, preserve=preserve)
    expected = losses(other, torch.optim.SGD(other.parameters(), lr=0.1))
    assert torch.equal(losses(model, optimizer), expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr": 0}, "lr must be a positive, finite number, not 0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"h": -1}, "h must be a positive, finite number, not -1"),
        ({"h": [0.1]}, "h has 1 values, the model has 6 steps"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"optimizer": "lamb"}, r"optimizer must be one of 'sgd', 'adam', 'adamw', not 'lamb'"),
    ],
)
def test_bad_values_are_refused(arguments: dict[str, Any], words: str) -> None:
    model = MLP(False)
    with pytest.raises(EulernetError, match=words):
        eulernet.param_groups(model, **{"lr": 0.1, "h": 0.1, "example_inputs": POINTS, **arguments})
