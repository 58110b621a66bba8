"""Gated updates are one function however they are written: reported, left alone, and scaled where they are named."""

import copy
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import eulernet
from tests.traps.base import DIM
from tests.traps.gated import SPELLINGS, ByANumber, Cell, Highway, NoGates, Normalized, ResidualBesideGated

EVERY = [*SPELLINGS.values(), Cell, Highway, Normalized]
X = torch.randn(2, 4, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def made(cls: Any, *args: Any) -> Any:
    torch.manual_seed(0)
    return cls(*args).double()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    x = X.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for n, p in model.named_parameters() if "log_h" not in n)]  # type: ignore[list-item]


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
def test_all_spellings_are_one_kind_and_left_alone(cls: Any) -> None:
    found = eulernet.find_steps(made(cls), example_inputs=X)
    assert len(found) == len(found.long) == len(found.unsupported) == 0
    calls = 1 if cls in (Highway, Normalized) else X.shape[1]
    assert [(step.kind, step.calls) for step in found.gated] == [("gated", calls)]
    assert "gated updates, left alone" in str(found)
    assert found == eulernet.Steps.from_json(found.to_json())
    with pytest.raises(eulernet.EulernetError, match=r'is gated: .* include="\*"'):
        eulernet.patch(made(cls), 0.3, example_inputs=X)


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
def test_named_they_go_h_of_their_way(cls: Any) -> None:
    model = eulernet.patch(made(cls), 1.0, example_inputs=X, include="*")
    for h in (0.3, 1.7):
        eulernet.set_h(model, h)
        torch.testing.assert_close(model(X), made(cls).reference(X, h), rtol=1e-12, atol=1e-12)
    eulernet.set_h(model, 1.0)
    for one, other in zip(gradients(model), gradients(made(cls)), strict=True):
        assert torch.equal(one, other)
    assert type(eulernet.unpatch(model)) is cls


