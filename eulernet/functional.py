"""The residual step as a function, for people's own models."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["euler_step"]


def euler_step(skip: Tensor, branch: Tensor, h: float | Tensor) -> Tensor:
    """One explicit Euler step, `skip + h * branch`.

    Eq. (3) of *Towards Robust ResNet* (Zhang et al., IJCAI 2019).

    Args:
        skip: the state x_n, of any shape.
        branch: F(x_n), of a shape that broadcasts with `skip`.
        h: the step factor, a number or a 0-d tensor.

    Returns:
        The new state, with the shape and dtype that `skip + branch` has.

    Example:
        >>> import torch
        >>> euler_step(torch.tensor([1.0, 2.0]), torch.tensor([10.0, 10.0]), h=0.5)
        tensor([6., 7.])
    """
    if isinstance(h, Tensor):
        return skip + h * branch
    return torch.add(skip, branch, alpha=h)
