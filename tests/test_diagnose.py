"""What `diagnose` measures, against what is known by other ways; and that it changes nothing."""

import copy
import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import jacrev
from torch.utils.checkpoint import checkpoint

import eulernet
from eulernet import EulernetError
from tests.helpers.networks import LinearStep, ResNet, Tokens, linear, mlp

GAIN = 5e-3  # a power iteration is a bit below the singular value where the next one is close to it
X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


# ---- networks of which all is known
@pytest.mark.parametrize("h", [1.0, 0.25])
def test_a_linear_network_is_measured_exactly(h: float) -> None:
    depth, w = 7, 0.3
    model = linear(depth, w)
    if h != 1:
        eulernet.patch(model, h=h, example_inputs=X)
    found = eulernet.diagnose(model, X, gains=True)
    growth = (1 + h * w) ** depth
    close = {"rel": 1e-12}
    assert found.depth == len(found.rows) == depth
    assert found.gradient_growth == pytest.approx(growth, **close)
    assert found.equation_6 == pytest.approx(growth, **close)
    assert found.log10_proposition_1 == pytest.approx(depth * math.log10(math.sqrt(4) + h * w), **close)
    assert found.noise_amplification == pytest.approx(growth, rel=1e-9)
    # the largest ||F(x(e)) - F(x)|| is the last step's, w (1 + h w)^(D - 1) ||e||
    assert found.proposition_2 == pytest.approx(1 + h * depth * w * (1 + h * w) ** (depth - 1), rel=1e-9)
    for n, row in enumerate(found.rows):
        assert (row.step, row.call, row.stream, row.h) == (str(n), 0, 0, h)
        assert row.skip == pytest.approx(X.norm().item() * (1 + h * w) ** n, **close)
        assert row.step_size == pytest.approx(h * w, **close)
        assert row.gradient == pytest.approx((1 + h * w) ** (depth - n), **close)  # the projection has length 1
        assert row.gain == pytest.approx(w, **close)


def test_each_step_has_its_own_h() -> None:
    model = eulernet.patch(linear(3, 0.5), h=[0.1, 0.2, 0.4], example_inputs=X)
    found = eulernet.diagnose(model, X, gains=True)
    assert found.gradient_growth == pytest.approx(1.05 * 1.1 * 1.2, rel=1e-12)
    assert found.equation_6 == pytest.approx(1.05 * 1.1 * 1.2, rel=1e-12)
    assert found.proposition_2 == pytest.approx(1 + (0.1 + 0.2 + 0.4) * 0.5 * 1.05 * 1.1, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_propositions_bound_what_is_measured(seed: int) -> None:
    """Identity skips, nothing after the additions, float64: then they are theorems."""
    torch.manual_seed(seed)
    model = mlp(10)[:-1].double()
    found = eulernet.diagnose(model, torch.randn(1, 8, dtype=torch.float64), gains=True, noise=1e-4)
    assert 1 <= found.gradient_growth <= found.equation_6 <= 10**found.log10_proposition_1
    assert found.noise_amplification <= found.proposition_2


# ---- against measurements by hand
class Parallel(nn.Module):
    """One step with two branches, the second one subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + torch.tanh(self.a(y)) - self.b(y)


@pytest.mark.parametrize("h", [1.0, 0.3])
def test_parallel_branches_and_repeated_calls(h: float) -> None:
    """One row a call; the branch of a parallel step is the difference of its two."""
    block = Parallel()
    model = nn.Sequential(block, block, nn.Linear(4, 2)).double()
    eulernet.patch(model, h=h, example_inputs=X)
    found = eulernet.diagnose(model, X, gains=True)
    assert [(row.step, row.call) for row in found.rows] == [("0", 0), ("0", 1)]

    x = X.clone().requires_grad_()
    states, branches = [x], []
    for _ in range(2):
        states[-1].retain_grad()
        y = block.norm(states[-1])
        branches.append(torch.tanh(block.a(y)) - block.b(y))
        states.append(states[-1] + h * branches[-1])
    states[-1].retain_grad()
    (model[2](states[-1]) * direction(model[2](states[-1]))).sum().backward()
    for row, state, branch in zip(found.rows, states, branches, strict=False):
        assert row.skip == pytest.approx(state.norm().item(), rel=1e-12)
        assert row.step_size == pytest.approx(h * branch.norm().item() / state.norm().item(), rel=1e-12)
        assert row.gradient == pytest.approx(state.grad.norm().item(), rel=1e-12)

        def f(x: Tensor) -> Tensor:
            y = block.norm(x)
            return torch.tanh(block.a(y)) - block.b(y)

        assert row.gain == pytest.approx(largest_singular_value(f, state.detach()), rel=GAIN)
    assert found.gradient_growth == pytest.approx((states[0].grad.norm() / states[-1].grad.norm()).item(), rel=1e-12)


def test_a_residual_network_with_projections_in_place() -> None:
    """Gradients with respect to the blocks' inputs, also where the skip is a projection of them."""
    model = ResNet(14, (4, 6, 8)).double()
    x, y = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 2, 3])
    found = eulernet.diagnose(model, (x, y), nn.functional.cross_entropy, gains=True)

    reference = copy.deepcopy(model).train()
    inputs: list[Tensor] = []
    skips: list[Tensor] = []
    branches: list[Tensor] = []

    def keep_input(block: nn.Module, args: tuple[Tensor]) -> None:
        args[0].retain_grad()
        inputs.append(args[0])

    for block in reference.blocks:
        block.register_forward_pre_hook(keep_input)
        block.shortcut.register_forward_hook(lambda module, args, out: skips.append(out.detach().clone()))
        block.bn2.register_forward_hook(lambda module, args, out: branches.append(out.detach().clone()))
    nn.functional.cross_entropy(reference(x), y).backward()
    assert len(found.rows) == 6
    for row, block, state, skip, branch in zip(found.rows, model.blocks, inputs, skips, branches, strict=True):
        assert row.skip == pytest.approx(skip.norm().item(), rel=1e-12)
        assert row.step_size == pytest.approx((branch.norm() / skip.norm()).item(), rel=1e-12)
        assert row.gradient == pytest.approx(state.grad.norm().item(), rel=1e-12)
        twin = copy.deepcopy(block).train()
        for norm in (twin.bn1, twin.bn2):  # their counters are written to, which jacrev does not allow
            norm.track_running_stats, norm.running_mean, norm.running_var, norm.num_batches_tracked = False, *[None] * 3

        def f(x: Tensor, twin: Any = twin) -> Tensor:
            return twin.bn2(twin.conv2(torch.relu(twin.bn1(twin.conv1(x)))))

        assert row.gain == pytest.approx(largest_singular_value(f, state.detach()), rel=GAIN)


