"""What stands around a patched addition: batch norm, LayerScale, drop path before it, an activation or norm after it.

The rewriting hands their modules over instead of calling them; `eulernet._find.surroundings` finds them. At each call
it is decided anew: where a kernel is to run (see `eulernet.kernels`) and no hook, replaced module or forward of its own
would be skipped, they are part of the step's one operation; else they are called as they were, in their order. With
h = 1 the bits are the original's, so nothing is put off: a kernel rounds once where several operations round each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eulernet import kernels
from eulernet._errors import EulernetError
from eulernet._run.factor import StepFactor, scaled_add, scaled_add_
from eulernet._run.known import DIMENSIONS, Norm, activation, bare, before, gamma, held, norm, pays
from eulernet.functional import _factors, _mask, _promoted

_GIVEN = "_euler_given"  # of a tensor, what the next block's norm makes of it

# ---- before the addition


class DeferredBranch:
    """A branch, and what is yet to be done to it."""

    norm: tuple[Any, ...] | None = None  # statistics, weight, bias and eps of batch norm
    scale: Tensor | None = None
    mask: Tensor | None = None
    number = 1.0  # by which the branch is multiplied too
    result: Any = None

    def __init__(self, branch: Tensor) -> None:
        self.branch = branch
        self.version = _version(branch)
        self.calls: list[Callable[[Any], Any]] = []

    def take(self, module: Any, role: str | None) -> bool:
        """Put off one more module, which does this to a branch, if it can be part of the step."""
        if role is None or (self.mask is not None and role != "LayerScale") or not bare(module):
            return False
        if role == "batch norm":
            return self._take_norm(module)
        if role == "LayerScale":
            return self.multiply(gamma(module), module)
        return role == "identity" or self._take_drop_path(module, role)

    def multiply(self, gamma: Tensor, call: Callable[[Any], Any]) -> bool:
        """Put off the multiplication with gamma, which `call` does."""
        if self.scale is not None or self.norm is not None or not isinstance(gamma, Tensor):
            return False
        self.scale = gamma
        self.calls.append(call)
        return True

    def _take_norm(self, module: Any) -> bool:
        dimensions = DIMENSIONS.get(type(module), (4,))
        if (
            self.calls
            or module.training
            or self.branch.dim() not in dimensions
            or not all([bare(each) for each in module._modules.values()])
        ):
            return False
        small = tuple([held(module, name) for name in ("running_mean", "running_var", "weight", "bias")])
        if small[0] is None:
            return False
        if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in (self.branch, *small)]):
            return False
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(self.branch.dim(), torch.contiguous_format)
        if not (self.branch.is_contiguous() or self.branch.is_contiguous(memory_format=last)):
            return False  # what batch norm makes of it would have other strides
        self.norm = (*small, module.eps)
        self.calls.append(module)
        return True

    def _take_drop_path(self, module: Any, role: str) -> bool:
        """Its mask is drawn here, where the original draws it."""
        probability: float = module.p if hasattr(module, "p") else module.drop_prob
        if not module.training or probability == 0:
            return True
        if self.norm is not None or not (
            0 < probability < 1 and getattr(module, "scale_by_keep", True) and getattr(module, "mode", "row") == "row"
        ):
            return False
        if role == "drop path":
            mask = _mask(self.branch, self.scale, probability)
            self.calls.append(lambda branch: branch * mask)
        else:
            keep = 1 - probability
            shape = (self.branch.shape[0],) + (1,) * (self.branch.dim() - 1)
            mask = torch.rand(shape, dtype=_promoted(self.branch, self.scale), device=self.branch.device)
            mask.add_(keep).floor_()
            self.number = 1 / keep  # not in the mask, whose dtype may have few digits
            self.calls.append(lambda branch: branch.div(keep) * mask)
        self.mask = mask
        return True

    def unchanged(self) -> Tensor:
        """The branch."""
        if self.version != _version(self.branch):
            first = self.calls[0]
            name = type(first).__name__ if isinstance(first, nn.Module) else "LayerScale or drop path"
            raise EulernetError(
                f"the input of a residual branch's {name}, of shape {tuple(self.branch.shape)}, was modified in place "
                'before the addition, with which eulernet runs it; call eulernet.kernels.mode("torch")'
            )
        return self.branch

    def run(self) -> Any:
        """What the modules give."""
        if self.result is None:
            result: Any = self.unchanged()
            for call in self.calls:
                result = call(result)
            self.result = result
        return self.result


def _version(tensor: Tensor) -> int:
    """How often it was written into; in inference mode nobody counts, and what the source shows must do."""
    return 0 if tensor.is_inference() else tensor._version


def _waiting(branch: Tensor, factor: Any, pays: kernels.Pays) -> DeferredBranch | None:
    """A branch to put something off for, None where nothing is put off. Whether a kernel runs the step decides."""
    if isinstance(factor, StepFactor) and factor.value == 1:
        return None
    return DeferredBranch(branch) if kernels.possible(branch, pays) else None


def may_defer(branch: Any) -> bool:
    """Whether something may be put off that is done to a branch."""
    return type(branch) is DeferredBranch or kernels.possible(branch, kernels.LAYER_SCALE) is not None  # pays first


def defer(module: Any, branch: Any, factor: Any) -> Any:
    """`module(branch)`, put off if a kernel may do it together with the addition of this step factor."""
    if type(branch) is DeferredBranch:
        return branch if branch.take(module, before(module)) else defer(module, branch.run(), factor)
    role = before(module)
    if role is None or role == "identity" or (role != "LayerScale" and module.training == (role == "batch norm")):
        return module(branch)  # there is nothing to put off: drop path does nothing in inference
    waiting = _waiting(branch, factor, kernels.BATCH_NORM if role == "batch norm" else kernels.LAYER_SCALE)
    return waiting if waiting is not None and waiting.take(module, role) else module(branch)


def defer_mul(left: Any, right: Any, gamma_first: bool, factor: Any) -> Any:
    """`left * right`, one of which is gamma, put off likewise."""
    branch, gamma = (right, left) if gamma_first else (left, right)
    waiting = branch if type(branch) is DeferredBranch else None
    if waiting is None and kernels.possible(branch, kernels.LAYER_SCALE):
        waiting = _waiting(branch, factor, kernels.LAYER_SCALE)
    if waiting is None:
        return left * right
    product = partial(_times, gamma=gamma, gamma_first=gamma_first)
    return waiting if waiting.multiply(gamma, product) else product(materialize(branch))


def _times(branch: Any, gamma: Any, gamma_first: bool) -> Any:
    return gamma * branch if gamma_first else branch * gamma


def materialize(value: Any) -> Any:
    """The tensor that a branch that may wait stands for."""
    return value.run() if type(value) is DeferredBranch else value


# ---- the addition, and what comes after it


def step(
    then: Any,
    left: Any,
    right: Any,
    h: float | Tensor,
    skip_is_left: bool,
    alpha: float,
    in_place: bool = False,
) -> Any:
    """`then(left + alpha * right)` with the branch scaled, in one operation where that is possible."""
    skip, branch = (materialize(left), right) if skip_is_left else (materialize(right), left)
    if kernels.possible(skip, kernels.ACTIVATION) and (known := _known(then)):  # which pays first of all but norms
        result = _fused(*known, skip, branch, h, skip_is_left, alpha, in_place)
        if result is None and type(branch) is DeferredBranch:
            branch = materialize(branch)
            result = _fused(*known, skip, branch, h, skip_is_left, alpha, in_place)
        if result is not None:
            return result[-1]
    left, right = (skip, materialize(branch)) if skip_is_left else (materialize(branch), skip)
    state = (scaled_add_ if in_place else scaled_add)(left, right, h, skip_is_left, alpha)
    return state if then is None else then(state)


def _known(then: Any) -> tuple[str | None, Norm | None] | None:
    """What comes after an addition, an activation or a norm, maybe nothing; None where no kernel does it."""
    if then is None:
        return None, None
    name = activation(then)
    after = norm(then) if name is None else None
    return (name, after) if (name is not None or after is not None) and bare(then) else None


class PrecomputedNorm:
    """The norm of a state, or its activation, computed together with it."""

    def __init__(self, module: nn.Module, state: Tensor, normed: Tensor) -> None:
        self.module = module
        self.state: Tensor | None = state
        self.normed: Tensor | None = normed

    def of(self, state: Any) -> Tensor | None:
        """That of a state, if it is that state or holds its rows in another shape."""
        mine, normed = self.state, self.normed
        if mine is state or mine is None or normed is None:
            return normed
        if type(state) is not type(mine) or not (state.is_contiguous() and mine.is_contiguous()):
            return None
        rows = state.shape[-1:] == mine.shape[-1:] and state.numel() == mine.numel() and normed.is_contiguous()
        return normed.view(state.shape) if rows and state.data_ptr() == mine.data_ptr() else None


def add_norm(
    owner: Any, name: str, left: Any, right: Any, h: float | Tensor, skip_is_left: bool, alpha: float
) -> tuple[Any, PrecomputedNorm | None]:
    """`left + alpha * right` with the branch scaled, and the owner's norm of it if one operation does both."""
    skip, branch = (materialize(left), right) if skip_is_left else (materialize(right), left)
    if kernels.possible(skip, kernels.WRITTEN_OUT):  # which pays first
        module: Any = getattr(owner, name, None)
        both = None
        if kernels.possible(skip, pays(module)) and (known := _known(module)):
            both = _fused(*known, skip, branch, h, skip_is_left, alpha)
        if both is not None:  # of an activation only its result, which nobody reads before it is asked for
            return both[0], PrecomputedNorm(module, both[0], both[-1])
    return step(None, left, right, h, skip_is_left, alpha), None


