"""The h that `calibrate` returns gives the growth that was asked for when it is measured again, by other means too."""

import copy
import itertools
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import eulernet
from eulernet import EulernetError, EulernetWarning
from tests.helpers.networks import LinearStep, ResNet, Tokens, linear, mlp

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


def vit() -> nn.Module:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **size)
    with torch.no_grad():  # timm's standard deviation of 0.02 is for wider ones
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(5)
    return model


def images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], float]] = {
    "resnet-56": (lambda: ResNet(56), lambda: images(8, 8), 2.0),
    "resnet-20": (lambda: ResNet(20), lambda: images(8, 8), 4.0),
    "mlp-50": (lambda: mlp(50), lambda: torch.randn(16, 8), 1.5),
    "vit": (vit, lambda: images(2, 32), 1.3),
}


# ---- networks of which all is known
@pytest.mark.parametrize("quantity", ["gradient", "noise"])
@pytest.mark.parametrize(("depth", "w", "target"), [(10, 1.0, 2.0), (50, 0.4, 3.0), (200, 1.0, 2.0)])
def test_a_linear_network_has_the_h_that_solves_its_equation(
    depth: int, w: float, target: float, quantity: Any
) -> None:
    """(1 + h w)^D = target."""
    model = linear(depth, w)
    h = eulernet.calibrate(model, X, target=target, quantity=quantity, tolerance=1e-6)
    assert h == pytest.approx((target ** (1 / depth) - 1) / w, rel=1e-5)


def test_noise_and_gradients_that_overflow_count_as_too_large() -> None:
    model, x = linear(50, 1e3, dtype=torch.float32), X.float()
    for quantity in ("gradient", "noise"):
        h = eulernet.calibrate(model, x, quantity=quantity, bounds=(1e-6, 1))
        assert (1 + 1e3 * h) ** 50 == pytest.approx(2, rel=0.011)


def test_a_rule_is_scaled_to_the_target() -> None:
    """c of h = c / (1 + step): the growth is the product of 1 + c w / (1 + n)."""
    model = linear(5, 0.8)
    c = eulernet.calibrate(model, X, target=2, rule=lambda step: 1 / (1 + step.index), tolerance=1e-6)
    growth = 1.0
    for n in range(5):
        growth *= 1 + c * 0.8 / (1 + n)
    assert growth == pytest.approx(2, rel=2e-6)


# ---- networks of the kinds that the paper trains
@pytest.mark.parametrize("quantity", ["gradient", "noise"])
@pytest.mark.parametrize("name", NETWORKS)
def test_measured_again_the_target_is_met(name: str, quantity: Any) -> None:
    build, inputs, target = NETWORKS[name]
    model, x = build(), inputs()
    at_one = eulernet.diagnose(model, x)
    grown = at_one.gradient_growth if quantity == "gradient" else at_one.noise_amplification
    if quantity == "noise":
        target = grown**0.5
    assert grown > target
    h = eulernet.calibrate(model, x, target=target, quantity=quantity)
    assert 0.001 < h < 1
    found = eulernet.diagnose(eulernet.patch(model, h=h, example_inputs=x), x)
    again = found.gradient_growth if quantity == "gradient" else found.noise_amplification
    assert again == pytest.approx(target, rel=0.01)


def test_the_growth_is_that_of_gradients_measured_by_hand() -> None:
    """With a loss, in train mode: gradients with respect to the first block's input and the last addition's result."""
    model, x, y = ResNet(20), images(8, 8), torch.arange(8)
    h = eulernet.calibrate(model, (x, y), nn.functional.cross_entropy, target=4)
    eulernet.patch(model, h=h, example_inputs=x)
    start = model.stem(x).detach().requires_grad_()
    before = model.blocks[:-1](start)
    last = model.blocks[-1]
    branch = last.bn2(last.conv2(torch.relu(last.bn1(last.conv1(before)))))
    end = before + h * branch
    end.retain_grad()
    nn.functional.cross_entropy(model.head(torch.relu(end).mean((2, 3))), y).backward()
    assert (start.grad.norm() / end.grad.norm()).item() == pytest.approx(4, rel=0.01)


