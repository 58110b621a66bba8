"""What a kernel gives, beside float64 and beside eager mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from eulernet import kernels
from eulernet.functional import euler_step, euler_step_norm

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


def random(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype).requires_grad_(grad)


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


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "channels_last": ((2, 8, 3, 4), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "without the first token": ((2, 5, 8), lambda x: x[:, 1:]),
    "half of the channels": ((2, 5, 16), lambda x: x[..., 8:]),
    "rows of an image": ((2, 8, 6, 4), lambda x: x[:, :, 2:5]),
    "channels_last, rows of an image": ((2, 8, 6, 4), lambda x: x.to(memory_format=torch.channels_last)[:, :, 2:5]),
    "tokens first": ((2, 5, 8), lambda x: x.transpose(0, 1)),
    "volumes": ((2, 3, 4, 2, 2), lambda x: x),
}


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


def norms(kind: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def ours(skip: Tensor, branch: Tensor, weight: Tensor | None, bias: Tensor | None, h: Tensor | None = None) -> Any:
        return euler_step_norm(skip, branch, 0.3 if h is None else h, weight, bias, 1e-5, kind)  # type: ignore[arg-type]

    def eager(skip: Tensor, branch: Tensor, weight: Tensor | None, bias: Tensor | None, h: Tensor | None = None) -> Any:
        state = skip + (0.3 if h is None else h) * branch
        if kind == "rms_norm":
            return state, F.rms_norm(state, state.shape[-1:], weight, 1e-5)
        return state, F.layer_norm(state, state.shape[-1:], weight, bias, 1e-5)

    return ours, eager
