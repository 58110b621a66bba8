"""The residual step as a function, with what stands around it in one operation, for people's own models.

Each function is plain ATen, which any transform of PyTorch takes apart and `torch.compile` fuses; in eager mode on a
GPU a kernel of `eulernet.kernels` does the same in one pass over memory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import cache, reduce
from importlib import import_module
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from eulernet import kernels
from eulernet._checks import brief
from eulernet._errors import EulernetError
from eulernet.kernels._layout import apart, span

__all__ = ["Activation", "euler_step", "euler_step_bn", "euler_step_norm"]

Activation = Literal["relu", "silu", "gelu"]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}


def euler_step(
    skip: Tensor,
    branch: Tensor,
    h: float | Tensor,
    *,
    activation: Activation | None = None,
    layer_scale: Tensor | None = None,
    drop_path: float | Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One explicit Euler step, `activation(skip + h * drop_path * layer_scale * branch)`.

    Eq. (3) of *Towards Robust ResNet* (Zhang et al., IJCAI 2019), with LayerScale (Touvron et al., arXiv:2103.17239),
    stochastic depth (Huang et al., arXiv:1603.09382) and the activation of a ResNet's tail.

    Args:
        skip: the state x_n, of any shape.
        branch: F(x_n), of a shape that broadcasts with `skip`.
        h: the step factor: a number, a 0-d tensor, or a tensor that broadcasts with `branch`; it may require grad.
        activation: None, `"relu"`, `"silu"` or `"gelu"` (the exact one).
        layer_scale: a tensor that broadcasts with `branch`: of shape (C,) along the last dimension, of shape (C, 1, 1)
            along the channels of images (N, C, H, W). It may require grad.
        drop_path: a probability, with which each sample's branch is dropped, the rest scaled by 1 / (1 - probability),
            drawn as timm's `drop_path` draws it; or a mask that was drawn already, of shape (N, 1, ...).
        out: where to write the result, without grad only: `skip` or `branch` itself, or memory of its own.

    Returns:
        The new state, with the shape and dtype that `skip + h * drop_path * layer_scale * branch` has: a tensor of one
        dimension and more takes part in the promotion of dtypes, a 0-d one does not. 16-bit types are computed in fp32.

    Raises:
        EulernetError: an h that is no finite number, operands that are no tensors, an unknown activation, a probability
            outside [0, 1), `out` together with gradients, or one that overlaps itself or a part of `skip` or `branch`.

    Example:
        >>> import torch
        >>> euler_step(torch.tensor([1.0, 2.0]), torch.tensor([10.0, -30.0]), h=0.5)
        tensor([  6., -13.])
        >>> euler_step(torch.tensor([1.0, 2.0]), torch.tensor([10.0, -30.0]), h=0.5, activation="relu")
        tensor([6., 0.])
    """
    h = _checked(skip, branch, h, "euler_step")
    _check_activation(activation)
    mask = _mask(branch, layer_scale, drop_path)
    if out is not None:
        _check_out(out, skip, branch, h, layer_scale)
    if not isinstance(h, Tensor) and layer_scale is None and mask is None and skip.dtype == branch.dtype:
        dtype, number, scale = skip.dtype, h, None
    else:
        dtype = _promoted(skip, branch, layer_scale, mask, h if isinstance(h, Tensor) else None)
        number, scale = _factors(h, layer_scale, dtype, skip.device)
    plain = activation is None and scale is None and mask is None  # one kernel of ATen's
    pays = None if plain else kernels.ACTIVATION if scale is None and mask is None else kernels.LAYER_SCALE
    if kernels.chosen(skip, branch, pays):
        stepped: Tensor | None = _kernels("_step").step(skip, branch, number, scale, mask, activation, dtype, out)
        if stepped is not None:
            return stepped
    if plain:
        return torch.add(skip, branch, alpha=number, out=out) if out is not None else _add(skip, branch, number)
    state = _add(skip, branch, number, scale, mask)
    result = (state if activation is None else _ACTIVATIONS[activation](state)).to(dtype)
    return result if out is None else out.copy_(result)


