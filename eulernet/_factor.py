"""The h of a step, and what a patched addition computes with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class StepFactor:
    """The h of one patched step: a number for eager mode, the same as a tensor for compiled graphs.

    A compiled graph takes the tensor as an input, so that a new value costs no recompilation. It is no buffer:
    `.half()` would round it, and it would appear in the `state_dict`.
    """

    def __init__(self, value: float, like: Tensor | None = None) -> None:
        self.value = value
        self.move(like)

    def move(self, like: Tensor | None) -> None:
        """Put the tensor where the parameters are, in float64: a tensor without dimensions widens no other's dtype."""
        device = torch.device("cpu") if like is None or like.device.type == "meta" else like.device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        with torch.inference_mode(False):  # else the tensor could not be written into later
            self.tensor = torch.tensor(self.value, device=device, dtype=dtype)

    def follow(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Go where `fn` puts the module's tensors, without being rounded to their dtype."""
        like = fn(torch.empty(0, dtype=self.tensor.dtype, device=self.tensor.device))
        if like.device != self.tensor.device:
            self.move(like)

    def set(self, value: float) -> None:
        self.value = value
        self.tensor.fill_(value)


def step(left: Any, right: Any, factor: StepFactor, skip_is_left: bool, alpha: float) -> Any:
    """`left + alpha * right` with the branch scaled; the result has the original's dtype and strides."""
    h: Any
    if torch.compiler.is_compiling():
        h = factor.tensor  # the number is not even read: a graph that saw it would be compiled again for another one
    else:
        h = factor.value
        if h == 1.0:
            return _add(left, right, alpha)
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            if skip_is_left:
                return torch.add(left, right, alpha=alpha * h)
            if alpha == 1 and left.stride() == right.stride():  # else the first operand decides the result's strides
                return torch.add(right, left, alpha=h)
    return _add(left, _scaled(right, left, h), alpha) if skip_is_left else _add(_scaled(left, right, h), right, alpha)


def _scaled(branch: Any, skip: Any, h: Any) -> Any:
    """`h * branch`, in the wider of the two dtypes, so that the product is not rounded before it is added."""
    if isinstance(branch, Tensor) and isinstance(skip, Tensor) and branch.dtype != skip.dtype:
        branch = branch.to(torch.promote_types(branch.dtype, skip.dtype))
    return branch * h


def _add(left: Any, right: Any, alpha: float) -> Any:
    if alpha == 1:
        return left + right
    return left - right if alpha == -1 else torch.add(left, right, alpha=alpha)


def step_in_place(left: Any, right: Any, factor: StepFactor, skip_is_left: bool, alpha: float) -> Any:
    """`left += alpha * right` with the branch scaled, written into `left`."""
    if torch.compiler.is_compiling():
        if skip_is_left:
            return left.add_(_scaled(right, left, factor.tensor), alpha=alpha)
        return left.mul_(factor.tensor).add_(right, alpha=alpha)
    h = factor.value
    if not isinstance(left, Tensor):
        return step(left, right, factor, skip_is_left, alpha)
    if skip_is_left:
        return left.add_(right, alpha=alpha * h)
    if h == 1.0:
        return left.add_(right, alpha=alpha)
    if alpha == 1 and left.dtype == right.dtype and not torch.is_grad_enabled():
        return torch.add(right, left, alpha=h, out=left)  # one pass; autograd does not allow out=
    return left.mul_(h).add_(right, alpha=alpha)


def scale(branch: Any, factor: StepFactor) -> Any:
    """The branch alone, scaled, for an augmented assignment to a slice or an attribute."""
    if torch.compiler.is_compiling():
        return branch * factor.tensor
    return branch if factor.value == 1.0 else branch * factor.value