def take_norm(module: Any, state: Any, known: PrecomputedNorm | None) -> Any:
    """`module(state)`, which may be known already: since the addition nothing was called."""
    if known is not None and known.module is module:
        result = known.of(state)
        known.state, known.normed = None, None  # it is not kept longer than the original's
        if result is not None and (result is state or bare(module)):
            return result
    return module(state)


# ---- the norm that the next block begins with


class GivenNorm:
    """What the next block's norm makes of a state, on its way with it: an attribute of the tensor.

    In inference only, and where writes into a tensor are counted: else who holds the state between the blocks may
    differentiate by it, or change it unseen.
    """

    def __init__(self, module: nn.Module, state: Tensor, normed: Tensor) -> None:
        self.module, self.normed, self.version = module, normed, state._version
        self.autocast = _autocast(state)

    def of(self, module: Any, state: Tensor) -> Tensor | None:
        """What this module makes of the state as it is now, if that is known."""
        fits = self.module is module and self.version == state._version and self.autocast == _autocast(state)
        return self.normed if fits and _counted(state) and bare(module) else None

    def __reduce__(self) -> Any:
        return type(None), ()  # it is not kept with a tensor that is


def may_norm(left: Any, right: Any) -> bool:
    """Whether the sum of these may take a norm along."""
    if torch.is_grad_enabled():
        return False
    return any([kernels.possible(each, kernels.WRITTEN_OUT) for each in (left, right)])  # which pays first


