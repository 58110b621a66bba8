"""What `suggest_h` says of a depth and of a model."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eulernet
from eulernet import EulernetError, schedules
from tests.helpers.scheduled import DIM, RULES, Repeated, Towers, X, factors, net, patched

# ------------------------------------------------------------------------------------------------------------ suggest_h


@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_the_bounds_are_those_of_the_propositions(gain: float) -> None:
    depth = 20
    for row in eulernet.suggest_h(depth, gain=gain).bounds:
        expected = [RULES.get(row.rule, lambda d, p, h=row.h[0]: h)(depth, p) for p in range(1, depth + 1)]
        assert row.h == pytest.approx(expected, rel=1e-15)
        assert 10**row.log10_gradient == pytest.approx(math.prod(1 + h * gain for h in row.h), rel=1e-12)
        assert row.noise == pytest.approx(sum(row.h) * gain, rel=1e-12)
    text = str(eulernet.suggest_h(depth, gain=gain))
    assert f"x {(1 + 20**-0.5 * gain) ** 20:.3g}" in text and f"e + {20**0.5 * gain:.3g}" in text
    for words in ("(sqrt(d) + h W)^D", "e + h D W", f"W = {gain:g}"):
        assert words in text


def test_no_depth_is_too_large() -> None:
    rows = eulernet.suggest_h(5000).bounds
    assert rows[0].log10_gradient == pytest.approx(5000 * math.log10(2), rel=1e-12)
    assert "1e1505" in str(eulernet.suggest_h(5000))


@pytest.mark.parametrize(("depth", "shallow"), [(1, True), (9, True), (24, False), (54, False)])
def test_it_is_said_where_a_model_is_shallow(depth: int, shallow: bool) -> None:
    assert any(f"D = {depth} is shallow" in note for note in eulernet.suggest_h(depth).notes) == shallow


def test_each_depth_of_a_model_has_its_rows() -> None:
    suggestion = eulernet.suggest_h(Towers(), example_inputs=(X, X))
    assert [row.depth for row in suggestion.bounds] == [3] * 5 + [2] * 5
    assert "D = 3: a.0 to a.2" in str(suggestion) and "D = 2: b.0 to b.1" in str(suggestion)


def test_a_module_that_is_called_several_times_has_one_value_in_all_its_runs() -> None:
    model = Repeated()
    for row in eulernet.suggest_h(model, example_inputs=X).bounds:
        steps = eulernet.steps(eulernet.patch(model, row.rule, example_inputs=X))
        assert sorted(row.h) == sorted(step.h for step in steps for _ in range(step.calls) if step.h)
        assert row.depth == len(row.h) == 5


def test_a_side_branch_of_a_stream_has_the_steps_that_lead_to_it() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.long, self.side = net(2), net(3), net(1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.trunk(x)
            return self.long(x), self.side(x)

    rows = eulernet.suggest_h(Fork(), example_inputs=X).bounds
    expected = [schedules.decreasing()(step) for step in eulernet.find_steps(net(5), example_inputs=X)]
    assert [row.h for row in rows if row.rule == schedules.decreasing()] == [tuple(expected), tuple(expected[:3])]


def test_a_model_stays_as_it_is_and_may_be_patched() -> None:
    model = patched(3, [0.1, 0.2, 0.3])
    for one in (model, nn.DataParallel(model)):
        assert eulernet.suggest_h(one, example_inputs=X).bounds[0].depth == 3
    assert factors(model) == [0.1, 0.2, 0.3]


class Scaled(nn.Module):
    """A block with a scale at the end of its branch."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.a = nn.Linear(DIM, DIM)
        self.gamma = nn.Parameter(torch.full((DIM,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.a(x)


class Normed(nn.Module):
    """A block with a norm at the end of its branch."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM)
        nn.init.constant_(self.norm.weight, value)
        nn.init.zeros_(self.a.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.a(x))


@pytest.mark.parametrize(
    ("make", "value", "zero"),
    [(Scaled, 1e-6, "0.gamma"), (Scaled, 0.1, None), (Normed, 0.0, "0.norm.weight"), (Normed, 1.0, None)],
)
def test_branches_that_are_zero_at_initialisation_are_named(make: Any, value: float, zero: str | None) -> None:
    model = nn.Sequential(make(value), make(value), make(1.0))
    notes = eulernet.suggest_h(model, example_inputs=X).notes
    assert [note for note in notes if "zero at initialisation" in note] == (
        [] if zero is None else [note for note in notes if note.startswith("2 of 3 blocks") and zero in note]
    )
    assert any("eulernet.diagnose" in note for note in notes)


@pytest.mark.parametrize("zero", [True, False])
def test_the_default_initialisation_of_timm(zero: bool) -> None:
    timm = pytest.importorskip("timm")
    notes = eulernet.suggest_h(timm.create_model("resnet26", zero_init_last=zero)).notes
    assert any("8 of 8 blocks" in note and "layer1.0.bn3.weight" in note for note in notes) == zero


@pytest.mark.parametrize("value", [0, -3, True, 2.0, "resnet50", None, nn.Linear])
def test_suggest_h_refuses_what_is_no_depth(value: Any) -> None:
    with pytest.raises(EulernetError, match=re.escape(repr(value)) + r".*eulernet\.suggest_h\(54\)"):
        eulernet.suggest_h(value)


def test_suggest_h_of_a_model_without_steps() -> None:
    with pytest.raises(EulernetError, match="no residual steps"):
        eulernet.suggest_h(nn.Linear(DIM, DIM), example_inputs=X)
    with pytest.raises(EulernetError, match=r"gain.*positive.*-1"):
        eulernet.suggest_h(9, gain=-1)
