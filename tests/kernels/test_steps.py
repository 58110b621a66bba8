"""The kernel of a step, against float64: on a GPU where there is one, else in Triton's interpreter.

The interpreter cuts a float32 off where a GPU rounds it to bfloat16: half a unit in the last place more, for which
`ROUNDING` allows.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from eulernet import EulernetError, kernels
from eulernet.functional import euler_step, euler_step_norm
from tests.helpers.kernels import (
    ACTIVATIONS,
    DEVICE,
    FLOATS,
    GPU,
    LAYOUTS,
    activations,
    check,
    dtypes,
    eager_step,
    norms,
    operands,
    our_step,
    random,
)

pytest.importorskip("triton")
from eulernet.kernels import _layout, _norm, _step
from eulernet.kernels._launch import Launch

# The interpreter of Triton 3.6 makes numbers of arrays with one element. NumPy warns of it, and refuses it from 2.4 on.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

SCALES: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "none": ((3, 5, 8), None),
    "one number": ((3, 5, 8), ()),
    "last dimension": ((3, 5, 24), (24,)),
    "many rows": ((700, 24), (24,)),
    "channels": ((3, 6, 4, 5), (6, 1, 1)),
    "few channels, one sample": ((1, 2, 3, 3), (2, 1, 1)),
    "samples": ((4, 6, 5), (4, 1, 1)),
}


# -------------------------------------------------------------------------------------------------- against float64


@activations
@pytest.mark.parametrize("masked", [False, True], ids=["", "drop path"])
@pytest.mark.parametrize("case", SCALES)
@dtypes
def test_a_step_is_as_near_to_float64_as_eager(
    activation: str | None, masked: bool, case: str, dtype: torch.dtype, launches: list[str]
) -> None:
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


@activations
@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_strides_are_kept_without_copies(activation: str | None, case: str, scaled: bool, launches: list[str]) -> None:
    shape, view = LAYOUTS[case]
    inputs: list[Tensor | None] = [view(random(*shape, grad=False)).requires_grad_() for _ in range(2)] + [None, None]
    if scaled:
        channels = inputs[0].shape[1] if len(shape) > 3 else inputs[0].shape[-1]
        inputs[2] = random(channels, *[1] * max(0, len(shape) - 2)) if len(shape) > 3 else random(channels)
    check(our_step(activation, 0.3), eager_step(activation, 0.3), inputs)
    assert launches == ["step_forward", "step_backward"]


@settings(max_examples=60, deadline=None)
@given(operands())
def test_any_shapes_strides_and_dtypes_give_what_eager_gives(
    case: tuple[list[Tensor | None], str | None, float],
) -> None:
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
def test_gradients_pass_gradcheck(activation: str | None, scale: tuple[int, ...] | None, launches: list[str]) -> None:
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


def test_a_reduction_over_many_tiles_gives_what_eager_gives(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_offsets_beyond_32_bits_are_reached(launches: list[str]) -> None:
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
def test_more_than_2_to_31_elements_are_reached(n: int) -> None:
    skip = torch.randn(n, dtype=torch.float16, device=DEVICE)
    branch = torch.randn(n, dtype=torch.float16, device=DEVICE)
    with kernels.mode("triton"):
        actual = euler_step(skip, branch, 0.5, activation="relu")
    expected = torch.add(skip, branch, alpha=0.5).relu_()
    assert torch.equal(actual[-(2**13) :], expected[-(2**13) :]) and torch.equal(actual[: 2**13], expected[: 2**13])
    assert (actual - expected).abs().max() <= 2**-9


def test_empty_tensors_stay_empty() -> None:
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
def test_out_is_written_into(mode: str, activation: str | None) -> None:
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
