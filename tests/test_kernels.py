"""`eulernet.functional` and its kernels, against float64: on a GPU where there is one, else in Triton's interpreter.

The interpreter cuts a float32 off where a GPU rounds it to bfloat16: half a unit in the last place more, for which
`ROUNDING` allows.
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import eulernet
from eulernet import EulernetError, kernels
from eulernet.functional import euler_step, euler_step_bn, euler_step_norm

pytest.importorskip("triton")
from eulernet.kernels import _device, _layout, _norm, _step
from eulernet.kernels._launch import Launch

# The interpreter of Triton 3.6 makes numbers of arrays with one element. NumPy warns of it, and refuses it from 2.4 on.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# In float64 the reference errs as much as what is compared with it.
ROUNDING = {torch.bfloat16: 0.0 if GPU else 0.5, torch.float64: 2.0, torch.float32: 0.0, torch.float16: 0.0}
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
}
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What a kernel is to write into holds NaN before."""
    with kernels.mode("auto"):
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(3, device=DEVICE).isnan().all() and torch.ones(1).new_empty(3).isnan().all()
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def test_choosing_a_mode_holds_its_name() -> None:
    """torch 2.8 to 2.11 lets go of it once more than it took it, until Python frees it."""
    name = "".join(["tri", "ton"])
    before = sys.getrefcount(name)
    for _ in range(3):
        with kernels.mode(name):
            pass
    assert sys.getrefcount(name) >= before


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that ran, but for the ends of sums."""
    names: list[str] = []

    start = Launch.__call__

    def counted(self: Launch, tensors: tuple[Tensor | None, ...], h: float) -> None:
        names.extend({self.kernel.fn.__name__} - {"sum_parts"})
        start(self, tensors, h)

    monkeypatch.setattr(Launch, "__call__", counted)
    return names


def random(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype).requires_grad_(grad)


# -------------------------------------------------------------------------------------------------- against float64


def gradients(function: Callable[..., Any], inputs: list[Tensor | None], seeds: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of the inputs that require one."""
    out = function(*inputs)
    outs = list(out) if isinstance(out, tuple) else [out]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    return outs + list(torch.autograd.grad(outs, wanted, [s.to(o.dtype) for s, o in zip(seeds, outs, strict=True)]))


def check(ours: Callable[..., Any], eager: Callable[..., Any], inputs: list[Tensor | None]) -> None:
    """Ours, in kernels, is as near to float64 as eager is, up to two units in the last place; types and strides agree.

    The units are those of the largest operand or result, since sums cancel, and for the gradient of a small operand,
    which is a sum over many elements in fp32, those of the sum's typical size.
    """

    def as_double(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().double().requires_grad_(x.requires_grad)

    doubles = [as_double(x) for x in inputs]
    exact_out = eager(*doubles)
    seeds = [torch.randn_like(o) for o in (exact_out if isinstance(exact_out, tuple) else [exact_out])]
    exact = gradients(eager, doubles, seeds)
    expected = gradients(eager, inputs, seeds)
    with kernels.mode("triton"):
        actual = gradients(ours, inputs, seeds)
    for out, like in zip(actual[: len(seeds)], expected, strict=False):
        assert strides(out) == strides(like)
    operands = max(
        (x.detach().abs().max().item() for x in [*seeds, *doubles] if x is not None and x.numel()), default=0
    )
    for a, e, x in zip(actual, expected, exact, strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        if not a.numel():
            continue
        largest = max(operands, x.abs().max().item())
        summed = (exact[0].numel() / a.numel()) ** 0.5 * torch.finfo(torch.promote_types(a.dtype, torch.float32)).eps
        unit = largest * max(torch.finfo(a.dtype).eps, summed)
        allowed = (e.double() - x).abs().max().item() + (2 + ROUNDING[a.dtype]) * unit
        error = (a.double() - x).abs().max().item()
        assert error <= allowed, f"{error / unit:.2f} units, eager {(allowed / unit - 2):.2f}"


def strides(tensor: Tensor) -> list[int]:
    """Those that say where elements are: a dimension of size 1 may have any."""
    return [stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]


def eager_step(activation: str | None, h: float | Tensor) -> Callable[..., Tensor]:
    """The step as people write it."""

    def function(skip: Tensor, branch: Tensor, scale: Tensor | None, mask: Tensor | None) -> Tensor:
        f = branch if scale is None else scale * branch
        f = f if mask is None else mask * f
        return ACTIVATIONS[activation](skip + h * f)

    return function


def our_step(activation: str | None, h: float) -> Callable[..., Tensor]:
    def function(skip: Tensor, branch: Tensor, scale: Tensor | None, mask: Tensor | None) -> Tensor:
        return euler_step(skip, branch, h, activation=activation, layer_scale=scale, drop_path=mask)

    return function


SCALES: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "none": ((3, 5, 8), None),
    "one number": ((3, 5, 8), ()),
    "last dimension": ((3, 5, 24), (24,)),
    "many rows": ((700, 24), (24,)),
    "channels": ((3, 6, 4, 5), (6, 1, 1)),
    "few channels, one sample": ((1, 2, 3, 3), (2, 1, 1)),
    "samples": ((4, 6, 5), (4, 1, 1)),
}


@activations
@pytest.mark.parametrize("masked", [False, True], ids=["", "drop path"])
@pytest.mark.parametrize("case", SCALES)
@dtypes
def test_step(activation: str | None, masked: bool, case: str, dtype: torch.dtype, launches: list[str]) -> None:
    shape, scale = SCALES[case]
    inputs: list[Tensor | None] = [random(*shape, dtype=dtype), random(*shape, dtype=dtype), None, None]
    if scale is not None:
        inputs[2] = random(*scale, dtype=dtype)
    if masked:
        inputs[3] = random(shape[0], *[1] * (len(shape) - 1), dtype=dtype, grad=False)
    check(our_step(activation, 0.3), eager_step(activation, 0.3), inputs)
    assert launches == ["step_forward", "step_backward"]


@pytest.mark.parametrize("skip", FLOATS)
@pytest.mark.parametrize("branch", FLOATS)
@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16])
def test_types_promote_as_in_eager(
    skip: torch.dtype, branch: torch.dtype, scale: torch.dtype, launches: list[str]
) -> None:
    inputs = [random(2, 3, 8, dtype=skip), random(2, 3, 8, dtype=branch), random(8, dtype=scale), None]
    check(our_step("silu", 0.3), eager_step("silu", 0.3), inputs)
    assert launches == ["step_forward", "step_backward"]


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "channels_last": ((2, 8, 3, 4), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "without the first token": ((2, 5, 8), lambda x: x[:, 1:]),
    "half of the channels": ((2, 5, 16), lambda x: x[..., 8:]),
    "rows of an image": ((2, 8, 6, 4), lambda x: x[:, :, 2:5]),
    "channels_last, rows of an image": ((2, 8, 6, 4), lambda x: x.to(memory_format=torch.channels_last)[:, :, 2:5]),
    "tokens first": ((2, 5, 8), lambda x: x.transpose(0, 1)),
    "volumes": ((2, 3, 4, 2, 2), lambda x: x),
}


