"""What a kernel keeps for the backward pass, gradients of gradients, and gradients of what moved."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eulernet import kernels
from eulernet.functional import euler_step, euler_step_norm
from tests.helpers.kernels import ACTIVATIONS, DEVICE, LAYOUTS, activations, check, eager_step, norms, our_step, random

pytest.importorskip("triton")

# The interpreter of Triton 3.6 makes numbers of arrays with one element. NumPy warns of it, and refuses it from 2.4 on.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


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


# ---------------------------------------------------------------------------- gradients of gradients, and of what moved


@activations
@pytest.mark.parametrize("scale", [None, (5,)], ids=str)
def test_gradients_of_gradients_pass_gradgradcheck(
    activation: str | None, scale: tuple[int, ...] | None, launches: list[str]
) -> None:
    inputs = [random(2, 5, dtype=torch.float64), random(2, 5, dtype=torch.float64)]
    inputs += [
        None if scale is None else random(*scale, dtype=torch.float64),
        random(2, 1, dtype=torch.float64, grad=False),
    ]
    with kernels.mode("triton"):
        assert torch.autograd.gradgradcheck(our_step(activation, 0.3), inputs)
    assert "step_forward" in launches


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_gradients_of_gradients_of_step_and_norm_pass_gradgradcheck(kind: str, launches: list[str]) -> None:
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