def test_two_steps_of_one_module_with_attention() -> None:
    model = Tokens(2).double()
    tokens = torch.randint(11, (3, 5))
    found = eulernet.diagnose(model, {"tokens": tokens}, gains=True)
    assert [row.step for row in found.rows] == ["layers.0:0", "layers.0:1", "layers.1:0", "layers.1:1"]
    x = model.embedding(tokens).detach()
    for layer, (attention, feed_forward) in zip(model.layers, [found.rows[:2], found.rows[2:]], strict=True):
        for row, f in ((attention, attend(layer)), (feed_forward, feed(layer))):
            assert row.skip == pytest.approx(x.norm().item(), rel=1e-9)
            assert row.step_size == pytest.approx((f(x).norm() / x.norm()).item(), rel=1e-9)
            assert row.gain == pytest.approx(largest_singular_value(f, x), rel=GAIN)
            x = (x + f(x)).detach()


def attend(layer: nn.TransformerEncoderLayer) -> Any:
    def f(x: Tensor) -> Tensor:
        y, m = layer.norm1(x), layer.self_attn
        q, k, v = nn.functional.linear(y, m.in_proj_weight, m.in_proj_bias).unflatten(-1, (3, 2, 8)).unbind(-3)
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8)).softmax(-1)
        return m.out_proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2))

    return f


def feed(layer: nn.TransformerEncoderLayer) -> Any:
    return lambda x: layer.linear2(torch.relu(layer.linear1(layer.norm2(x))))


def largest_singular_value(f: Any, x: Tensor) -> float:
    return torch.linalg.svdvals(jacrev(f)(x).detach().reshape(f(x).numel(), x.numel())).max().item()


def direction(output: Tensor) -> Tensor:
    """That of the projection which stands for the loss."""
    d = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(output)
    return d / d.norm()


def test_noise_is_measured_between_the_first_skip_and_the_last_result() -> None:
    """By two runs of the original, with the same noise of 1 % in the input."""
    model = nn.Sequential(nn.Linear(4, 8), *mlp(5)[:-1], nn.Linear(8, 3)).double()
    found = eulernet.diagnose(model, X, noise=0.01)
    noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(0)).to(X)
    noisy = X + 0.01 * X.norm() * noise / noise.norm()
    start, end = model[0](noisy) - model[0](X), model[:-1](noisy) - model[:-1](X)
    assert found.noise_amplification == pytest.approx((end.norm() / start.norm()).item(), rel=1e-9)


