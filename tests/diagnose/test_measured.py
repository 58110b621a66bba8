"""What `diagnose` measures, against what is known by other ways."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev

import eulernet
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
def test_parallel_branches_and_repeated_calls_are_measured_as_by_hand(h: float) -> None:
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


def test_a_residual_network_with_projections_is_measured_as_by_hand() -> None:
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


def test_two_steps_of_one_module_are_measured_as_by_hand() -> None:
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