def _counted(state: Tensor) -> bool:
    return not torch.is_grad_enabled() and not state.is_inference()


def _autocast(state: Tensor) -> tuple[bool, torch.dtype]:
    kind = state.device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def step_and_norm(
    owner: Any, module: nn.Module, left: Any, right: Any, h: float | Tensor, skip_is_left: bool, alpha: float
) -> Any:
    """`left + alpha * right` with the branch scaled; the norm that the next block calls goes with it, if one operation
    does both."""
    skip, branch = (materialize(left), right) if skip_is_left else (materialize(right), left)
    if kernels.possible(skip, pays(module)) and type(skip) is Tensor and _counted(skip) and bare(owner):
        after = norm(module) if bare(module) else None
        if after is not None and all([t is None or t.untyped_storage().nbytes() for t in (after.weight, after.bias)]):
            both = _fused(None, after, skip, branch, h, skip_is_left, alpha)
            if both is not None:
                both[0].__dict__[_GIVEN] = GivenNorm(module, *both)
                return both[0]
    return step(None, left, right, h, skip_is_left, alpha)


def take_given(module: Any, state: Any) -> Any:
    """`module(state)`, which may have come with the state."""
    if type(state) is Tensor and kernels.possible(state, kernels.WRITTEN_OUT):  # which pays first
        given = state.__dict__.pop(_GIVEN, None)
        normed = None if given is None else given.of(module, state)
        if normed is not None:
            return normed
    return module(state)