def test_noise_in_a_model_of_tokens_is_in_its_embedding() -> None:
    model = Tokens(1).double()
    tokens = torch.randint(11, (3, 5))
    found = eulernet.diagnose(model, tokens, noise=0.01)
    x = model.embedding(tokens)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    noise *= 0.01 * x.norm() / noise.norm()
    amplified = (model.layers(x + noise) - model.layers(x)).norm() / noise.norm()
    assert found.noise_amplification == pytest.approx(amplified.item(), rel=1e-9)


class TwoTowers(nn.Module):
    """An encoder and a deeper decoder, each with an embedding of its own over one table, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Tokens(1), Tokens(2)
        self.decoder.embedding.weight = self.encoder.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(tokens) + self.encoder(tokens).mean()


def test_noise_reaches_a_second_tower_with_the_same_table() -> None:
    tokens = torch.randint(11, (3, 5))
    found = eulernet.diagnose(TwoTowers(), tokens)
    assert found.depth == 4 and found.noise_amplification is not None
    assert sorted({row.stream for row in found.rows}) == [0, 1]
    assert "the deepest of 2 streams, decoder.layers.0:0 to decoder.layers.1:1:\ngrowth of gradients" in str(found)


def test_noise_that_cannot_reach_the_first_step_is_not_measured() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = LinearStep(torch.eye(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.step(torch.ones(2, 4) + 0 * x.long())

    found = eulernet.diagnose(Constant(), torch.rand(2, 4))
    assert found.noise_amplification is None and found.proposition_2 is None
    assert any("noise" in note for note in found.notes)


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


def test_wrapped_frozen_and_half_precision_models() -> None:
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


def test_activation_checkpointing() -> None:
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


# ---- advice
def test_advice_where_branches_are_zero() -> None:
    x = torch.randn(2, 3, 32, 32)
    zero = eulernet.diagnose(timm.create_model("resnet18", zero_init_last=True), x)
    assert zero.advice == "branches are zero at initialisation: h only lowers their learning rate"
    assert {row.step_size for row in zero.rows} == {0.0}
    small = timm.create_model("cait_xxs24_224", img_size=32, depth=2, depth_token_only=1)
    advice = eulernet.diagnose(small, x).advice
    assert advice.startswith("branches are nearly zero (at most ") and advice.endswith("lowers their learning rate")


def test_advice_where_gradients_do_not_grow() -> None:
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


def test_advice_where_branches_are_huge() -> None:
    advice = eulernet.diagnose(linear(50, 100.0), X).advice
    assert "from the last block to the first: h = 0.00014 makes it " in advice


def test_advice_where_gradients_overflow() -> None:
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


def test_advice_where_no_h_helps() -> None:
    """The projection alone lets gradients grow."""
    advice = eulernet.diagnose(nn.Sequential(Projection(10, 1), Projection(10, 1)), X.float()).advice
    assert re.search(r"; at h = 1e-06 that is 100-fold: it does not come from the branches$", advice)


def test_advice_where_h_helps_in_part() -> None:
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
def test_table_and_json() -> None:
    found = eulernet.diagnose(linear(3, 0.3), X, gains=True)
    lines = str(found).splitlines()
    assert lines[0].split() == ["#", "step", "h", "‖x‖", "‖hF‖/‖x‖", "‖∂L/∂x‖", "W"]
    assert lines[1].split() == ["0", "0", "1", "2.17", "0.3", "2.2", "0.3"]
    assert "Eq. (6): at most 2.2; Proposition 1: at most 10^1.1" in str(found)
    assert "Proposition 2: at most 2.52" in str(found)
    assert lines[-1] == found.advice and repr(found) == f"<Diagnosis: {found.advice}>"
    data = json.loads(found.to_json())
    assert data["rows"][2]["step"] == "2" and data["gradient_growth"] == found.gradient_growth


def test_plot(tmp_path: Path) -> None:
    found = eulernet.diagnose(linear(3, 0.3), X)
    figure = found.plot(tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    assert [axes.get_ylabel() for axes in figure.axes] == ["‖∂L/∂x‖", "‖hF‖ / ‖x‖", "‖x‖"]
    drawn = [axes.lines[0].get_ydata().tolist() for axes in figure.axes]
    assert drawn == [[getattr(row, name) for row in found.rows] for name in ("gradient", "step_size", "skip")]
    assert found.advice in figure.get_suptitle()
    assert [axes.get_yscale() for axes in figure.axes] == ["linear"] * 3  # a logarithmic axis would have no second tick
    assert eulernet.diagnose(linear(12, 0.3), X).plot().axes[0].get_yscale() == "log"


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_errors(arguments: tuple[Any, ...], words: str) -> None:
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


def test_an_output_without_tensors() -> None:
    with pytest.raises(EulernetError, match=r"returned no tensor with a gradient.*loss_fn\)"):
        eulernet.diagnose(Nothing(), X)
