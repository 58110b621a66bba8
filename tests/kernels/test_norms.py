"""The kernels of a step and the norm that follows it, or the batch norm before it, against float64."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eulernet import kernels
from eulernet.functional import euler_step_bn, euler_step_norm
from tests.helpers.kernels import ACTIVATIONS, DEVICE, GPU, ROUNDING, activations, check, dtypes, norms, random

pytest.importorskip("triton")
from eulernet.kernels import _device
from eulernet.kernels._launch import Launch

# The interpreter of Triton 3.6 makes numbers of arrays with one element. NumPy warns of it, and refuses it from 2.4 on.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


# ------------------------------------------------------------------------------------------------------- with a norm


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("affine", [False, True], ids=["", "affine"])
@pytest.mark.parametrize("shape", [(3, 5, 24), (50, 130), (2, 3, 2, 8), (7,), (3, 2500)], ids=str)
@dtypes
def test_a_step_with_a_norm_is_as_near_to_float64_as_eager(
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
def test_step_and_norm_of_which_one_output_is_used_makes_no_zeros(
    kind: str, output: int, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_layer_scale_and_drop_path_go_into_step_and_norm(
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
def test_gradients_of_step_and_norm_pass_gradcheck(kind: str, launches: list[str]) -> None:
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
def test_a_step_with_batch_norm_is_as_near_to_float64_as_eager(
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