def _fused(
    name: str | None,
    after: Norm | None,
    skip: Any,
    branch: Any,
    h: float | Tensor,
    skip_is_left: bool,
    alpha: float,
    in_place: bool = False,
) -> tuple[Tensor, ...] | None:
    """The new state after an activation, or the one before and the one after a norm; None where no kernel does that."""
    waiting = branch if type(branch) is DeferredBranch and branch.result is None else None
    scale, mask, number, batch_norm = None, None, 1.0, None
    if waiting is not None:
        branch = waiting.branch
        scale, mask, number, batch_norm = waiting.scale, waiting.mask, waiting.number, waiting.norm
    worth = kernels.ACTIVATION if name is not None else None  # without, one kernel of ATen's does the same
    if batch_norm is not None:
        worth = kernels.BATCH_NORM
    elif after is not None:
        worth = after.pays
    elif scale is not None or mask is not None or isinstance(h, Tensor):
        worth = kernels.LAYER_SCALE
    if not kernels.chosen(skip, branch, worth):
        return None
    if not isinstance(h, Tensor) and h == 1 and (waiting is not None or name not in (None, "relu") or after):
        return None
    if not skip_is_left and (alpha != 1 or skip.stride() != branch.stride()):
        return None  # the first operand decides the result's strides
    dtype = _promoted(skip, branch, scale, mask)
    out = None
    if in_place and waiting is not None and not skip_is_left:
        if _promoted(branch, scale, mask) != dtype:
            return None  # what waits has its own dtype, and would be written into
    elif in_place:
        if waiting is not None or after is not None or skip.dtype != branch.dtype or isinstance(h, Tensor):
            return None
        out = skip if skip_is_left else branch
    if waiting is not None:
        waiting.unchanged()
    if batch_norm is not None:
        if isinstance(h, Tensor) or after is not None:
            return None
        from eulernet.kernels import _bn

        mean, var, weight, bias, eps = batch_norm
        result = _bn.step_bn(skip, branch, alpha * h, mean, var, weight, bias, eps, name)
        return None if result is None else (result,)
    factor, scale = _factors(h, scale, dtype, skip.device)
    factor *= alpha * number
    if after is not None:
        return _step_norm(after, skip, branch, factor, scale, mask, dtype)
    from eulernet.kernels import _step

    result = _step.step(skip, branch, factor, scale, mask, name, dtype, out)
    return None if result is None else (result,)


def _step_norm(
    known: Norm, skip: Tensor, branch: Tensor, h: float, scale: Tensor | None, mask: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    if skip.dim() == 0 or skip.shape[-1] != known.columns:
        return None
    from eulernet.kernels import _norm

    if known.written_out and dtype == torch.float64:
        return None
    autocast = not known.written_out and torch.is_autocast_enabled(skip.device.type)
    weight = 1 + known.weight.float() if known.shifted and known.weight is not None else known.weight
    affine = weight, known.bias, known.eps, known.kind
    return _norm.step_norm(skip, branch, h, scale, mask, *affine, dtype, autocast, wide_weight=known.shifted)
