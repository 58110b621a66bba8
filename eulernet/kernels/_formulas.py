"""The gradients of the kernels in ATen, which can be differentiated again, batched, and pushed forward.

They take the place of a kernel's backward where its result is to be differentiated (`create_graph=True`), where the
gradient that comes is none of plain numbers (`is_grads_batched=True`), and where Triton cannot make the kernel.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

Gradients = list[Tensor | None]


def of_sum(
    grad: Tensor, branch: Tensor | None, scale: Tensor | None, mask: Tensor | None, h: float,
    dtypes: tuple[torch.dtype, torch.dtype], wants: tuple[bool, bool, bool],
) -> Gradients:  # fmt: skip
    """Those of skip, branch and scale, from that of `skip + h * mask * scale * branch`."""
    results: Gradients = [grad.to(dtypes[0]) if wants[0] else None, None, None]
    unscaled = grad * h if mask is None else grad * h * mask
    if wants[1]:
        results[1] = (unscaled if scale is None else unscaled * scale).to(dtypes[1])
    if wants[2]:
        assert scale is not None and branch is not None
        results[2] = (unscaled * branch).sum_to_size(scale.shape).to(scale.dtype)
    return results


def of_activation(grad: Tensor, state: Tensor | None, out: Tensor | None, activation: str | None) -> Tensor:
    """That of the state, from that of `out = activation(state)`."""
    if activation is None:
        return grad
    if activation == "relu":
        assert out is not None
        return grad.masked_fill(out <= 0, 0)
    assert state is not None
    state = state.to(grad.dtype)
    if activation == "silu":
        s = state.sigmoid()
        return grad * (s * (1 + state * (1 - s)))
    density = (state.square() * -0.5).exp() * (1 / math.sqrt(2 * math.pi))
    return grad * (0.5 * (1 + (state * math.sqrt(0.5)).erf()) + state * density)


def of_norm(grad: Tensor, state: Tensor, weight: Tensor | None, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """That of the state, from that of its norm over the last dimension; and the norm without weight and bias."""
    state = state.to(grad.dtype)
    if centred:
        state = state - state.mean(-1, keepdim=True)
    rstd = (state.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = state * rstd
    if weight is not None:
        grad = grad * weight
    grad = grad - normed * (grad * normed).mean(-1, keepdim=True)
    if centred:
        grad = grad - grad.mean(-1, keepdim=True)
    return grad * rstd, normed


def wide(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the arithmetic: float32, or float64 where one of them is."""
    return reduce(torch.promote_types, [t.dtype for t in tensors if t is not None], torch.float32)