def test_the_optimum_of_the_paper_is_found() -> None:
    """Fig. 6: best near 0.1 for depth 110. Gradients grow 2-fold there, 100-fold and more at h = 1."""
    model, x, y = ResNet(110), images(8, 8), torch.arange(8)
    assert 0.08 < eulernet.calibrate(model, (x, y), nn.functional.cross_entropy) < 0.15


def test_h_rises_with_the_target_and_falls_with_the_depth() -> None:
    model, x = mlp(50), torch.randn(16, 8)
    by_target = [eulernet.calibrate(model, x, target=target) for target in (1.1, 1.5, 2)]
    assert by_target == sorted(set(by_target))
    by_depth = [eulernet.calibrate(linear(depth, 1.0), X) for depth in (5, 20, 80)]
    assert by_depth == sorted(set(by_depth), reverse=True)


# ---- nothing is changed, and nothing depends on what was before
def test_the_same_in_each_run_and_for_a_patched_model() -> None:
    model, tokens = Tokens(4, dropout=0.2), torch.randint(11, (4, 6))
    first = eulernet.calibrate(model, tokens, target=1.2)
    torch.rand(5), random.random()
    assert eulernet.calibrate(model, tokens, target=1.2) == first
    eulernet.patch(model.eval(), h=0.3, example_inputs=tokens)
    assert eulernet.calibrate(model, tokens, target=1.2) == first
    assert eulernet.calibrate(model, tokens, target=1.2, seed=1) != first
    assert {step.h for step in eulernet.steps(model)} == {0.3}


def test_only_patched_steps_get_the_new_h() -> None:
    """(1 + w)^2 (1 + h w)^8 = target where two of ten steps are not patched."""
    model = eulernet.patch(linear(10, 0.1), h=1, exclude=["0", "1"], example_inputs=X)
    h = eulernet.calibrate(model, X, target=1.5, tolerance=1e-6)
    # unseen steps do not count: the growth is measured from the first patched step on
    assert h == pytest.approx((1.5 ** (1 / 8) - 1) / 0.1, rel=1e-5)


@pytest.mark.parametrize("patched", [False, True])
def test_the_model_stays_as_it_is(patched: bool) -> None:
    model, x = ResNet(14, (4, 6, 8)), images(8, 8)
    if patched:
        eulernet.patch(model, h=0.5, example_inputs=x)
    before = copy.deepcopy(model.state_dict())
    identities = [id(t) for t in (*model.parameters(), *model.buffers())]
    classes = [type(module) for module in model.modules()]
    state = torch.get_rng_state()
    eulernet.calibrate(model, x, target=4)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == identities
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters()) and model.training


# ---- where the target cannot be met
def test_a_growth_below_the_target_leaves_h_at_its_bound() -> None:
    words = r"is 1 at h = 0.001 and 1.22 at h = 1, below the target 2: a smaller h has nothing to give"
    with pytest.warns(EulernetWarning, match=words):
        assert eulernet.calibrate(linear(2, 0.105), X) == 1


def test_a_growth_above_the_target_is_refused_with_a_target_that_can_be_met() -> None:
    with pytest.raises(EulernetError, match=r"is 1.01 at h = 0.001 and 1.1e\+03 at h = 1, above the target 0.5") as e:
        eulernet.calibrate(linear(10, 1.015), X, target=0.5)
    offered = re.search(r"eulernet\.calibrate\(model, batch, target=(.+)\)", str(e.value))
    assert offered is not None
    assert 0 < eulernet.calibrate(linear(10, 1.015), X, target=float(offered[1])) < 1
    with pytest.raises(EulernetError, match="smaller bounds="):
        eulernet.calibrate(linear(50, 1.0), X, bounds=(0.1, 1))


