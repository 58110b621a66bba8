"""h and the last affine map of a branch: folded, preserved, and learned at its own rate."""

import contextlib
import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import eulernet
from eulernet import EulernetError, EulernetWarning, Step
from eulernet._find.absorb import _HOMOGENEOUS
from tests.helpers.refusals import refused
from tests.helpers.trapped import build
from tests.traps import TRAPS, Trap
from tests.traps.forms import NarrowingInPlaceAddition, WideningAddition

SHAPE = (3, 4, 8, 8)
X = torch.linspace(-2, 2, 3 * 4 * 8 * 8, dtype=torch.float64).sin().view(SHAPE) * 1.7


def factor(step: Step) -> float:
    """Not the same for neighbours, so that a step that is given another one's h is seen."""
    return 0.3 + 0.1 * (step.index % 3)


class Fn(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Branch(nn.Module):
    """Layers, parameters and buffers by name, and a function of them and x."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], /, **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Residual(nn.Module):
    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def conv(**kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, **kwargs)


def linear(**kwargs: Any) -> nn.Linear:
    return nn.Linear(8, 8, **kwargs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def drop_path(x: Tensor, training: bool) -> Tensor:
    if not training:
        return x
    return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.5).div_(0.5)


def windows(x: Tensor) -> Tensor:
    """Cut into windows, and shifted, and put together again."""
    x = x.view(3, 4, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 4, 4, 4)
    return torch.roll(x.reshape(3, 2, 2, 4, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(3, 4, 8, 8), (1, 1), (2, 3))


def assigned(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :2] = x[:, :2]
    return out


def standardised(weight: Tensor, gain: Tensor | None = None) -> Tensor:
    flat = F.batch_norm(weight.reshape(1, len(weight), -1), None, None, weight=gain, training=True)
    return flat.reshape_as(weight)


# The parameters that take over h, by their names in the branch.
ABSORBED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    # maps
    "linear": (linear, "weight bias"),
    "linear without bias": (lambda: linear(bias=False), "weight"),
    "convolution": (conv, "weight bias"),
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 4, 3, padding=1), "weight bias"),
    "batch norm": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(4)), "1.weight 1.bias"),
    "group norm": (lambda: nn.Sequential(conv(), nn.GroupNorm(2, 4)), "1.weight 1.bias"),
    "layer norm": (lambda: nn.Sequential(conv(), nn.LayerNorm(8)), "1.weight 1.bias"),
    "rms norm": (lambda: nn.Sequential(conv(), nn.RMSNorm(8)), "1.weight"),
    "instance norm": (lambda: nn.Sequential(conv(), nn.InstanceNorm2d(4, affine=True)), "1.weight 1.bias"),
    "addmm": (
        lambda: Branch(
            lambda s, x: torch.addmm(s.b, x.view(-1, 8), s.w).view(SHAPE), w=parameter(8, 8), b=parameter(8)
        ),
        "w b",
    ),
    "addcmul": (
        lambda: Branch(lambda s, x: torch.addcmul(s.b, s.a, s.c(x)), a=parameter(8), b=parameter(8), c=conv()),
        "a b",
    ),
    "einsum": (lambda: Branch(lambda s, x: torch.einsum("bchw,wv->bchv", x, s.w), w=parameter(8, 8)), "w"),
    "matmul": (lambda: Branch(lambda s, x: x @ s.w, w=parameter(8, 8)), "w"),
    "experts in one parameter": (
        lambda: Branch(lambda s, x: F.linear(x, s.w[0]) + F.linear(x, s.w[1]), w=parameter(2, 8, 8)),
        "w",
    ),
    "attention": (
        lambda: Branch(
            lambda s, x: s.a(x.flatten(1, 2), x.flatten(1, 2), x.flatten(1, 2))[0].view(SHAPE),
            a=nn.MultiheadAttention(8, 2, batch_first=True),
        ),
        "a.out_proj.weight a.out_proj.bias",
    ),
    "attention without a projection": (
        lambda: Branch(
            lambda s, x: F.scaled_dot_product_attention(s.q(x), s.k(x), s.v(x)), q=linear(), k=linear(), v=linear()
        ),
        "v.weight v.bias",
    ),
    # scales
    "LayerScale": (lambda: Branch(lambda s, x: s.gamma * s.c(x), c=conv(), gamma=parameter(8)), "gamma"),
    "LayerScale in place": (lambda: Branch(lambda s, x: s.c(x).mul_(s.gamma), c=conv(), gamma=parameter(8)), "gamma"),
    "SkipInit": (lambda: Branch(lambda s, x: s.c(x) * s.alpha, c=conv(), alpha=parameter()), "alpha"),
    "number": (lambda: nn.Sequential(conv(), Fn(lambda x: -(0.5 * x) / 3)), "0.weight 0.bias"),
    "norm by hand": (
        lambda: Branch(
            lambda s, x: s.w * ((y := s.c(x)) * y.square().mean(-1, keepdim=True).rsqrt()), w=parameter(8), c=conv()
        ),
        "w",
    ),
    # what a factor goes through
    "ReLU": (lambda: nn.Sequential(conv(), nn.ReLU()), "0.weight 0.bias"),
    "ReLU in place": (lambda: nn.Sequential(conv(), nn.ReLU(inplace=True)), "0.weight 0.bias"),
    "leaky ReLU": (lambda: nn.Sequential(conv(), nn.LeakyReLU()), "0.weight 0.bias"),
    "PReLU": (lambda: nn.Sequential(conv(), nn.PReLU()), "0.weight 0.bias"),
    "clamp": (lambda: nn.Sequential(conv(), Fn(lambda x: x.clamp(min=0))), "0.weight 0.bias"),
    "average pooling": (lambda: nn.Sequential(conv(), nn.AvgPool2d(3, 1, 1)), "0.weight 0.bias"),
    "max pooling": (lambda: nn.Sequential(conv(), nn.MaxPool2d(3, 1, 1)), "0.weight 0.bias"),
    "interpolation": (
        lambda: nn.Sequential(conv(stride=2), nn.Upsample(scale_factor=2, mode="bilinear")),
        "0.weight 0.bias",
    ),
    "dropout": (lambda: nn.Sequential(conv(), nn.Dropout(0.5), nn.Dropout2d(0.2)), "0.weight 0.bias"),
    "drop path": (lambda: Branch(lambda s, x: drop_path(s.c(x), s.training), c=conv()), "c.weight c.bias"),
    "windows": (lambda: nn.Sequential(conv(), Fn(windows)), "0.weight 0.bias"),
    "zero padding": (lambda: nn.Sequential(conv(stride=2), Fn(lambda x: F.pad(x, (2, 2, 2, 2)))), "0.weight 0.bias"),
    "assignment": (lambda: nn.Sequential(conv(), Fn(assigned)), "0.weight 0.bias"),
    "mask": (
        lambda: nn.Sequential(
            conv(), Fn(lambda x: torch.where(X[0] > 0, x.masked_fill(X[0] > 1, 0.0), torch.zeros(())))
        ),
        "0.weight 0.bias",
    ),
    "fixed filter": (
        lambda: Branch(
            lambda s, x: F.conv2d(s.c(x), s.blur, padding=1, groups=4), c=conv(), blur=nn.Buffer(torch.ones(4, 1, 3, 3))
        ),
        "c.weight c.bias",
    ),
    # several maps
    "sum": (lambda: Branch(lambda s, x: s.a(x) + s.b(x), a=conv(), b=conv(bias=False)), "a.weight a.bias b.weight"),
    "concatenation": (
        lambda: Branch(lambda s, x: torch.cat([s.a(x)[:, :2], s.b(x)[:, 2:]], 1), a=conv(), b=conv(bias=False)),
        "a.weight a.bias b.weight",
    ),
    "pooling less itself": (
        lambda: Branch(lambda s, x: s.p(y := s.n(x)) - y, p=nn.AvgPool2d(3, 1, 1), n=nn.GroupNorm(1, 4)),
        "n.weight n.bias",
    ),
    "gate with a projection of its own": (
        lambda: Branch(lambda s, x: s.gate(x).sigmoid() * s.up(x), gate=linear(), up=linear()),
        "up.weight up.bias",
    ),
    # weights that are computed
    "standardised weight behind a norm": (
        lambda: Branch(
            lambda s, x: F.conv2d(s.n(x).relu(), standardised(s.w), padding=1),
            n=nn.GroupNorm(2, 4),
            w=parameter(4, 4, 3, 3),
        ),
        "n.weight n.bias",
    ),
    "standardised weight with a gain": (
        lambda: Branch(
            lambda s, x: F.conv2d(x, standardised(s.w, (s.gain * 0.5).view(-1)), s.b, padding=1),
            w=parameter(4, 4, 3, 3),
            gain=parameter(4, 1, 1, 1),
            b=parameter(4),
        ),
        "gain b",
    ),
    "weight norm": (lambda: parametrizations.weight_norm(linear()), "bias parametrizations.weight.original0"),
}


def residual(branch: nn.Module, seed: int = 0) -> Residual:
    """A block with random parameters in float64."""
    torch.manual_seed(seed)
    model = Residual(branch).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def in_both_modes(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """The outputs of a copy in eval and in train mode, under one seed, and the buffers afterwards."""
    model = copy.deepcopy(model)
    outputs = []
    for training in (False, True):
        torch.manual_seed(1)
        with torch.no_grad():
            outputs += tree_leaves(model.train(training)(*(x.clone() for x in inputs)))
    return outputs + list(model.buffers())


def assert_equal_to_rounding(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ABSORBED)
def test_what_absorbs_h(name: str) -> None:
    branch, maps = ABSORBED[name]
    original = residual(branch())
    model = eulernet.patch(copy.deepcopy(original), 0.3, example_inputs=X)
    expected = in_both_modes(model, X)

    assert eulernet.fold(model, example_inputs=X) is model
    assert_equal_to_rounding(in_both_modes(model, X), expected)
    scaled = [n for n, p in model.f.named_parameters() if not torch.equal(p, original.f.get_parameter(n))]
    assert sorted(scaled) == sorted(maps.split())
    for n, p in model.f.named_parameters():
        torch.testing.assert_close(p, original.f.get_parameter(n) * (0.3 if n in scaled else 1), rtol=1e-15, atol=0)

    kept = eulernet.patch(copy.deepcopy(original), 0.3, example_inputs=X, preserve=True)
    assert [step.h for step in eulernet.steps(kept)] == [0.3]
    assert_equal_to_rounding(in_both_modes(kept, X), in_both_modes(original, X))
    eulernet.fold(kept, example_inputs=X)
    for p, q in zip(kept.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-15, atol=0)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "activation": (lambda: nn.Sequential(conv(), nn.GELU()), r"gelu \(in f\.1\) is not homogeneous"),
    "bounded activation": (lambda: nn.Sequential(conv(), nn.ReLU6()), r"hardtanh|relu6"),
    "bounds": (
        lambda: nn.Sequential(conv(), Fn(lambda x: x.clamp(0, 6))),
        r"clamp \(in f\.1\) adds or inserts a number, 6",
    ),
    "norm": (
        lambda: nn.Sequential(conv(), nn.LayerNorm(8, elementwise_affine=False)),
        r"layer_norm \(in f\.1\) has no weight",
    ),
    "shifted weight": (
        lambda: Branch(
            lambda s, x: (1 + s.w) * s.n(s.c(x)), w=parameter(8), c=conv(), n=nn.LayerNorm(8, elementwise_affine=False)
        ),
        r"adds or inserts a number, 1; layer_norm \(in f\.n\) has no weight",
    ),
    "constant": (lambda: Branch(lambda s, x: s.c(x) + s.b, c=conv(), b=nn.Buffer(torch.ones(8))), r"f\.b is a buffer"),
    "new constant": (lambda: nn.Sequential(conv(), Fn(lambda x: x + x.new_full((8,), 2.0))), "new_full"),
    "filled padding": (
        lambda: nn.Sequential(conv(stride=2), Fn(lambda x: F.pad(x, (2, 2, 2, 2), value=1.0))),
        r"number, 1\.0",
    ),
    "no map": (lambda: nn.AvgPool2d(3, 1, 1), r"no map with parameters of its own lies behind it, only the input"),
    "square": (lambda: nn.Sequential(conv(), Fn(lambda x: x * x)), r"conv2d \(in f\.0\) is also read by mul"),
    "gate": (
        lambda: Branch(gated, c=conv(), g=conv()),
        r"conv2d \(in f\.c\) is also read by conv2d \(in f\.g\); sigmoid \(in f\) is not homogeneous",
    ),
    "gate of a part": (
        lambda: Branch(lambda s, x: (y := s.c(x))[:, :4] * y[:, 4:].sigmoid(), c=nn.Conv2d(4, 8, 1)),
        r"conv2d \(in f\.c\) is also read by getitem",
    ),
    "map used twice": (
        lambda: Branch(lambda s, x: s.a(s.a(x).relu()), a=linear()),
        r"f\.a\.(weight|bias) is also read by linear",
    ),
    "normalised weight": (lambda: parametrizations.spectral_norm(linear()), r"also read by|not homogeneous"),
    "sign": (lambda: nn.Sequential(conv(), Fn(lambda x: x * (x.detach() > 0))), r"also read by detach"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not(name: str) -> None:
    branch, words = REFUSED[name]
    model = residual(branch())
    before = copy.deepcopy(model.state_dict())
    for call in (
        lambda: eulernet.patch(model, 0.3, example_inputs=X, preserve=True),
        lambda: eulernet.param_groups(model, 0.1, h=0.3, example_inputs=X),
    ):
        refused(model, call, "one step has no last affine map", r"<root> \(Residual\)", words, "where possible|h = 1")
    eulernet.patch(model, 0.3, example_inputs=X)
    refused(model, lambda: eulernet.fold(model, example_inputs=X), r"<root> \(Residual\)", words, "where_possible=True")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    expected = in_both_modes(model, X)
    eulernet.fold(model, where_possible=True, example_inputs=X)
    assert [step.h for step in eulernet.steps(model)] == [0.3]
    assert all(torch.equal(a, b) for a, b in zip(in_both_modes(model, X), expected, strict=True))
    eulernet.unpatch(model)
    eulernet.patch(model, 0.3, example_inputs=X, preserve="where_possible")
    assert [step.h for step in eulernet.steps(model)] == [1.0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


HOMOGENEOUS: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        name: getattr(F, name)
        for name in "relu leaky_relu rrelu dropout dropout1d dropout2d dropout3d feature_dropout".split()
        if hasattr(F, name)
    },
    "feature_dropout": lambda x: torch.feature_dropout(x, 0.5, True),
    "prelu": lambda x: F.prelu(x, x.new_tensor([0.3])),
    "neg": torch.neg,
    **{
        f"{kind}_pool{n}d": partial(getattr(F, f"{kind}_pool{n}d"), kernel_size=3)
        for kind in ("max", "avg")
        for n in (1, 2, 3)
    },
    **{
        f"adaptive_{kind}_pool{n}d": partial(getattr(F, f"adaptive_{kind}_pool{n}d"), output_size=2)
        for kind in ("max", "avg")
        for n in (1, 2, 3)
    },
    "mean": lambda x: x.mean((-1, -2)),
    "sum": lambda x: x.sum(1),
    "amax": lambda x: x.amax(1),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0, mode="bicubic"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "unfold": lambda x: F.unfold(x, 3),
    "fold": lambda x: F.fold(x.reshape(3, 16, 16), (8, 8), 2, stride=2),
    "roll": lambda x: x.roll(1, 2),
    "flip": lambda x: x.flip(1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "expand": lambda x: x[:, :1].expand(3, 4, 8, 8),
    "expand_as": lambda x: x[:, :1].expand_as(x),
    "index_select": lambda x: x.index_select(1, torch.tensor([0, 2])),
    "gather": lambda x: x.gather(1, torch.zeros(3, 1, 8, 8, dtype=torch.int64)),
    "take_along_dim": lambda x: x.take_along_dim(torch.zeros(3, 1, 8, 8, dtype=torch.int64), 1),
}


@pytest.mark.parametrize("op", _HOMOGENEOUS.split())
def test_what_is_called_homogeneous_is(op: str) -> None:
    """f(4 x) is 4 f(x), to the bit, and by the name that the trace sees."""
    function = HOMOGENEOUS[op]
    shape = {"3": (3, 4, 8, 8, 8), "1": (3, 4, 8)}.get(op[-2], SHAPE)
    x = torch.randn(shape, dtype=torch.float64)
    names = []

    class Names(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.__name__)
            return func(*args, **kwargs or {})

    with Names():
        torch.manual_seed(1)
        once = function(x)
    torch.manual_seed(1)
    assert torch.equal(function(4 * x), 4 * once)
    assert op in names and once.abs().max() > 0


# ------------------------------------------------------------------------------------------------------- several steps


def scaled(s: Any, x: Tensor) -> Tensor:
    return F.dropout(s.gamma * s.c(x), 0.5, s.training)


def gated(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    return y * s.g(y).sigmoid()


class Net(nn.Module):
    """Batch norm, LayerScale and dropout, a gate, and a block with two steps of which one has a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Residual(nn.Sequential(conv(bias=False), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4)))
        self.scale = Residual(Branch(scaled, c=conv(), gamma=parameter(8)))
        self.gate = Residual(Branch(gated, c=conv(), g=conv()))
        self.two = Two()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.gate(self.scale(self.norm(x))))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x).tanh()
        return x + self.b(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net().double().apply(lambda m: [nn.init.normal_(p, std=0.5) for p in m.parameters(recurse=False)] and None)


FOLDABLE = ["norm", "scale", "two:1"]
H = [0.3, 0.4, 0.5, 0.6, 0.7]


def test_folding_a_part_leaves_the_rest_patched() -> None:
    original = net()
    model = eulernet.patch(copy.deepcopy(original), H, example_inputs=X)
    refused(
        model,
        lambda: eulernet.fold(model, example_inputs=X),
        "2 of the 5 steps have no last affine map",
        r"gate \(Residual\): conv2d",
        r"two:0 \(Two\): tanh",
    )
    expected = in_both_modes(model, X)
    eulernet.fold(model, where_possible=True, example_inputs=X)
    assert_equal_to_rounding(in_both_modes(model, X), expected)
    assert [(step.name, step.h) for step in eulernet.steps(model)] == [("gate", 0.5), ("two:0", 0.6)]
    assert type(model.norm) is Residual and type(model.gate) is not Residual and type(model.two) is not Two

    eulernet.set_h(model, {"two:0": 0.2, "gate": 1.0})
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    by_hand = eulernet.patch(copy.deepcopy(original), [0.3, 0.4, 1.0, 0.2, 0.7], example_inputs=X)
    assert_equal_to_rounding(in_both_modes(model, X), in_both_modes(by_hand, X))
    assert type(eulernet.unpatch(model).two) is Two


def test_the_state_dict_loads_both_ways() -> None:
    model = eulernet.patch(net(), H[:3], example_inputs=X, exclude=["gate", "two:0"])
    fresh = net()
    model.load_state_dict(fresh.state_dict(), strict=True)
    identities = [id(p) for p in model.parameters()]
    expected = in_both_modes(model, X)
    eulernet.fold(model, example_inputs=X)
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
    assert not eulernet.is_patched(model) and not any("euler" in name for m in model.modules() for name in vars(m))
    assert [id(p) for p in model.parameters()] == identities
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert_equal_to_rounding(in_both_modes(fresh, X), expected)


def test_a_copy_folds_and_the_original_does_not() -> None:
    model = eulernet.patch(net(), H[:3], example_inputs=X, include=FOLDABLE)
    before = in_both_modes(model, X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal_to_rounding(in_both_modes(eulernet.fold(other, example_inputs=X), X), before)
    assert all(torch.equal(a, b) for a, b in zip(in_both_modes(model, X), before, strict=True))
    assert eulernet.is_patched(model)


@pytest.mark.parametrize("h", [0.1, H[:3], {"norm": 0.1, "*": 2.0}, lambda step: 1 / step.depth])
def test_preserve_with_all_that_h_may_be(h: Any) -> None:
    original = net()
    model = eulernet.patch(copy.deepcopy(original), h, example_inputs=X, include=FOLDABLE, preserve=True)
    assert_equal_to_rounding(in_both_modes(model, X), in_both_modes(original, X))
    again = eulernet.Steps.from_json(eulernet.steps(model).to_json())
    other = eulernet.patch(copy.deepcopy(original), again, example_inputs=X, include=FOLDABLE, preserve=True)
    assert_equal_to_rounding(list(other.state_dict().values()), list(model.state_dict().values()))
    assert eulernet.steps(other) == eulernet.steps(model)


def test_preserve_keeps_what_a_patched_model_computes_now() -> None:
    """Of a model that is patched already, the function to keep is the one with its h; steps left out become 1."""
    model = eulernet.patch(net(), [0.5, 0.25, 3.0], example_inputs=X, include=FOLDABLE)
    expected = in_both_modes(model, X)
    eulernet.patch(model, 0.1, example_inputs=X, include="scale", preserve=True)
    assert_equal_to_rounding(in_both_modes(model, X), expected)
    assert [(step.name, step.h) for step in eulernet.steps(model)] == [("scale", 0.1)]


def test_a_step_at_1_needs_no_map() -> None:
    model = eulernet.patch(net(), {"gate": 1.0, "two:0": 1.0, "*": 0.5}, example_inputs=X)
    assert not eulernet.is_patched(eulernet.fold(model, example_inputs=X))


class Tied(nn.Module):
    """Two blocks with one linear map, and what reads the branch besides."""

    def __init__(self, returns: bool = False) -> None:
        super().__init__()
        self.first = Residual(linear())
        self.second = Residual(self.first.f)
        self.returns = returns

    def forward(self, x: Tensor) -> Any:
        x = self.second(self.first(x))
        return (x, self.first.f(x)) if self.returns else x


def test_a_map_that_steps_share() -> None:
    model = eulernet.patch(Tied().double(), 0.3, example_inputs=X)
    expected = in_both_modes(model, X)
    assert_equal_to_rounding(in_both_modes(eulernet.fold(copy.deepcopy(model), example_inputs=X), X), expected)
    eulernet.set_h(model, [0.3, 0.4])
    refused(
        model, lambda: eulernet.fold(model, example_inputs=X), "2 of the 2", r"first\.f\.(weight|bias) is also read by"
    )
    eulernet.set_h(model, [0.3, 1.0])
    refused(
        model, lambda: eulernet.fold(model, example_inputs=X), r"first \(Residual\)", r"first\.f\.(weight|bias) is also"
    )
    eulernet.fold(model, where_possible=True, example_inputs=X)
    assert [step.h for step in eulernet.steps(model)] == [0.3]


def test_a_map_that_is_used_elsewhere() -> None:
    model = eulernet.patch(Tied(returns=True).double(), 0.3, example_inputs=X)
    refused(model, lambda: eulernet.fold(model, example_inputs=X), r"first\.f\.(weight|bias) is also read by linear")


class Returned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.a(x)
        return {"state": x + y, "branch": y}


def test_a_branch_that_the_model_returns() -> None:
    model = eulernet.patch(Returned().double(), 0.3, example_inputs=X)
    refused(model, lambda: eulernet.fold(model, example_inputs=X), r"linear \(in a\) is also returned by the model")


def test_an_expert_that_the_example_did_not_reach() -> None:
    branch = Branch(lambda s, x: s.experts[int(x.sum() > 1e9)](x), experts=nn.ModuleList([linear(), linear()]))
    model = eulernet.patch(residual(branch), 0.3, example_inputs=X)
    refused(model, lambda: eulernet.fold(model, example_inputs=X), r"never reached f\.experts\.1")


class Modes(nn.Module):
    """Another map in training."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear(bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.b if self.training else self.a)(x)


def test_both_modes_are_looked_at() -> None:
    model = eulernet.patch(Modes().double(), 0.3, example_inputs=X)
    expected = in_both_modes(model, X)
    assert_equal_to_rounding(in_both_modes(eulernet.fold(model, example_inputs=X), X), expected)


IN_HALF_PRECISION = (WideningAddition, NarrowingInPlaceAddition)  # round inside, whatever they are given


class Nested(nn.Module):
    """A long step around a step: its last map has both factors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(conv(), Residual(conv()), Residual(conv()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_a_step_in_the_branch_of_another() -> None:
    model = Nested().double()
    weights = [model.inner[0].weight.clone(), model.inner[1].f.weight.clone(), model.inner[2].f.weight.clone()]
    eulernet.patch(model, {"<root>": 0.5, "*": 0.25}, example_inputs=X, include=["<root>", "inner"])
    assert len(eulernet.steps(model)) == 3
    expected = in_both_modes(model, X)
    with pytest.raises(
        EulernetError, match=r"<root> \(Nested\): add \(in inner\.1\) is also read by conv2d \(in inner\.2\.f\)"
    ):
        eulernet.fold(model, example_inputs=X)
    eulernet.fold(model, where_possible=True, example_inputs=X)
    assert_equal_to_rounding(in_both_modes(model, X), expected)
    assert torch.equal(model.inner[0].weight, weights[0])
    for block, weight in zip(model.inner[1:], weights[1:], strict=True):
        torch.testing.assert_close(block.f.weight, 0.25 * weight, rtol=1e-15, atol=0)


@pytest.mark.filterwarnings("ignore::eulernet.EulernetWarning", "ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("cls", [t for t in TRAPS if t not in IN_HALF_PRECISION], ids=lambda cls: cls.__name__)
def test_every_trap(cls: type[Trap]) -> None:
    """Whatever the trap, what is folded or preserved computes what it computed."""
    model, inputs = build(cls, torch.float64)
    original = copy.deepcopy(model)
    eulernet.patch(model, factor, example_inputs=inputs)
    expected = in_both_modes(model, *inputs)
    eulernet.fold(model, where_possible=True, example_inputs=inputs)
    assert_equal_to_rounding(in_both_modes(model, *inputs), expected)
    expected = in_both_modes(original, *inputs)
    eulernet.patch(original, factor, example_inputs=inputs, preserve="where_possible")
    assert_equal_to_rounding(in_both_modes(original, *inputs), expected)


# -------------------------------------------------------------------------------------------------------------- errors


def test_what_cannot_be_folded_at_all() -> None:
    model = net()
    refused(model, lambda: eulernet.fold(model, example_inputs=X), "Net is not patched", "no h to fold")
    with pytest.raises(EulernetError, match=r"takes a torch\.nn\.Module, not str"):
        eulernet.fold("resnet18")  # type: ignore[type-var]
    with pytest.raises(EulernetError, match=r"wraps the model"):
        eulernet.fold(nn.DataParallel(eulernet.patch(model, H, example_inputs=X)))
    with pytest.raises(EulernetError, match=r"does not say what it takes(.|\n)*example_inputs="):
        eulernet.fold(model)
    with pytest.raises(EulernetError, match=r'preserve must be True, False or "where_possible", not \'yes\''):
        eulernet.patch(net(), H, example_inputs=X, preserve="yes")  # type: ignore[arg-type]


def test_other_inputs_than_those_of_the_patch() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = linear()

        def forward(self, x: Tensor, residual: bool = True) -> Tensor:
            return x + self.a(x) if residual else self.a(x)

    model = eulernet.patch(Optional().double(), 0.3, example_inputs=X)
    refused(
        model, lambda: eulernet.fold(model, example_inputs=(X, False)), "<root>", "with which the model was patched"
    )


def test_weights_without_values() -> None:
    model = eulernet.patch(net(), 0.3, example_inputs=X, include=FOLDABLE).to("meta")
    meta = X.to("meta")
    refused(model, lambda: eulernet.fold(model, example_inputs=meta), "meta device", "to_empty", "norm.f.4.weight")
    eulernet.unpatch(model)
    refused(model, lambda: eulernet.patch(model, 0.3, example_inputs=meta, include=FOLDABLE, preserve=True), "meta")
    h = {**dict.fromkeys(FOLDABLE, 0.3), "*": 1.0}
    groups = eulernet.param_groups(model, 0.1, h=h, example_inputs=meta)
    assert [len(group["params"]) for group in groups] == [13, 5]


@pytest.mark.parametrize("h", [1e-6, 1e6])
def test_the_range_of_half_precision(h: float) -> None:
    model = residual(linear()).half()
    x = X.half()
    words = ("f.weight, with values up to", "leaves the range of float16", "float32")
    refused(model, lambda: eulernet.patch(model, h, example_inputs=x, preserve=True), *words)
    with pytest.warns(EulernetWarning) if h < 1 else contextlib.nullcontext():
        eulernet.patch(model, h, example_inputs=x)
    refused(model, lambda: eulernet.fold(model, example_inputs=x), *words)
    assert not eulernet.is_patched(eulernet.fold(model.float(), example_inputs=X.float()))


class Packed(Tensor):
    """A weight of another kind, as quantising libraries have them."""


def test_packed_weights() -> None:
    model = residual(linear())
    model.f.weight = nn.Parameter(model.f.weight.detach().as_subclass(Packed))
    refused(
        model,
        lambda: eulernet.patch(model, 0.3, example_inputs=X, preserve=True),
        r"f\.weight is quantised or packed \(Packed\)",
    )


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
def test_undoing_the_learning_rate_of_h(rule: Any) -> None:
    """On a patched model 1 / h leaves the first effect alone: the maps start smaller, and learn as they would."""
    lr, build = RATES[rule], OPTIMIZERS[rule]
    patched = eulernet.patch(MLP(True), 0.25, example_inputs=POINTS)
    groups = eulernet.param_groups(patched, lr, h=lambda step: 1 / step.h, optimizer=rule, example_inputs=POINTS)
    folded = eulernet.fold(eulernet.patch(MLP(True), 0.25, example_inputs=POINTS), example_inputs=POINTS)
    actual = losses(patched, build(groups))
    expected = losses(folded, build([{"params": list(folded.parameters()), "lr": lr, "weight_decay": 0.0}]))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


def test_the_groups() -> None:
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
def test_bad_values(arguments: dict[str, Any], words: str) -> None:
    model = MLP(False)
    with pytest.raises(EulernetError, match=words):
        eulernet.param_groups(model, **{"lr": 0.1, "h": 0.1, "example_inputs": POINTS, **arguments})


# ------------------------------------------------------------------------------------------------------------ warnings


def test_a_trained_model_is_not_changed_silently() -> None:
    model = net()
    model.train()(X)
    words = r"Net seems to be trained \(norm\.f\.1 has seen 1 batch\)(.|\n)*preserve=True(.|\n)*h=1\.0(.|\n)*set_h"
    with pytest.warns(EulernetWarning, match=words):
        eulernet.patch(model, 0.1, example_inputs=X, include=FOLDABLE)
    saved = eulernet.steps(model)
    eulernet.unpatch(model)
    with pytest.raises(EulernetWarning):  # where warnings are errors, as in these tests, nothing is changed
        eulernet.patch(model, 0.1, example_inputs=X, include=FOLDABLE)
    assert not eulernet.is_patched(model)
    for h, kwargs in ((1, {}), (0.1, {"preserve": True}), (saved, {})):  # no warning, which would be an error
        eulernet.patch(model, h, example_inputs=X, include=FOLDABLE, **kwargs)
    eulernet.patch(net(), 0.1, example_inputs=X)


def test_a_model_that_says_where_it_was_loaded_from() -> None:
    model = residual(linear())
    model.config = model.name_or_path = "google/bert"
    with pytest.warns(EulernetWarning, match=r"its configuration names 'google/bert'"):
        eulernet.patch(model, 0.1, example_inputs=X)


@pytest.mark.parametrize(
    ("dtype", "h", "least"),
    [(torch.bfloat16, 0.05, "0.062"), (torch.float16, 0.005, "0.0078"), (torch.float32, 1e-9, "")],
)
def test_half_precision_and_a_small_h(dtype: torch.dtype, h: float, least: str) -> None:
    model, x = residual(linear()).to(dtype), X.to(dtype)
    if not least:
        eulernet.patch(model, h, example_inputs=x)
        return
    words = rf"1 step has an h down to {h}(.|\n)*Keep h above {least}"
    with pytest.warns(EulernetWarning, match=words):
        eulernet.patch(model, h, example_inputs=x)
    eulernet.patch(model, 2 * h, example_inputs=x)
    with pytest.warns(EulernetWarning, match=words):
        eulernet.set_h(model, h)
    with pytest.warns(EulernetWarning, match=words):
        eulernet.HScheduler(model, start=1.0, end=h, total_steps=3)
    eulernet.HScheduler(model, start=1.0, end=2 * h, total_steps=3)
    eulernet.patch(model, h, example_inputs=x, preserve=True)  # the increment is what it was


def test_half_precision_of_a_step_in_a_module_without_parameters() -> None:
    class Add(nn.Module):
        def forward(self, x: Tensor, f: Tensor) -> Tensor:
            return x + f

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.add = linear(), Add()

        def forward(self, x: Tensor) -> Tensor:
            return self.add(x, self.f(x))

    with pytest.warns(EulernetWarning, match="1 step has an h down to 0.01 in bfloat16"):
        eulernet.patch(Block().bfloat16(), 0.01, example_inputs=X.bfloat16())