def test_all_spellings_compute_the_same_at_any_h() -> None:
    outputs = [eulernet.patch(made(cls), 0.4, example_inputs=X, include="*")(X) for cls in SPELLINGS.values()]
    for output in outputs:
        torch.testing.assert_close(output, outputs[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", [SPELLINGS["Mix"], SPELLINGS["Lerp"], SPELLINGS["Scripted"], Cell])
def test_copies_pickles_and_saved_steps(cls: Any, tmp_path: Path) -> None:
    model = eulernet.patch(made(cls), 0.3, example_inputs=X, include="*")
    expected = model(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), expected)
        eulernet.set_h(other, 1.0)
        assert torch.equal(other(X), made(cls)(X))
    eulernet.steps(model).save(tmp_path / "steps.json")
    again = eulernet.patch(made(cls), tmp_path / "steps.json", example_inputs=X)
    assert torch.equal(again(X), expected)


@pytest.mark.parametrize("cls", [SPELLINGS["Mix"], SPELLINGS["FromTheState"], SPELLINGS["Lerp"], Cell])
def test_h_is_learned(cls: Any) -> None:
    model = eulernet.patch(made(cls), 0.3, example_inputs=X, include="*", trainable=True)
    (name,) = [n for n, _ in model.named_parameters() if "log_h" in n]
    log_h = model.get_parameter(name)
    model(X).square().sum().backward()
    assert log_h.grad is not None
    with torch.no_grad():
        losses = [float(made(cls).reference(X, 0.3 * math.exp(d)).square().sum()) for d in (1e-5, -1e-5)]
    assert float(log_h.grad) == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("cls", [SPELLINGS["Mix"], SPELLINGS["Lerp"], Highway])
def test_compiled_and_checkpointed(cls: Any) -> None:
    counter = CompileCounter()
    model = eulernet.patch(made(cls), 0.3, example_inputs=X, include="*")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for h in (0.3, 0.6, 1.0):
        eulernet.set_h(model, h)
        torch.testing.assert_close(compiled(X), made(cls).reference(X, h), rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1
    assert torch.equal(compiled(X), made(cls)(X))
    eulernet.set_h(model, 0.3)
    plain = gradients(model)
    model.zero_grad()
    x = X.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, plain[1])


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
def test_fold_and_preserve_refuse_them_in_words(cls: Any) -> None:
    model = eulernet.patch(made(cls), 0.3, example_inputs=X, include="*")
    with pytest.raises(eulernet.EulernetError, match="no last affine map"):
        eulernet.fold(model, example_inputs=X)
    assert torch.equal(model(X), eulernet.fold(model, where_possible=True, example_inputs=X)(X))
    with pytest.raises(eulernet.EulernetError, match="no last affine map"):
        eulernet.patch(made(cls), 0.3, example_inputs=X, include="*", preserve=True)


def test_the_gate_may_be_a_parameter() -> None:
    assert [s.kind for s in eulernet.find_steps(made(Highway, True), example_inputs=X).gated] == ["gated"]
    model = eulernet.patch(made(Highway, True), 0.3, example_inputs=X, include="*")
    torch.testing.assert_close(model(X), made(Highway, True).reference(X, 0.3), rtol=1e-12, atol=1e-12)


def test_a_fixed_part_of_the_way_is_a_step() -> None:
    model = eulernet.patch(made(ByANumber), 0.3, example_inputs=X)
    assert [step.kind for step in eulernet.steps(model)] == ["identity"]
    torch.testing.assert_close(model(X), X + 0.3 * 0.5 * (model.f(X) - X), rtol=1e-12, atol=1e-12)
    with pytest.raises(eulernet.EulernetError, match="goes a part of the way from one tensor to another"):
        eulernet.fold(model, example_inputs=X)


def test_sums_of_the_same_forms_that_are_none() -> None:
    found = eulernet.find_steps(made(NoGates), example_inputs=X)
    assert len(found) == len(found.gated) == len(found.unsupported) == 0


def test_residual_steps_beside_them_are_scaled_and_it_is_said_what_is_not() -> None:
    model = made(ResidualBesideGated)
    with pytest.warns(eulernet.EulernetWarning, match=r"keeps h = 1 at highway: gated updates") as seen:
        eulernet.patch(model, [0.3, 0.6], example_inputs=X)
    assert not any(re.search(r"\bgru\b", str(w.message)) for w in seen)  # inside a branch
    torch.testing.assert_close(model(X), made(ResidualBesideGated).reference(X, [0.3, 0.6]), rtol=1e-12, atol=1e-12)
    found = eulernet.find_steps(made(ResidualBesideGated), example_inputs=X)
    assert [step.name for step in found.gated] == ["highway", "gru"]


CALLS = [torch.gru_cell, torch._VF.gru_cell, torch.ops.aten.gru_cell]  # type: ignore[attr-defined]


@pytest.mark.parametrize("function", CALLS, ids=["torch", "VF", "aten"])
def test_a_cell_is_gated_where_it_is_called_as_a_function(function: Any) -> None:
    class Called(Cell):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            s, cell = x.new_zeros(x.shape[0], DIM), self.cell
            for t in range(x.shape[1]):
                s = function(x[:, t], s, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
            return self.o(s)

    (step,) = eulernet.find_steps(made(Called), example_inputs=X).gated
    assert (step.kind, step.calls) == ("gated", X.shape[1])
    model = eulernet.patch(made(Called), 0.3, example_inputs=X, include="*")
    torch.testing.assert_close(model(X), made(Cell).reference(X, 0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("assigned", [False, True])
def test_an_update_that_overwrites_its_state_is_reported_and_refused_where_it_is_named(assigned: bool) -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.z = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            s, n, z = x.clone(), torch.tanh(self.f(x)), torch.sigmoid(self.z(x))
            if assigned:
                s = s.lerp_(n, z)
            else:
                s.lerp_(n, z)
            return s

    model = nn.Sequential(made(Overwriting), made(Highway))
    before = model(X)
    assert [step.name for step in eulernet.find_steps(model, example_inputs=X).gated] == ["0", "1"]
    with pytest.raises(eulernet.EulernetError, match=r"^0 \(Overwriting\): .* exclude='0'\)$"):
        eulernet.patch(model, 0.3, example_inputs=X, include=["0", "1"])
    assert not eulernet.is_patched(model) and torch.equal(model(X), before)
    with pytest.warns(eulernet.EulernetWarning, match=r"^not scaled: 0 \(Overwriting\)"):
        eulernet.patch(model, 0.3, example_inputs=X, include="*")
    expected = made(Highway).reference(made(Overwriting)(X), 0.3)
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("error::eulernet.EulernetWarning")
def test_who_excludes_them_has_decided() -> None:
    eulernet.patch(made(ResidualBesideGated), 0.3, example_inputs=X, exclude="highway")


class ValueResidual(nn.Module):
    """nGPT: the first values are mixed into those of each layer, and the stream is gated."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.outs = (nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = None
        for value, out in zip(self.values, self.outs, strict=True):
            v = value(x)
            if first is None:
                first = v
            else:
                v = 0.5 * (v + first)
            x = torch.lerp(x, out(v), torch.sigmoid(out(x)))
        return x


def test_values_that_are_mixed_beside_a_gated_stream_are_no_steps() -> None:
    steps = eulernet.find_steps(ValueResidual(), example_inputs=torch.randn(2, 5, DIM))
    assert len(steps) == 0 and len(steps.gated) == 4 and not steps.long and not steps.unsupported
    assert steps.reasons() == ["3 position or injected input"]


class TwoGates(nn.Module):
    """A highway whose gates have nothing to do with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.t, self.c = (nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.a(x)) * torch.sigmoid(self.t(x)) + x * torch.sigmoid(self.c(x))


class Gateway(TwoGates):
    """D-FINE: both gates are made at once, of the state and the candidate."""

    def __init__(self) -> None:
        super().__init__()
        self.t, self.c = nn.Linear(2 * DIM, 2 * DIM), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.a(x))
        one, other = torch.sigmoid(self.t(torch.cat((x, y), -1))).chunk(2, -1)
        return one * x + other * y


class MaskedCoupling(TwoGates):
    """RealNVP: the part behind the mask is given, the other one is shifted and scaled by what was made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.arange(DIM) % 2).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = self.mask * x
        scale, shift = torch.tanh(self.c(given)) * (1 - self.mask), self.a(given) * (1 - self.mask)
        return (1 - self.mask) * (x - shift) * torch.exp(-scale) + given


@pytest.mark.parametrize("cls", [TwoGates, Gateway, MaskedCoupling], ids=lambda cls: cls.__name__)
def test_updates_with_two_gates_or_a_mask_are_gated(cls: Any) -> None:
    found = eulernet.find_steps(made(cls), example_inputs=X)
    assert len(found) == len(found.long) == len(found.unsupported) == 0
    assert [step.kind for step in found.gated] == ["gated"]
    model = eulernet.patch(made(cls), 0.3, example_inputs=X, include="*")
    torch.testing.assert_close(model(X), X + 0.3 * (made(cls)(X) - X), rtol=1e-12, atol=1e-12)
