"""What `diagnose` advises, prints, draws and refuses."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import eulernet
from eulernet import EulernetError
from tests.helpers.networks import linear

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)

# ---- advice


def test_branches_that_are_zero_are_advised_on() -> None:
    x = torch.randn(2, 3, 32, 32)
    zero = eulernet.diagnose(timm.create_model("resnet18", zero_init_last=True), x)
    assert zero.advice == "branches are zero at initialisation: h only lowers their learning rate"
    assert {row.step_size for row in zero.rows} == {0.0}
    small = timm.create_model("cait_xxs24_224", img_size=32, depth=2, depth_token_only=1)
    advice = eulernet.diagnose(small, x).advice
    assert advice.startswith("branches are nearly zero (at most ") and advice.endswith("lowers their learning rate")


def test_no_change_is_advised_where_gradients_do_not_grow() -> None:
    advice = eulernet.diagnose(linear(12, 0.02), X).advice
    assert advice == (
        "12 steps, gradients grow 1.3-fold from the last block to the first: nothing to gain from a smaller h"
    )
    assert "gradients shrink to 0.28 of their norm" in eulernet.diagnose(linear(12, -0.1), X).advice


def test_advice_holds_when_measured_again() -> None:
    model = linear(50, 0.1)
    advice = eulernet.diagnose(model, X).advice
    assert advice.startswith("50 steps, gradients grow 117-fold from the last block to the first: h = 0.1")
    h, growth = advice.partition("h = ")[2].split(" makes it ")
    found = eulernet.diagnose(eulernet.patch(model, h=float(h), example_inputs=X), X)
    assert found.gradient_growth == pytest.approx(float(growth), rel=0.05) == pytest.approx(2, rel=0.1)
    assert "with so few steps" in eulernet.diagnose(linear(8, 0.5), X).advice


def test_branches_that_are_huge_are_advised_on() -> None:
    advice = eulernet.diagnose(linear(50, 100.0), X).advice
    assert "from the last block to the first: h = 0.00014 makes it " in advice


def test_gradients_that_overflow_are_advised_on() -> None:
    advice = eulernet.diagnose(linear(50, 10.0, dtype=torch.float32), X.float()).advice
    assert advice.startswith("50 steps, gradients overflow on the way from the last block to the first: h = 0.001")


class Projection(nn.Module):
    """A step whose skip has an orthogonal map times `skip`, and its branch one times `branch`, after another."""

    def __init__(self, skip: float, branch: float) -> None:
        super().__init__()
        self.skip, self.a, self.b = (nn.Linear(4, 4, bias=False) for _ in range(3))
        for layer, gain in ((self.skip, skip), (self.a, 1.0), (self.b, branch)):
            nn.init.orthogonal_(layer.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.b(torch.relu(self.a(x)))


def test_no_h_is_advised_where_none_helps() -> None:
    """The projection alone lets gradients grow."""
    advice = eulernet.diagnose(nn.Sequential(Projection(10, 1), Projection(10, 1)), X.float()).advice
    assert re.search(r"; at h = 1e-06 that is 100-fold: it does not come from the branches$", advice)


def test_a_part_is_advised_where_h_helps_in_part() -> None:
    """Two projections make gradients grow 4-fold, branches much more: the advice is an h at which they double it."""
    torch.manual_seed(0)
    model = nn.Sequential(Projection(2, 10), *linear(12, 0.5, dtype=torch.float32), Projection(2, 10))
    advice = eulernet.diagnose(model, X.float()).advice
    matched = re.search(r"fold .*: h = ([\d.]+) makes it ([\d.]+), of which ([\d.]+) does not come from the br", advice)
    assert matched is not None
    h, growth, rest = map(float, matched.groups())
    assert rest == pytest.approx(4, rel=0.01) and growth == pytest.approx(2 * rest, rel=0.05)
    found = eulernet.diagnose(eulernet.patch(model, h=h, example_inputs=X.float()), X.float())
    assert found.gradient_growth == pytest.approx(growth, rel=0.05)


# ---- what is printed, written and drawn


def test_the_table_and_the_json_say_the_same() -> None:
    found = eulernet.diagnose(linear(3, 0.3), X, gains=True)
    lines = str(found).splitlines()
    assert lines[0].split() == ["#", "step", "h", "‖x‖", "‖hF‖/‖x‖", "‖∂L/∂x‖", "W"]
    assert lines[1].split() == ["0", "0", "1", "2.17", "0.3", "2.2", "0.3"]
    assert "Eq. (6): at most 2.2; Proposition 1: at most 10^1.1" in str(found)
    assert "Proposition 2: at most 2.52" in str(found)
    assert lines[-1] == found.advice and repr(found) == f"<Diagnosis: {found.advice}>"
    data = json.loads(found.to_json())
    assert data["rows"][2]["step"] == "2" and data["gradient_growth"] == found.gradient_growth


def test_each_measure_is_drawn(tmp_path: Path) -> None:
    found = eulernet.diagnose(linear(3, 0.3), X)
    figure = found.plot(tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    assert [axes.get_ylabel() for axes in figure.axes] == ["‖∂L/∂x‖", "‖hF‖ / ‖x‖", "‖x‖"]
    drawn = [axes.lines[0].get_ydata().tolist() for axes in figure.axes]
    assert drawn == [[getattr(row, name) for row in found.rows] for name in ("gradient", "step_size", "skip")]
    assert found.advice in figure.get_suptitle()
    assert [axes.get_yscale() for axes in figure.axes] == ["linear"] * 3  # a logarithmic axis would have no second tick
    assert eulernet.diagnose(linear(12, 0.3), X).plot().axes[0].get_yscale() == "log"


def test_a_plot_without_matplotlib_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = eulernet.diagnose(linear(3, 0.3), X)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EulernetError, match="pip install matplotlib"):
        found.plot()


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("model", X), "takes a torch.nn.Module, not str"),
        ((linear(2, 0.3), 3), "it must be a tensor, a tuple"),
        ((linear(2, 0.3), X[:, :3]), "diagnose measures a copy patched at h = 1, but: Sequential failed"),
        ((eulernet.patch(linear(2, 0.3), example_inputs=X), X[:, :3]), r"failed in train mode.*diagnose\(model, batch"),
        ((linear(2, 0.3), X, nn.functional.mse_loss), r"eulernet.diagnose\(model, \(inputs, targets\), loss_fn\)"),
        ((linear(2, 0.3), (X, X[0, :3]), nn.functional.mse_loss), "loss_fn.* failed: RuntimeError"),
        ((linear(2, 0.3), (X, X), lambda a, b: a - b), "must return a loss"),
        ((linear(2, 0.3), (X, X), lambda a, b: 1.0), "loss_fn returned 1.0"),
        ((nn.Linear(4, 4).double(), X), "no residual step was found"),
        ((linear(2, 0.3).to("meta"), X), "meta device"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_what_diagnose_cannot_do_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(EulernetError, match=words):
        eulernet.diagnose(*arguments)


@pytest.mark.parametrize("noise", [0, -1, float("nan"), "much", True])
def test_noise_must_be_a_positive_number(noise: Any) -> None:
    with pytest.raises(EulernetError, match="noise must be a positive, finite number"):
        eulernet.diagnose(linear(2, 0.3), X, noise=noise)


class Nothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = linear(1, 0.3)

    def forward(self, x: Tensor) -> None:
        self.inner(x)


def test_an_output_without_tensors_is_refused() -> None:
    with pytest.raises(EulernetError, match=r"returned no tensor with a gradient.*loss_fn\)"):
        eulernet.diagnose(Nothing(), X)


class InPlace(nn.Module):
    """Its norm keeps x for its gradient, and x is written into."""

    def __init__(self, at_the_step: bool) -> None:
        super().__init__()
        self.norm, self.f, self.at_the_step = nn.LayerNorm(4).double(), nn.Linear(4, 4).double(), at_the_step

    def forward(self, x: Tensor) -> Tensor:
        if self.at_the_step:
            x += self.f(self.norm(x))
            return x
        y = self.norm(x)
        x = x + self.f(y)
        y.mul_(2)  # which the Linear keeps
        return x


@pytest.mark.parametrize("measure", [eulernet.diagnose, eulernet.calibrate])
@pytest.mark.parametrize("patched", [False, True])
def test_a_step_that_writes_into_what_a_gradient_needs_is_named(measure: Any, patched: bool) -> None:
    model = nn.Sequential(*linear(1, 0.3), InPlace(True), InPlace(True))
    if patched:
        eulernet.patch(model, 0.5, example_inputs=X)
    words = r"Sequential cannot be trained.* 1\.norm \(LayerNorm\) keeps .*\(3, 4\).* step '1' writes into it"
    with pytest.raises(EulernetError, match=rf"{words}.*x = x \+ f\(x\).*eulernet\.{measure.__name__}\(model, batch"):
        measure(model, X)
    with pytest.raises(RuntimeError, match="inplace operation"):
        model(X).sum().backward()


def test_what_else_writes_into_what_a_gradient_needs_is_said() -> None:
    model = nn.Sequential(*linear(1, 0.3), InPlace(False))
    with pytest.raises(EulernetError, match=r"1\.f \(Linear\) keeps .* something after it writes into it"):
        eulernet.diagnose(model, X)


def test_a_backward_that_fails_otherwise_is_refused_with_its_reason() -> None:
    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise RuntimeError("there is no way back")

    class Ends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return OneWay.apply(x)  # type: ignore[no-any-return, no-untyped-call]

    model = nn.Sequential(*linear(1, 0.3), Ends())
    with pytest.raises(EulernetError, match=r"its backward fails: RuntimeError: there is no way back\. Once loss"):
        eulernet.diagnose(model, X)
