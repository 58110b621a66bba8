"""What `diagnose` leaves as it was."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import eulernet
from tests.helpers.networks import ResNet, Tokens, linear, mlp

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)

# ---- nothing is changed


def everything(model: nn.Module) -> list[Any]:
    """Of each module its class, flags, hooks and entries; the parameters with values, gradients and flags."""
    return [
        *[(type(m), m.training, sorted(vars(m)), len(m._forward_hooks)) for m in model.modules()],
        *[(id(p), p._version, p.requires_grad, id(p.grad)) for p in model.parameters()],
        *[(id(b), b._version) for b in model.buffers()],
        [t.tolist() for t in model.state_dict().values()],
        *([eulernet.steps(model)] if eulernet.is_patched(model) else []),
    ]


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_process_stay_as_they_are(patched: bool, training: bool) -> None:
    model = nn.Sequential(nn.Dropout(), ResNet(8, (4, 4, 4))).train(training)
    x = torch.randn(2, 3, 8, 8)
    if patched:
        eulernet.patch(model, h=0.1, example_inputs=x)
    model(x).sum().backward()
    model[1].head.weight.requires_grad_(False)
    ran: list[nn.Module] = []
    model.register_forward_hook(lambda module, args, output: ran.append(module))
    model[1].register_full_backward_hook(lambda module, *gradients: ran.append(module))
    before, batch = everything(model), x.clone()
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with torch.no_grad():
        eulernet.diagnose(model, x, gains=True)
    assert everything(model) == before
    assert torch.equal(x, batch) and x.grad is None and not x.requires_grad
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == generators[1:]
    assert not ran


def test_two_runs_give_the_same_numbers() -> None:
    """Dropout draws the same numbers, in each of the runs that one diagnosis makes too."""
    model, tokens = Tokens(2, dropout=0.3), torch.randint(11, (3, 5))
    first = eulernet.diagnose(model, tokens)
    torch.rand(3)
    assert eulernet.diagnose(model, tokens) == first
    assert eulernet.diagnose(model, tokens, seed=1) != first


def test_each_run_starts_from_the_same_buffers() -> None:
    """Spectral normalisation goes on with its power iteration at each run in train mode."""
    model = mlp(6)
    for step in model[:-1]:
        nn.utils.parametrizations.spectral_norm(step.first)
        nn.init.normal_(step.second.weight)
    x = torch.randn(4, 8)
    found = eulernet.diagnose(model, x)
    assert eulernet.diagnose(model, x) == found
    h = eulernet.calibrate(model, x, target=found.gradient_growth**0.5)
    again = eulernet.diagnose(eulernet.patch(model, h=h, example_inputs=x), x)
    assert again.gradient_growth == pytest.approx(found.gradient_growth**0.5, rel=0.01)


def test_a_patched_model_at_one_gives_what_the_original_gives() -> None:
    model, x = ResNet(14, (4, 6, 8)), torch.randn(2, 3, 8, 8)
    original = eulernet.diagnose(model, x)
    assert eulernet.diagnose(eulernet.patch(model, h=1, example_inputs=x), x) == original


def test_wrapped_frozen_and_half_precision_models_are_measured() -> None:
    model, x = ResNet(14, (4, 6, 8)), torch.randn(2, 3, 8, 8)
    expected = eulernet.diagnose(model, x)
    assert eulernet.diagnose(nn.DataParallel(model), x) == expected
    assert eulernet.diagnose(torch.compile(model), x) == expected
    assert eulernet.diagnose(copy.deepcopy(model).requires_grad_(False).eval(), x) == expected
    half = eulernet.diagnose(copy.deepcopy(model).bfloat16(), x.bfloat16())
    for row, exact in zip(half.rows, expected.rows, strict=True):
        assert row.skip == pytest.approx(exact.skip, rel=0.05)  # bfloat16 has 8 bits


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


def test_activation_checkpointing_changes_no_number() -> None:
    """Where the graph is made only in the backward pass nothing is known of gradients, and that is said."""
    model = linear(3, 0.3)
    plain = eulernet.diagnose(model, X)
    found = eulernet.diagnose(Checkpointed(model, use_reentrant=False), X)
    assert [row.gradient for row in found.rows] == [row.gradient for row in plain.rows]
    assert [row.step for row in found.rows] == ["inner.0", "inner.1", "inner.2"]
    found = eulernet.diagnose(Checkpointed(model, use_reentrant=True), X, gains=True)
    assert [row.step_size for row in found.rows] == [row.step_size for row in plain.rows]
    assert [row.gradient for row in found.rows] == [row.gain for row in found.rows] == [None] * 3
    assert found.gradient_growth is None and found.equation_6 is None
    assert found.noise_amplification == plain.noise_amplification
    assert any("inner.0" in note for note in found.notes)
    assert "no advice" in found.advice and "not measured" in str(found)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 0.5 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 0.5 * g


class OnceStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x + Once.apply(self.map(x))


def test_a_gain_that_cannot_be_measured_is_not_invented() -> None:
    found = eulernet.diagnose(nn.Sequential(*linear(1, 0.3), OnceStep()), X, gains=True)
    assert found.rows[0].gain == pytest.approx(0.3) and found.rows[1].gain is None
    assert found.rows[1].gradient is not None and found.equation_6 is None
    assert any("the gain of 1 was not measured" in note for note in found.notes)
