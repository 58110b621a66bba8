"""Which maps of a branch take over h, and which do not."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode

import eulernet
from eulernet._find.absorb import _HOMOGENEOUS
from tests.helpers.folding import (
    SHAPE,
    Branch,
    X,
    assert_equal_to_rounding,
    conv,
    gated,
    in_both_modes,
    linear,
    parameter,
    residual,
)
from tests.helpers.refusals import refused


class Fn(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


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


@pytest.mark.parametrize("name", ABSORBED)
def test_h_goes_into_the_last_map_of_a_branch(name: str) -> None:
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
def test_what_cannot_absorb_h_is_refused_by_name(name: str) -> None:
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