def euler_step_norm(
    skip: Tensor,
    branch: Tensor,
    h: float | Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    kind: Literal["layer_norm", "rms_norm"] = "layer_norm",
    *,
    layer_scale: Tensor | None = None,
    drop_path: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step and the norm of the new state over its last dimension, for pre-norm transformers.

    Eq. (3) of *Towards Robust ResNet* (Zhang et al., IJCAI 2019), then Layer Normalization (Ba et al.,
    arXiv:1607.06450) or Root Mean Square Layer Normalization (Zhang and Sennrich, arXiv:1910.07467).

    Args:
        skip, branch: the state and F of it, of one shape (..., C).
        h: the step factor: a number, a 0-d tensor or one of shape (C,); it may require grad.
        weight, bias: of shape (C,), or None; `rms_norm` has no bias.
        eps: added to the variance, or to the mean of the squares.
        kind: `"layer_norm"` or `"rms_norm"`.
        layer_scale, drop_path: as for `euler_step`.

    Returns:
        The new state, and its norm as `torch.nn.functional.layer_norm` or `rms_norm` gives it, in their dtypes.

    Raises:
        EulernetError: an unknown kind, a bias for `rms_norm`, or a probability outside [0, 1).

    Example:
        >>> import torch
        >>> euler_step_norm(torch.tensor([1.0, 1.0]), torch.tensor([-4.0, 0.0]), h=0.5)
        (tensor([-1.,  1.]), tensor([-1.0000,  1.0000]))
    """
    h = _checked(skip, branch, h, "euler_step_norm")
    if kind not in ("layer_norm", "rms_norm"):
        raise EulernetError(f"kind={brief(kind)} is not known; use 'layer_norm' or 'rms_norm'")
    if kind == "rms_norm" and bias is not None:
        raise EulernetError("rms_norm has no bias; call euler_step_norm(..., bias=None, kind='rms_norm')")
    mask = _mask(branch, layer_scale, drop_path)
    dtype = _promoted(skip, branch, layer_scale, mask, h if isinstance(h, Tensor) else None)
    number, scale = _factors(h, layer_scale, dtype, skip.device)
    if kernels.chosen(skip, branch, kernels.LAYER_NORM if kind == "layer_norm" else kernels.RMS_NORM):
        autocast = torch.is_autocast_enabled(skip.device.type)
        given = (skip, branch, number, scale, mask, weight, bias, eps, kind, dtype, autocast)
        both: tuple[Tensor, Tensor] | None = _kernels("_norm").step_norm(*given)
        if both is not None:
            return both
    state = _add(skip, branch, number, scale, mask).to(dtype)
    if kind == "rms_norm":
        return state, F.rms_norm(state, state.shape[-1:], weight, eps)
    return state, F.layer_norm(state, state.shape[-1:], weight, bias, eps)


def euler_step_bn(
    skip: Tensor,
    branch: Tensor,
    h: float,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: Activation | None = None,
) -> Tensor:
    """The tail of a residual block that ends in batch norm, `activation(skip + h * batch_norm(branch))`.

    Eq. (3) of *Towards Robust ResNet* (Zhang et al., IJCAI 2019) with Batch Normalization (Ioffe and Szegedy,
    arXiv:1502.03167).

    Args:
        skip, branch: the state and F of it before its last norm, of one shape (N, C, ...).
        h: the step factor, a number.
        running_mean, running_var, weight, bias, training, momentum, eps: as for `torch.nn.functional.batch_norm`.
        activation: as for `euler_step`.

    Returns:
        The new state, in the dtype that `skip + batch_norm(branch)` has.

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0], [5.0]])
        >>> euler_step_bn(x, x, 0.5, torch.tensor([4.0]), torch.tensor([1.0]))
        tensor([[2.5000],
                [5.5000]])
    """
    h = _checked(skip, branch, h, "euler_step_bn")
    _check_activation(activation)
    if not training and kernels.chosen(skip, branch, kernels.BATCH_NORM):
        given = (skip, branch, h, running_mean, running_var, weight, bias, eps, activation)
        result: Tensor | None = _kernels("_bn").step_bn(*given)
        if result is not None:
            return result
    normed = F.batch_norm(branch, running_mean, running_var, weight, bias, training, momentum, eps)
    return euler_step(skip, normed, h, activation=activation)


@cache
def _kernels(name: str) -> Any:
    """A module of the kernels, which imports Triton."""
    return import_module(f"eulernet.kernels.{name}")


def _check_out(out: Tensor, skip: Tensor, branch: Tensor, h: float | Tensor, layer_scale: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(_differentiable(skip, branch, h, layer_scale)):
        raise EulernetError("out= has no gradient; call euler_step without it, or under torch.no_grad()")
    overlaps = torch._debug_has_internal_overlap(out) == 1
    if overlaps or any(_overlaps_partly(out, operand) for operand in (skip, branch)):
        what = "itself" if overlaps else "a part of an operand"
        raise EulernetError(f"out= overlaps {what}, whose elements are still to be read; call euler_step without it")


def _overlaps_partly(out: Tensor, operand: Tensor) -> bool:
    """What ATen refuses too: two dense tensors that share some of their memory, and are not the same."""
    known = all(kernels.plain(t) and t.device.type != "meta" and not t.is_complex() for t in (out, operand))
    return known and all(span(t) == t.nbytes for t in (out, operand)) and not apart(out, operand)


def _add(
    skip: Tensor, branch: Tensor, number: float, scale: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """`skip + number * scale * mask * branch` in one kernel, which computes in fp32 at least."""
    factors = [t for t in (scale, mask) if t is not None]
    if not factors:
        return torch.add(skip, branch, alpha=number)
    least = torch.promote_types(_promoted(skip, branch, *factors), torch.float32)
    factor = reduce(torch.mul, [t.to(least) for t in factors])
    single = factor.dim() == 0
    if single:
        factor = factor.view(1)  # else it would be rounded to the others' dtype
    if factor.requires_grad:
        branch = branch.to(least)  # else the gradient of the factor would be made of rounded products
    state = torch.addcmul(skip, branch, factor, value=number)
    return state.view(()) if single and skip.dim() == branch.dim() == 0 else state


def _factors(
    h: float | Tensor, layer_scale: Tensor | None, dtype: torch.dtype, device: torch.device
) -> tuple[float, Tensor | None]:
    """h and gamma as a number and a tensor."""
    if not isinstance(h, Tensor):
        return h, layer_scale
    if h.dim() == 0 and h.device != device:
        # An operator takes it from the CPU, addcmul and a kernel do not. Copied, the GPU would be waited for.
        h = torch.zeros((), dtype=h.dtype, device=device) + h
    if layer_scale is None:
        return 1.0, h
    least = torch.promote_types(dtype, torch.float32)
    return 1.0, h.to(least) * layer_scale.to(least)


def _checked(skip: Any, branch: Any, h: Any, caller: str) -> Any:
    """h, a finite number, also one that a compiler has made symbolic, or a tensor; the others are tensors."""
    if isinstance(skip, Tensor) and isinstance(branch, Tensor) and type(h) is float and math.isfinite(h):
        return h
    for name, operand in (("skip", skip), ("branch", branch)):
        if not isinstance(operand, Tensor):
            raise EulernetError(
                f"{name} must be a tensor, not {brief(operand)}; for example "
                f"eulernet.functional.{caller}(x, f(x), h=0.1)"
            )
    if isinstance(h, (Tensor, torch.SymFloat, torch.SymInt)):
        return h
    if isinstance(h, float) and math.isfinite(h):
        return h
    number = math.nan
    if isinstance(h, Real) and not isinstance(h, bool):
        with contextlib.suppress(OverflowError):
            number = float(h)
    if not math.isfinite(number):
        why = ", which is no finite float" if isinstance(h, Real) and not isinstance(h, bool) else ""
        raise EulernetError(
            f"h must be a number or a tensor, not {brief(h)}{why}; for example "
            f"eulernet.functional.{caller}(skip, branch, h=0.1)"
        )
    return number


def _check_activation(activation: Any) -> None:
    if activation is not None and not (isinstance(activation, str) and activation in _ACTIVATIONS):
        raise EulernetError(
            f"activation={brief(activation)} is not known; use None, {', '.join(map(repr, _ACTIVATIONS))}"
        )


def _mask(branch: Tensor, layer_scale: Tensor | None, drop_path: float | Tensor | None) -> Tensor | None:
    if drop_path is None or isinstance(drop_path, Tensor):
        return drop_path
    if not (isinstance(drop_path, Real) and 0 <= drop_path < 1):
        raise EulernetError(f"drop_path={brief(drop_path)} is not a probability in [0, 1); for example drop_path=0.1")
    if drop_path == 0:
        return None
    shape = (branch.shape[0],) + (1,) * (branch.dim() - 1)
    keep = 1 - drop_path
    return branch.new_empty(shape, dtype=_promoted(branch, layer_scale)).bernoulli_(keep).div_(keep)


def _promoted(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of a sum of products of floating tensors: 0-d ones count only where there are no others."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if len(dtypes) > 1:
        dtypes = {t.dtype for t in tensors if t is not None and t.dim()} or dtypes
    return dtypes.pop() if len(dtypes) == 1 else reduce(torch.promote_types, dtypes)


def _differentiable(*values: object) -> list[bool]:
    return [isinstance(v, Tensor) and v.requires_grad for v in values]