@activations
@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_strides_without_copies(activation: str | None, case: str, scaled: bool, launches: list[str]) -> None:
    shape, view = LAYOUTS[case]
    inputs: list[Tensor | None] = [view(random(*shape, grad=False)).requires_grad_() for _ in range(2)] + [None, None]
    if scaled:
        channels = inputs[0].shape[1] if len(shape) > 3 else inputs[0].shape[-1]
        inputs[2] = random(channels, *[1] * max(0, len(shape) - 2)) if len(shape) > 3 else random(channels)
    check(our_step(activation, 0.3), eager_step(activation, 0.3), inputs)
    assert launches == ["step_forward", "step_backward"]


@st.composite
def operands(draw: st.DrawFn) -> tuple[list[Tensor | None], str | None, float]:
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    torch.manual_seed(draw(st.integers(0, 1000)))

    def operand() -> Tensor:
        order = draw(st.permutations(range(len(shape)))) if draw(st.booleans()) else list(range(len(shape)))
        margins = [draw(st.integers(0, 2)) if draw(st.booleans()) else 0 for _ in shape]
        full = random(*[shape[d] + margins[d] for d in order], dtype=draw(st.sampled_from(FLOATS)), grad=False)
        full = full.permute([order.index(d) for d in range(len(shape))])
        return full[tuple(slice(m, None) for m in margins)].detach().requires_grad_(draw(st.booleans()))

    skip = operand().requires_grad_()
    branch = operand()
    scale = mask = None
    if draw(st.booleans()):
        d = draw(st.integers(0, len(shape)))
        sizes = [n if i == d else 1 for i, n in enumerate(shape)][d:]
        scale = random(*sizes, dtype=draw(st.sampled_from(FLOATS)), grad=draw(st.booleans()))
    if draw(st.booleans()):
        mask = random(shape[0], *[1] * (len(shape) - 1), dtype=skip.dtype, grad=False)
    return (
        [skip, branch, scale, mask],
        draw(st.sampled_from(list(ACTIVATIONS))),
        draw(st.sampled_from([1.0, 0.1, -2.5])),
    )


@settings(max_examples=60, deadline=None)
@given(operands())
def test_any_shapes_strides_and_dtypes(case: tuple[list[Tensor | None], str | None, float]) -> None:
    inputs, activation, h = case
    check(our_step(activation, h), eager_step(activation, h), inputs)