def test_a_growth_beyond_all_numbers_offers_bounds_that_are_taken() -> None:
    model = linear(50, 1e9)
    with pytest.raises(EulernetError, match=r"is inf at h = 0.1 and inf at h = 1, above the target 2") as e:
        eulernet.calibrate(model, X, bounds=(0.1, 1))
    assert "target=" not in str(e.value)
    assert str(e.value).endswith("such as eulernet.calibrate(model, batch, bounds=(0.0001, 0.1))")


def test_a_growth_that_does_not_depend_on_h() -> None:
    model = timm.create_model("resnet18", zero_init_last=True)
    with pytest.raises(EulernetError, match=r"does not depend on h\. Branches that are zero at initialisation"):
        eulernet.calibrate(model, images(2, 32))


def test_a_growth_that_falls_and_rises_has_its_target_found() -> None:
    """|1 - 3 h|^4 is 1 at h = 0, 0 at 1/3, and 16 at 1."""
    with pytest.warns(EulernetWarning, match="does not rise or fall steadily with h.*may meet the target as well"):
        h = eulernet.calibrate(linear(4, -3.0), X, target=4, tolerance=1e-4)
    assert h == pytest.approx((1 + 4**0.25) / 3, rel=1e-4)


def test_a_growth_that_falls_has_its_target_found() -> None:
    """(1 - h w)^D, for bounds where it falls only."""
    h = eulernet.calibrate(linear(4, -1.0), X, target=0.5, bounds=(0.01, 0.9), tolerance=1e-6)
    assert h == pytest.approx(1 - 0.5**0.25, rel=1e-5)


class Jump(LinearStep):
    """A branch that is ten times as large where the state has grown 1.3-fold."""

    def forward(self, x: Tensor) -> Tensor:
        scale = 10.0 if (x.norm() > 1.3 * X.norm()).item() else 1.0
        return x + scale * self.map(x)


def test_a_growth_that_jumps_over_the_target_is_named() -> None:
    """The last of four steps jumps where (1 + h)^3 = 1.3: the growth from (1 + h)^4 to (1 + h)^3 (1 + 10 h)."""
    model = nn.Sequential(*(Jump(torch.eye(4, dtype=torch.float64)) for _ in range(4)))
    with pytest.warns(EulernetWarning, match="it jumps there, from 1.42 to 2.49"):
        h = eulernet.calibrate(model, X, target=2)
    assert h == pytest.approx(1.3 ** (1 / 3) - 1, rel=1e-4)


# ---- errors
@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"target": value}, "target must be a positive, finite number") for value in (0, -1, float("inf"), "2", True)]
    + [
        ({"tolerance": 0}, "tolerance must be"),
        ({"noise": -0.1}, "noise must be"),
        ({"quantity": "loss"}, 'quantity=\'loss\' is neither "gradient" nor "noise"'),
        *[
            ({"bounds": b}, "are no two positive numbers in order")
            for b in ((1, 0.1), (0, 1), (0.1,), 1, (1, 1), ("a", "b"))
        ],
        *[({"seed": seed}, "seed must be a whole number") for seed in ("a", -1, 2**63, 1.0, True)],
        ({"rule": "auto"}, "rule='auto' is no function of a step"),
        ({"rule": lambda step: -1.0}, "h of 0 must be a positive"),
        ({"loss_fn": nn.functional.mse_loss}, r"eulernet.calibrate\(model, \(inputs, targets\), loss_fn\)"),
    ],
)
def test_what_calibrate_cannot_do_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(EulernetError, match=words):
        eulernet.calibrate(linear(2, 0.3), X, **arguments)


def test_what_cannot_be_measured() -> None:
    class NoGradients(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = linear(2, 0.3), nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.inner(x)
            return self.head(x)

    with pytest.raises(EulernetError, match=r"could not be measured in NoGradients: eulernet.diagnose\(model, batch\)"):
        eulernet.calibrate(NoGradients(), X)


def test_the_search_is_short() -> None:
    """Two probes at the bounds, then bisection of log h: a factor 1000 down to about 1 % of h."""
    model, runs = linear(50, 1.0), itertools.count()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        next(runs)
        return (output * target).sum()

    eulernet.calibrate(model, (X, X), loss)
    assert next(runs) <= 12