@pytest.mark.parametrize("h_shape", [(), (8,)], ids=["0-d", "per channel"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@activations
def test_h_is_learned(activation: str | None, h_shape: tuple[int, ...], scaled: bool, launches: list[str]) -> None:
    inputs = [random(3, 5, 8), random(3, 5, 8), random(*h_shape), random(8) if scaled else None]

    def ours(skip: Tensor, branch: Tensor, h: Tensor, scale: Tensor | None) -> Tensor:
        return euler_step(skip, branch, h, activation=activation, layer_scale=scale)

    def eager(skip: Tensor, branch: Tensor, h: Tensor, scale: Tensor | None) -> Tensor:
        return ACTIVATIONS[activation](skip + h * (branch if scale is None else scale * branch))

    check(ours, eager, inputs)
    assert launches == ["step_forward", "step_backward"]


@activations
@pytest.mark.parametrize("scale", [None, (), (5,), (3, 1, 1)], ids=str)
def test_gradcheck(activation: str | None, scale: tuple[int, ...] | None, launches: list[str]) -> None:
    inputs = [random(2, 3, 2, 5, dtype=torch.float64) for _ in range(2)]
    inputs += [None if scale is None else random(*scale, dtype=torch.float64)]
    inputs += [random(2, 1, 1, 1, dtype=torch.float64, grad=False)]
    with kernels.mode("triton"):
        assert torch.autograd.gradcheck(our_step(activation, 0.3), inputs, fast_mode=True)
    assert "step_backward" in launches


def test_the_gradient_of_scale_is_the_same_bits_each_time(launches: list[str]) -> None:
    skip, branch, scale = random(900, 40), random(900, 40), random(40)
    with kernels.mode("triton"):
        first, second = (
            torch.autograd.grad(euler_step(skip, branch, 0.3, layer_scale=scale).sum(), scale)[0] for _ in "12"
        )
    assert torch.equal(first, second)
    assert launches.count("step_backward") == 2


def test_a_reduction_over_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program goes over several tiles, the last of which has fewer rows."""
    for module in (_step, _norm):
        monkeypatch.setattr(module, "_plans", {})  # those that are kept have another number of programs
    monkeypatch.setattr(_layout, "multiprocessors", lambda device: 1)
    for scale in ((40,), ()):
        inputs = [random(1501, 40), random(1501, 40), random(*scale), None]
        check(our_step("relu", 0.3), eager_step("relu", 0.3), inputs)
    inputs = [random(1501, 40), random(1501, 40), random(40), random(40), random(40)]
    check(*norms("layer_norm"), inputs)


@pytest.mark.parametrize("h", [0.3, None], ids=["", "learned"])
def test_one_kernel_ends_the_sums_of_weight_bias_and_scale(h: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one more that of a scale that is a single number."""
    ran: list[str] = []
    start = Launch.__call__

    def watched(self: Launch, tensors: tuple[Tensor | None, ...], h: float) -> None:
        ran.append(self.kernel.fn.__name__)
        start(self, tensors, h)

    monkeypatch.setattr(Launch, "__call__", watched)
    inputs = [random(300, 40), random(300, 40), random(40), random(40), random(40) if h else random()]

    def ours(skip: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Any:
        given, layer_scale = (scale, None) if h is None else (h, scale)
        return euler_step_norm(skip, branch, given, weight, bias, layer_scale=layer_scale)

    def eager(skip: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Any:
        return norms("layer_norm")[1](skip, scale * branch, weight, bias, torch.tensor(h or 1.0).to(skip))

    check(ours, eager, inputs)
    assert ran == ["norm_forward", "norm_backward"] + ["sum_parts"] * (1 if h else 2)


def test_offsets_beyond_32_bits(launches: list[str]) -> None:
    """Two rows of a tensor of more than 2**31 elements, the pages between which are never touched."""
    torch.use_deterministic_algorithms(False)  # which would write into all of them
    far = 2**31 + 64
    skip, branch = (torch.empty(far + 8, dtype=torch.float16, device=DEVICE).as_strided((2, 8), (far, 1)) for _ in "12")
    values = torch.randn(2, 2, 8).half().to(DEVICE)
    skip.copy_(values[0])
    branch.copy_(values[1])
    with kernels.mode("triton"):
        actual = euler_step(skip, branch, 0.5)
    torch.testing.assert_close(actual, torch.add(values[0], values[1], alpha=0.5), rtol=0, atol=0)
    assert launches == ["step_forward"]


@pytest.mark.skipif(not GPU, reason="2**31 elements take the interpreter hours")
@pytest.mark.parametrize("n", [2**31 - 1, 2**31 + 2**12 + 1])
def test_more_than_2_to_31_elements(n: int) -> None:
    skip = torch.randn(n, dtype=torch.float16, device=DEVICE)
    branch = torch.randn(n, dtype=torch.float16, device=DEVICE)
    with kernels.mode("triton"):
        actual = euler_step(skip, branch, 0.5, activation="relu")
    expected = torch.add(skip, branch, alpha=0.5).relu_()
    assert torch.equal(actual[-(2**13) :], expected[-(2**13) :]) and torch.equal(actual[: 2**13], expected[: 2**13])
    assert (actual - expected).abs().max() <= 2**-9


def test_empty_tensors() -> None:
    for shape in ((0,), (0, 4), (3, 0, 4)):
        check(our_step("relu", 0.3), eager_step("relu", 0.3), [random(*shape), random(*shape), random(shape[-1]), None])


@activations
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
def test_nan_and_infinity_come_through(activation: str | None, launches: list[str]) -> None:
    skip = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, 0.0, -0.0], device=DEVICE)
    with kernels.mode("triton"):
        actual = euler_step(skip, skip.flip(0), 0.5, activation=activation)
    expected = eager_step(activation, 0.5)(skip.double(), skip.double().flip(0), None, None)
    torch.testing.assert_close(actual, expected.float(), equal_nan=True)
    assert launches == ["step_forward"]


# ------------------------------------------------------------------------------------------- what surrounds the kernels


def saved_bytes(function: Callable[[], Tensor]) -> tuple[int, list[tuple[int, ...]]]:
    shapes: list[tuple[int, ...]] = []
    pointers = {}

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        pointers[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return sum(pointers.values()), shapes


def test_what_is_saved_for_backward() -> None:
    """ReLU: its output. SiLU, GELU: the state before. A learned scale: the branch, once. A number: nothing."""
    skip, branch, scale, h = random(4, 5, 8), random(4, 5, 8), random(8), random()
    with kernels.mode("triton"):
        assert saved_bytes(lambda: euler_step(skip, branch, 0.3))[1] == []
        assert saved_bytes(lambda: euler_step(skip, branch, 0.3, activation="relu"))[1] == [(4, 5, 8)]
        assert saved_bytes(lambda: euler_step(skip, branch, 0.3, activation="silu"))[1] == [(4, 5, 8)]
        assert saved_bytes(lambda: euler_step(skip, branch, 0.3, activation="gelu"))[1] == [(4, 5, 8)]
        assert saved_bytes(lambda: euler_step(skip, branch, 0.3, layer_scale=scale))[1] == [(4, 5, 8), (8,)]
        assert saved_bytes(lambda: euler_step(skip, branch, 0.3, layer_scale=scale.detach()))[1] == [(8,)]
        saved = saved_bytes(lambda: euler_step(skip, branch, h, layer_scale=scale, activation="relu"))[1]
    assert saved.count((4, 5, 8)) == 2  # the branch and the output


def test_the_gradient_of_a_plain_skip_is_passed_on() -> None:
    skip, branch = random(4, 8), random(4, 8)
    with kernels.mode("triton"):
        out = euler_step(skip, branch, 0.5)
        seed = torch.randn_like(out)
        grad = torch.autograd.grad(out, skip, seed)[0]
    assert grad.data_ptr() == seed.data_ptr()


@pytest.mark.parametrize("shape", [(4, 5, 8), (4, 8, 3, 3)])
@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_drop_path_is_drawn_as_in_timm(shape: tuple[int, ...], mode: str) -> None:
    timm_layers = pytest.importorskip("timm.layers")
    skip, branch = random(*shape), random(*shape)
    torch.manual_seed(3)
    expected = skip + timm_layers.drop_path(branch, 0.5, training=True)  # the survivors times 2: nothing is rounded
    torch.manual_seed(3)
    with kernels.mode(mode):
        actual = euler_step(skip, branch, 1.0, drop_path=0.5)
    assert torch.equal(actual, expected)
    assert 0 < (actual == skip).all(dim=tuple(range(1, len(shape)))).sum() < shape[0]


@pytest.mark.parametrize("mode", ["torch", "triton"])
@activations
def test_out(mode: str, activation: str | None) -> None:
    skip, branch, out = random(4, 8, grad=False), random(4, 8, grad=False), torch.empty(4, 8, device=DEVICE)
    expected = ACTIVATIONS[activation](torch.add(skip, branch, alpha=0.5))
    with kernels.mode(mode):
        assert euler_step(skip, branch, 0.5, activation=activation, out=out) is out
        torch.testing.assert_close(out, expected)
        transposed = torch.empty(8, 4, device=DEVICE).t()
        torch.testing.assert_close(euler_step(skip, branch, 0.5, activation=activation, out=transposed), expected)
        euler_step(skip, branch, 0.5, activation=activation, out=skip)  # in place
    torch.testing.assert_close(skip, expected)
    with pytest.raises(EulernetError, match="out= has no gradient"):
        euler_step(random(4, 8), branch, 0.5, out=out)


# ---------------------------------------------------------------------------- gradients of gradients, and of what moved


@activations
@pytest.mark.parametrize("scale", [None, (5,)], ids=str)
def test_gradients_of_gradients(activation: str | None, scale: tuple[int, ...] | None, launches: list[str]) -> None:
    inputs = [random(2, 5, dtype=torch.float64), random(2, 5, dtype=torch.float64)]
    inputs += [
        None if scale is None else random(*scale, dtype=torch.float64),
        random(2, 1, dtype=torch.float64, grad=False),
    ]
    with kernels.mode("triton"):
        assert torch.autograd.gradgradcheck(our_step(activation, 0.3), inputs)
    assert "step_forward" in launches


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_gradients_of_gradients_of_step_and_norm(kind: str, launches: list[str]) -> None:
    inputs = [random(2, 3, dtype=torch.float64) for _ in "12"] + [random(3, dtype=torch.float64) for _ in "123"]
    inputs[3] = inputs[3] if kind == "layer_norm" else None
    with kernels.mode("triton"):
        assert torch.autograd.gradgradcheck(norms(kind)[0], inputs)
    assert "norm_forward" in launches


def derivatives(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Of a gradient penalty, of a Hessian product, batched ones, and a third derivative."""
    outs = function(*inputs)
    out = sum(o.float().square().mean() for o in (outs if isinstance(outs, tuple) else (outs,)))
    first = torch.autograd.grad(out, inputs, create_graph=True)
    penalty = sum(g.float().square().sum() for g in first)
    second = torch.autograd.grad(penalty, inputs, create_graph=True)
    third = torch.autograd.grad(sum(g.float().sum() for g in second), inputs)
    outs = function(*inputs)
    last = outs[-1] if isinstance(outs, tuple) else outs
    seeds = torch.linspace(-1, 1, 3 * last.numel(), device=DEVICE).view(3, *last.shape).to(last.dtype)
    batched = torch.autograd.grad(last, inputs, seeds, is_grads_batched=True)
    return [*first, *second, *third, *batched]


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "layer_norm", "rms_norm"])
def test_penalties_products_and_batched_gradients_are_those_of_eager(activation: str, launches: list[str]) -> None:
    inputs = [random(3, 8), random(3, 8), random(8), random(8)]
    if activation in ACTIVATIONS:

        def ours(skip: Tensor, branch: Tensor, h: Tensor, scale: Tensor) -> Any:
            return euler_step(skip, branch, h, activation=activation, layer_scale=scale)  # type: ignore[arg-type]

        def eager(skip: Tensor, branch: Tensor, h: Tensor, scale: Tensor) -> Any:
            return ACTIVATIONS[activation](skip + h * scale * branch)
    else:
        centred = activation == "layer_norm"

        def ours(skip: Tensor, branch: Tensor, h: Tensor, weight: Tensor) -> Any:
            return norms(activation)[0](skip, branch, weight, None, h)

        def eager(skip: Tensor, branch: Tensor, h: Tensor, weight: Tensor) -> Any:
            """Written out: the third derivative of `F.layer_norm` takes its standard deviation for a constant."""
            state = skip + h * branch
            z = state - state.mean(-1, keepdim=True) if centred else state
            return state, z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    with kernels.mode("triton"):
        actual = derivatives(ours, inputs)
    for a, e in zip(actual, derivatives(eager, inputs), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)  # a third derivative has lost some digits
    assert [name.endswith("forward") for name in launches].count(True) == 2


def moved(tensor: Tensor) -> Tensor:
    """What `save_on_cpu`, offloading and compression give back: the values, contiguous."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@pytest.mark.parametrize("what", [*ACTIVATIONS, "layer_norm", "rms_norm"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_saved_tensors_may_come_back_with_other_strides(what: str | None, case: str, launches: list[str]) -> None:
    shape, view = LAYOUTS[case]
    skip, branch = (view(random(*shape, grad=False)).requires_grad_() for _ in "12")
    if what in ACTIVATIONS:
        scale = random(skip.shape[1], 1, 1) if skip.dim() == 4 else random(skip.shape[-1])
        ours, eager = our_step(what, 0.3), eager_step(what, 0.3)
        inputs = [skip, branch, scale, None]
    else:
        ours, eager = norms(what)
        inputs = [skip, branch, random(skip.shape[-1]), None, random(skip.shape[-1])]

    def hooked(*inputs: Tensor | None) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(moved, lambda x: x):
            return ours(*inputs)

    check(hooked, eager, inputs)
    assert launches == [] or len(launches) == 2
    assert launches or what not in ACTIVATIONS


def test_a_state_requires_grad_where_it_depends_on_what_does() -> None:
    x, weight = random(3, 8, grad=False), random(8)
    with kernels.mode("triton"):
        state, normed = euler_step_norm(x, x, 0.5, weight)
        assert (state.requires_grad, normed.requires_grad) == (False, True)
        for create_graph in (False, True):
            grad = torch.autograd.grad(normed.sum(), weight, create_graph=create_graph, retain_graph=True)[0]
            torch.testing.assert_close(grad, F.layer_norm(1.5 * x, (8,)).sum(0))


@pytest.mark.parametrize("mode", ["torch", "triton"])
@activations
def test_tensors_without_dimensions_stay_so(mode: str, activation: str | None) -> None:
    with kernels.mode(mode):
        for h in (0.5, torch.tensor(0.5, device=DEVICE), torch.tensor(0.5), random()):
            assert euler_step(random(), random(), h, activation=activation).shape == ()
            assert euler_step(random(), random(), h, activation=activation, layer_scale=random()).shape == ()
            assert euler_step(random(), random(), h, activation=activation, layer_scale=random(1)).shape == (1,)


@pytest.mark.parametrize("mode", ["torch", "triton"])
@activations
def test_out_that_overlaps_is_refused(mode: str, activation: str | None) -> None:
    z = random(5000, grad=False)
    before = z.clone()
    with kernels.mode(mode):
        for out, skip, branch in ((z[1:], z[1:], z[:-1]), (z[:-1], z[1:], z[1:]), (z[:1].expand(8), z[:8], z[:8])):
            with pytest.raises(EulernetError, match="call euler_step without it"):
                euler_step(skip, branch, 0.5, activation=activation, out=out)
        assert torch.equal(z, before)
        halves, expected = z.view(50, 100), before.view(50, 100)
        euler_step(halves[:, 50:], halves[:, 50:], 1.0, activation=activation, out=halves[:, :50])  # side by side
    torch.testing.assert_close(z.view(50, 100)[:, :50], ACTIVATIONS[activation](2 * expected[:, 50:]))


def test_h_on_the_cpu_is_not_copied_to_the_gpu() -> None:
    """A copy waits for the GPU, and a graph cannot capture it; an operator takes the number along."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert "copy" not in func.__name__ and "_local_scalar" not in func.__name__, func
            return func(*args, **kwargs or {})

    with torch._subclasses.FakeTensorMode(), Copies():
        x, h = torch.empty(4, 8, device="cuda"), torch.empty(())
        assert euler_step(x, x, h, activation="relu").is_cuda


def test_a_mode_is_of_one_thread() -> None:
    import threading

    seen: list[str] = []
    with kernels.mode("torch"):
        thread = threading.Thread(target=lambda: seen.append(kernels.current()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_a_kernel_that_does_not_compile_is_left_to_torch_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward and in the backward; where the kernels were asked for, it is an error."""

    class Broken:
        fn = _device.step_forward.fn

        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("no such instruction")

    skip, branch = random(3, 8), random(3, 8)
    expected = torch.autograd.grad(F.silu(skip + 0.5 * branch).sum(), (skip, branch))
    for name in ("step_backward", "step_forward"):
        monkeypatch.setattr(kernels, "_broken", False)
        monkeypatch.setattr(_step, "_plans", {})
        monkeypatch.setattr(_device, name, Broken())
        with kernels.mode("triton"):
            if name == "step_forward":
                with pytest.raises(RuntimeError, match="no such instruction"):
                    euler_step(skip, branch, 0.5, activation="silu")
            monkeypatch.setattr(kernels, "current", lambda: "auto")
            monkeypatch.setattr(kernels, "chosen", lambda *args, **options: True)
            with pytest.warns(eulernet.EulernetWarning, match="no such instruction") as warned:
                for _ in "12":
                    out = euler_step(skip, branch, 0.5, activation="silu")
                    for a, e in zip(torch.autograd.grad(out.sum(), (skip, branch)), expected, strict=True):
                        torch.testing.assert_close(a, e)
            assert len(warned) == 1
            monkeypatch.undo()


def test_a_bug_is_no_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Want of memory neither."""
    for error in (TypeError("an argument too many"), torch.OutOfMemoryError("of 80 GiB")):
        with pytest.raises(type(error)):
            kernels.failed(error)
    assert not kernels._broken


def test_gpus_that_triton_cannot_serve_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.version, "hip", None)
    kernels._works.cache_clear()
    with pytest.warns(eulernet.EulernetWarning, match=r"7\.0 and more, and GPU 0 has \(6, 1\)"):
        assert not kernels._works(0)
    kernels._works.cache_clear()


def test_broadcasting_operands_are_left_to_torch(launches: list[str]) -> None:
    inputs = [random(3, 4), random(4), random(4), None]
    check(our_step("relu", 0.3), eager_step("relu", 0.3), inputs)
    inputs = [random(3, 4), random(3, 4), random(3, 4), None]
    check(our_step("relu", 0.3), eager_step("relu", 0.3), inputs)
    assert launches == []


def test_tensors_whose_memory_is_not_what_they_say_are_left_to_torch(launches: list[str]) -> None:
    x, scale = random(3, 4, grad=False), random(4, grad=False)
    negative = torch.complex(scale, scale).conj().imag
    assert negative.is_neg()
    asked: list[Any] = []

    class Asked(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    with kernels.mode("triton"):
        actual = euler_step(x, x, 0.5, layer_scale=negative)
        torch.testing.assert_close(actual, x - 0.5 * scale * x)
        actual = euler_step(x, torch.complex(x, x).conj().imag, 0.5, activation="relu")
        torch.testing.assert_close(actual, F.relu(0.5 * x))
        assert type(euler_step(x, x, 0.5, layer_scale=scale.as_subclass(Asked))) is Asked and asked
        torch.testing.assert_close(euler_step(x.to_sparse(), x.to_sparse(), 0.5).to_dense(), 1.5 * x)
        meta = x.to("meta")
        assert euler_step(meta, meta, 0.5, activation="relu").is_meta
        with pytest.raises(RuntimeError, match="device"):
            euler_step(x, x, 0.5, out=meta)
    assert launches == []


def test_a_number_of_any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton knows Python's only, and compiles a kernel for each of some integers."""
    given: list[Any] = []
    monkeypatch.setattr(Launch, "__call__", lambda self, tensors, h: given.append(h))
    with kernels.mode("triton"), torch.no_grad():
        for h in (2, torch.tensor(0.5).numpy()[()]):
            euler_step(random(3), random(3), h, activation="relu")
    assert given == [2.0, 0.5] and {type(h) for h in given} == {float}


def test_h_may_be_on_the_cpu() -> None:
    """As for an operator of torch, which takes a tensor without dimensions from there."""
    with torch._subclasses.FakeTensorMode():  # which knows of devices, and needs none
        x, gamma, h = torch.empty(4, 8, device="cuda"), torch.empty(8, device="cuda"), torch.empty(())
        assert (x + h * x).is_cuda
        for scale in (None, gamma):
            assert euler_step(x, x, h, layer_scale=scale, activation="relu").is_cuda
            assert euler_step_norm(x, x, h, gamma, layer_scale=scale)[1].is_cuda
    x, h = random(3, 4), torch.tensor(0.5, requires_grad=True)
    with kernels.mode("triton"):
        euler_step(x, x, h).sum().backward()
    torch.testing.assert_close(h.grad, x.detach().sum().cpu())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_transforms_never_meet_a_kernel(launches: list[str]) -> None:
    skip, branch, scale = random(3, 4, grad=False), random(3, 4, grad=False), random(4, grad=False)

    def function(skip: Tensor, branch: Tensor) -> Tensor:
        return euler_step(skip, branch, 0.3, activation="silu", layer_scale=scale)

    class Module(torch.nn.Module):
        def forward(self, skip: Tensor, branch: Tensor) -> Tensor:
            return function(skip, branch)

    expected = function(skip, branch)
    with kernels.mode("triton"):
        close = torch.testing.assert_close
        close(torch.compile(function, backend="aot_eager", fullgraph=True)(skip, branch), expected)
        close(torch.export.export(Module(), (skip, branch)).module()(skip, branch), expected)
        close(torch.vmap(function)(skip, branch), expected)
        close(torch.func.jvp(function, (skip, branch), (skip, branch))[0], expected)
        close(torch.func.grad(lambda s: function(s, branch).sum())(skip).shape, skip.shape)
        close(torch.fx.experimental.proxy_tensor.make_fx(function)(skip, branch)(skip, branch), expected)
        close(torch.jit.trace(function, (skip, branch), check_trace=False)(skip, branch), expected)
        with torch.autograd.forward_ad.dual_level():
            close(function(torch.autograd.forward_ad.make_dual(skip, branch), branch), expected)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert function(fake.from_tensor(skip), fake.from_tensor(branch)).shape == (3, 4)
    assert launches == []


# ------------------------------------------------------------------------------------------------------- with a norm


def norms(kind: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def ours(skip: Tensor, branch: Tensor, weight: Tensor | None, bias: Tensor | None, h: Tensor | None = None) -> Any:
        return euler_step_norm(skip, branch, 0.3 if h is None else h, weight, bias, 1e-5, kind)  # type: ignore[arg-type]

    def eager(skip: Tensor, branch: Tensor, weight: Tensor | None, bias: Tensor | None, h: Tensor | None = None) -> Any:
        state = skip + (0.3 if h is None else h) * branch
        if kind == "rms_norm":
            return state, F.rms_norm(state, state.shape[-1:], weight, 1e-5)
        return state, F.layer_norm(state, state.shape[-1:], weight, bias, 1e-5)

    return ours, eager


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("affine", [False, True], ids=["", "affine"])
@pytest.mark.parametrize("shape", [(3, 5, 24), (50, 130), (2, 3, 2, 8), (7,), (3, 2500)], ids=str)
@dtypes
def test_step_and_norm(
    kind: str, affine: bool, shape: tuple[int, ...], dtype: torch.dtype, launches: list[str]
) -> None:
    inputs: list[Tensor | None] = [random(*shape, dtype=dtype), random(*shape, dtype=dtype), None, None]
    if affine:
        inputs[2] = random(shape[-1], dtype=dtype)
        inputs[3] = random(shape[-1], dtype=dtype) if kind == "layer_norm" else None
    check(*norms(kind), inputs)
    assert launches == ["norm_forward", "norm_backward"]


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("output", [0, 1], ids=["state", "norm"])
def test_one_output_of_step_and_norm_alone(kind: str, output: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a norm after the block only its result is used: the gradient of the state is not made, nor read, as zeros."""
    read: list[bool] = []
    start = Launch.__call__

    def watched(self: Launch, tensors: tuple[Tensor | None, ...], h: float) -> None:
        read.extend([tensors[0] is not None] if self.kernel is _device.norm_backward else [])
        start(self, tensors, h)

    monkeypatch.setattr(Launch, "__call__", watched)
    ours, eager = norms(kind)
    inputs = [random(6, 24), random(6, 24), random(24), random(24) if kind == "layer_norm" else None, random()]
    if output == 0:  # which takes neither weight nor bias
        inputs[2:4] = None, None
    check(lambda *x: ours(*x)[output], lambda *x: eager(*x)[output], inputs)
    assert read == [output == 0]


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("h", [(), (16,)], ids=["0-d", "per channel"])
def test_h_of_step_and_norm_is_learned(kind: str, h: tuple[int, ...], launches: list[str]) -> None:
    bias = random(16) if kind == "layer_norm" else None
    inputs = [random(6, 9, 16, grad=False)[:, 1:].requires_grad_(), random(6, 8, 16), random(16), bias, random(*h)]
    check(*norms(kind), inputs)
    assert launches == ["norm_forward", "norm_backward"]


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("shape", [(3, 5, 24), (6, 130), (2, 3, 2, 8)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "drop path"])
@dtypes
def test_layer_scale_and_drop_path_before_step_and_norm(
    kind: str, shape: tuple[int, ...], masked: bool, dtype: torch.dtype, launches: list[str]
) -> None:
    rows, columns = shape[0], shape[-1]
    mask = random(rows, *[1] * (len(shape) - 1), dtype=dtype, grad=False) if masked else None
    inputs = [random(*shape, dtype=dtype), random(*shape, dtype=dtype), random(columns, dtype=dtype)]
    inputs += [random(columns, dtype=dtype) if kind == "layer_norm" else None, random(columns, dtype=dtype), mask]

    def ours(skip: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, mask: Tensor) -> Any:
        return euler_step_norm(
            skip, branch, 0.3, weight, bias, 1e-5, kind, layer_scale=scale, drop_path=mask  # type: ignore[arg-type]
        )  # fmt: skip

    def eager(skip: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, mask: Tensor) -> Any:
        return norms(kind)[1](skip, branch * scale if mask is None else branch * scale * mask, weight, bias)

    check(ours, eager, inputs)
    assert launches == ["norm_forward", "norm_backward"]
    doubles = [None if x is None else x.detach().double() for x in inputs]
    for a, e in zip(ours(*doubles), eager(*doubles), strict=True):  # without kernels
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_gradcheck_of_step_and_norm(kind: str, launches: list[str]) -> None:
    inputs = [random(3, 4, 5, dtype=torch.float64) for _ in range(2)] + [random(5, dtype=torch.float64) for _ in "123"]
    inputs[3] = inputs[3] if kind == "layer_norm" else None
    with kernels.mode("triton"):
        assert torch.autograd.gradcheck(norms(kind)[0], inputs, fast_mode=True)
    assert "norm_backward" in launches


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_autocast_gives_the_norm_that_it_gives_in_eager(kind: str, launches: list[str]) -> None:
    weight = random(16, grad=False)
    skip, branch = random(4, 16), random(4, 16, dtype=torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = norms(kind)[0](skip, branch, weight, None)
        with kernels.mode("triton"):
            actual = norms(kind)[0](skip, branch, weight, None)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    assert launches == (["norm_forward"] if GPU and kind == "layer_norm" else [])


# ------------------------------------------------------------------------------------------------------ with batch norm


@activations
@pytest.mark.parametrize("shape", [(4, 6), (3, 6, 5), (2, 8, 3, 3), (2, 6, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_and_batch_norm(
    activation: str | None, shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, launches: list[str]
) -> None:
    affine = len(shape) != 3
    skip, branch = random(*shape, dtype=dtype, grad=False), random(*shape, dtype=dtype, grad=False)
    if channels_last:
        skip, branch = (x.movedim(1, -1).contiguous().movedim(-1, 1) for x in (skip, branch))
    mean, var = random(shape[1], grad=False), random(shape[1], grad=False).square()
    weight, bias = (random(shape[1], grad=False), random(shape[1], grad=False)) if affine else (None, None)
    statistics = (mean, var, weight, bias)

    def eager(skip: Tensor, branch: Tensor, *statistics: Tensor | None) -> Tensor:
        return ACTIVATIONS[activation](skip + 0.3 * F.batch_norm(branch, *statistics))

    exact = eager(*(None if t is None else t.double() for t in (skip, branch, *statistics)))
    expected = eager(skip, branch, *statistics)
    with kernels.mode("triton"):
        actual = euler_step_bn(skip, branch, 0.3, *statistics, activation=activation)
    assert (actual.dtype, actual.stride()) == (expected.dtype, expected.stride())
    unit = torch.finfo(dtype).eps * exact.abs().max()
    assert (actual - exact).abs().max() <= (expected - exact).abs().max() + (2 + ROUNDING[dtype]) * unit
    assert launches == ["bn_forward"]


def test_batch_norm_in_training_is_that_of_torch() -> None:
    norm = torch.nn.BatchNorm2d(6).to(DEVICE)
    other = copy.deepcopy(norm)
    skip, branch = random(4, 6, 3, 3), random(4, 6, 3, 3)
    expected = F.relu(skip + 0.3 * norm(branch))
    with kernels.mode("triton"):
        actual = euler_step_bn(
            skip, branch, 0.3, other.running_mean, other.running_var, other.weight, other.bias, training=True,
            activation="relu",
        )  # fmt: skip
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(other.running_var, norm.running_var)
    for a, e in zip(*(torch.autograd.grad(o.square().sum(), (skip, branch)) for o in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e)


# ------------------------------------------------------------------------------------------------------------ choosing


def test_mode_is_a_setting_and_a_block() -> None:
    assert kernels.current() == "auto"
    with kernels.mode("torch"):
        assert kernels.current() == "torch"
        kernels.mode("triton")
        assert kernels.current() == "triton"
    assert kernels.current() == "auto"


def test_auto_is_torch_on_the_cpu_and_below_a_size(launches: list[str]) -> None:
    large, small = (torch.ones(int(mebibytes * 2**18), device=DEVICE) for mebibytes in (4, 3))
    euler_step(small, small, 0.3, activation="relu")
    euler_step(large, large, 0.3)  # one kernel of torch's does that
    euler_step(large.cpu(), large.cpu(), 0.3, activation="relu")
    assert launches == []
    euler_step(large, large, 0.3, activation="relu")
    assert launches == (["step_forward"] if GPU else [])


@pytest.mark.parametrize("name", ["ACTIVATION", "LAYER_SCALE", "BATCH_NORM", "LAYER_NORM", "RMS_NORM", "WRITTEN_OUT"])
def test_auto_takes_a_kernel_from_the_size_on_at_which_it_pays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pays = getattr(kernels, name)
    monkeypatch.setattr(kernels, "_works", lambda device: True)
    with torch._subclasses.FakeTensorMode():
        for mebibytes in (0.5, 1, 3, 4, 8, 16, 32, 64, 128):
            x = torch.empty(int(mebibytes * 2**20), dtype=torch.int8, device="cuda").view(torch.bfloat16)
            monkeypatch.setattr(kernels, "_TENSORS", (type(x), torch.nn.Parameter))
            monkeypatch.setattr(kernels, "transformed", lambda: False)
            assert kernels.chosen(x, x, pays) == (mebibytes >= pays.without)
            assert kernels.chosen(x, x.clone().requires_grad_(), pays) == (mebibytes >= pays.backward)
            with torch.no_grad():
                assert kernels.chosen(x, x.clone().requires_grad_(), pays) == (mebibytes >= pays.without)
            assert not kernels.chosen(x, x, None)


def test_errors_say_what_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 3)
    with pytest.raises(EulernetError, match=r"mode\('fast'\) is not known; use one of 'auto', 'torch', 'triton'"):
        kernels.mode("fast")  # type: ignore[arg-type]
    with pytest.raises(EulernetError, match=r"activation='tanh' is not known; use None, 'relu', 'silu', 'gelu'"):
        euler_step(x, x, 0.1, activation="tanh")  # type: ignore[arg-type]
    with pytest.raises(EulernetError, match=r"drop_path=1.5 is not a probability in \[0, 1\)"):
        euler_step(x, x, 0.1, drop_path=1.5)
    with pytest.raises(EulernetError, match="kind='batch_norm' is not known"):
        euler_step_norm(x, x, 0.1, kind="batch_norm")  # type: ignore[arg-type]
    with pytest.raises(EulernetError, match="rms_norm has no bias"):
        euler_step_norm(x, x, 0.1, bias=torch.ones(3), kind="rms_norm")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with kernels.mode("triton"), pytest.raises(EulernetError, match="TRITON_INTERPRET=1 before Python starts"):
        euler_step(x, x, 0.1)


def test_where_triton_does_not_run_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a C compiler, for one; the original, which needs none, runs there too."""

    class Missing:
        @property
        def active(self) -> Any:
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("triton.runtime.driver", Missing())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernels._works.cache_clear()
    with pytest.warns(eulernet.EulernetWarning, match=r'C compiler.*mode\("torch"\)'):
        assert not kernels._works(0)
    assert not kernels._works(0)  # and says so once
    kernels._works.cache_clear()
    x = torch.ones(2**20, device=DEVICE)
    monkeypatch.setattr(kernels, "_works", lambda device: False)
    assert not kernels.chosen(x, x, kernels.ACTIVATION)


def test_every_kernel_compiles_for_a_gpu_with_accesses_of_16_bytes(tmp_path: Path) -> None:
    """The interpreter runs what the compiler might refuse. Compiling needs no GPU."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).parent / "ptx.py")]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    compiled = json.loads(output)
    assert {name for name, _, _ in compiled} == {
        name for name, value in vars(_device).items() if name[0] != "_" and hasattr(value, "fn")
    }
    for name, dtype, accesses in compiled:
        wide = [access for access in accesses if access.endswith(("v4.b32", "v2.b64"))]
        streams = 2 + (name.startswith("norm"))  # of those loaded, and as many stored but for one
        assert len([access for access in wide if access.startswith("ld")]) >= streams, (name, dtype, accesses)
        stored = any(access.startswith("st") for access in wide)
        assert stored or name == "sum_parts", (name, dtype, accesses)  # which stores no stream


def ptxas() -> Path:
    """NVIDIA's assembler, and beside it what reads its results."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


@pytest.mark.skipif(not ptxas().exists(), reason="needs the ptxas that the package triton carries")
def test_what_real_models_launch_fits_a_multiprocessor(tmp_path: Path) -> None:
    """Compiled for an H100: few registers, nothing spilled, accesses of 16 bytes, and sums in one wave of programs.

    Of two dtypes the wider one is accessed by 16 bytes.
    """
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    command = [sys.executable, str(Path(__file__).parent / "launched.py")]
    rows = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    kinds = {(row["model"].split(",")[0], row["training"], row["kernel"]) for row in rows}
    for model, training, kernel in (
        ("ResNet-50", False, "bn_forward"), ("ResNet-50", True, "step_backward"), ("ConvNeXt", True, "step_backward"),
        ("ViT", False, "norm_forward"), ("ViT", True, "norm_backward"), ("BERT", True, "norm_backward"),
        ("Llama", True, "norm_backward"), ("Llama", True, "sum_parts"),
    ):  # fmt: skip
        assert (model, training, kernel) in kinds
    assert {"bfloat16", "float32"} in [set(row.get("dtypes", [])) for row in rows]
    for row in rows:
        warps, registers = row["warps"], -(-row["registers"] // 8) * 8 * 32
        assert row["spilled"] == 0, row
        assert row["registers"] <= (120 if row["kernel"] == "norm_backward" else 64), row
        if "multiprocessors" in row:  # these go over several tiles, and none waits for a second wave
            together = min(65536 // (registers * warps), 64 // warps)
            assert row["programs"] <= row["multiprocessors"] * together, row
        for direction in {"ld", "st"} & row.keys():
            assert row[direction]["by vectors"] >= row[direction]["bytes"] > 0, row
    assert any("multiprocessors" in row for row in rows)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch, eulernet
from eulernet.functional import euler_step, euler_step_bn, euler_step_norm
x = torch.ones(2, 3)
assert euler_step(x, x, 0.5, activation="relu", layer_scale=x[0], drop_path=0.0).tolist() == [[1.5] * 3] * 2
assert euler_step_norm(x, x, 0.5)[0].tolist() == [[1.5] * 3] * 2
assert euler_step_bn(x, x, 0.5, x[0], x[0]).shape == (2, 3)
try:
    eulernet.kernels.mode("triton")
except eulernet.EulernetError as error:
    assert "pip install triton" in str(error)
else:
    raise AssertionError
"""


def test_without_triton_all_works() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_TRITON], check=True)


def test_importing_and_using_eulernet_on_the_cpu_does_not_import_triton() -> None:
    code = (
        "import sys, torch, eulernet; x = torch.ones(2)\n"
        "eulernet.functional.euler_step(x, x, 0.5, activation='relu')\n"
        "assert not any(name.partition('.')[0] == 'triton' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------------------------- walks


@pytest.mark.parametrize(
    ("shape", "stride", "small", "sizes", "axes"),
    [
        ((4, 5, 8), (40, 8, 1), (-1, -1), (1, 1, 160), (-1, -1)),
        ((4, 5, 8), (40, 8, 1), (2, -1), (1, 20, 8), (2, -1)),
        ((4, 5, 8), (40, 8, 1), (2, 0), (4, 5, 8), (2, 0)),
        ((4, 6, 3, 5), (90, 15, 5, 1), (1, -1), (4, 6, 15), (1, -1)),
        ((4, 6, 3, 5), (90, 1, 30, 6), (1, 0), (4, 15, 6), (2, 0)),
        ((4, 4, 8), (40, 8, 1), (-1, -1), (1, 4, 32), (-1, -1)),
        ((1, 6, 3, 5), (90, 15, 5, 1), (1, -2), (1, 6, 15), (1, -2)),
    ],
)
def test_walks(shape: Any, stride: Any, small: Any, sizes: Any, axes: Any) -> None:
    way = _layout.layout(shape, (stride, stride), small)
    assert way is not None
    assert ((way.outer, way.middle, way.inner), way.axes) == (sizes, axes)


def test_no_walk() -> None:
    assert _layout.layout((4, 8), ((8, 1), (1, 4)), (-1, -1)) is None  # one operand is transposed
    assert _layout.layout((4, 8), ((16, 2), (16, 2)), (-1, -1)) is None  # gaps
    assert _layout.layout((4, 8), ((8, 1), (8, 1)), (-3, -1)) is None  # scale has several dimensions


@pytest.mark.parametrize("rows", [1, 3, 4096])
@pytest.mark.parametrize("inner", [1, 7, 64, 96, 768, 3136, 2**20, 2**31 + 1])
def test_tiles(rows: int, inner: int) -> None:
    height, width = _layout._block(rows, inner)
    assert height & (height - 1) == 0 and width & (width - 1) == 0 and height * width <= _layout.TILE
    assert height >= min(rows, _layout.TILE // width) // 2 + 1 or height * width == _layout.TILE


def test_the_public_name() -> None:
    assert eulernet.kernels is kernels and kernels.__all__ == ["mode"]
