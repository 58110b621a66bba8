"""The h of a step, and what a patched addition computes with it."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _disable_current_modes

from eulernet._commit import Change, Set, Write
from eulernet._errors import EulernetError, EulernetWarning


class StepFactor:
    """The h of one patched step: a number for eager mode, the same as a tensor for compiled graphs.

    A compiled graph takes the tensor as an input, so that a new value costs no recompilation. It is no buffer:
    `.half()` would round it, and it would appear in the `state_dict`.
    """

    scheduled = False  # whether an HScheduler moves it
    traced = False  # whether a graph of torch.fx has been made since it was set, which holds it as a number

    def __init__(self, value: float, like: Tensor | None = None) -> None:
        self.value = value
        self.move(like)

    def move(self, like: Tensor | None) -> None:
        """Put the tensor where the parameters are, in float64: a tensor without dimensions widens no other's dtype."""
        device = torch.device("cpu") if like is None or like.device.type == "meta" else like.device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        # Else the tensor could not be written into later, or had no value.
        with torch.inference_mode(False), _disable_current_modes():
            self.tensor = torch.tensor(self.value, device=device, dtype=dtype)

    def to_device_of(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Go where `fn` puts the module's tensors, without being rounded to their dtype."""
        like = fn(torch.empty(0, dtype=self.tensor.dtype, device=self.tensor.device))
        if like.device != self.tensor.device:
            self.move(like)

    def set(self, value: float) -> list[Change]:
        """The changes that give it another value."""
        return [Write(self.tensor, lambda tensor: tensor.fill_(value)), Set(self, {"value": value, "traced": False})]

    def current(self, module: Any, operand: Any = None) -> float | Tensor:
        """What the additions of a forward use: the tensor where a graph is compiled, else the number."""
        if torch.compiler.is_compiling():
            return self.tensor  # the number is not even read: a graph that saw it would be compiled again for another
        if type(operand) is Proxy:
            self.traced = True
        return self.value

    def bound_to(self, module: Any) -> StepFactor:
        return self

    @property
    def saved(self) -> float | str:
        """What stands for it beside the weights."""
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.4g}"


class UnsettledFactor(StepFactor):
    """The h of a layer of `eulernet.nn` that was given "auto", before the model that holds it is patched: none."""

    def __init__(self) -> None:
        """It has no number and no tensor."""

    @property
    def value(self) -> float:  # type: ignore[override]
        raise EulernetError(
            'the model holds layers of eulernet.nn with h="auto", which depends on the whole of it and is not settled '
            'yet; call eulernet.patch(model, h="auto", example_inputs=...) once'
        )

    @property
    def saved(self) -> str:
        return str(self)

    def current(self, module: Any, operand: Any = None) -> float | Tensor:
        return self.value

    def to_device_of(self, fn: Callable[[Tensor], Tensor]) -> None:
        """There is nothing to move."""

    def __str__(self) -> str:
        return "auto"


class LearnedFactor:
    """The h of one patched step as a parameter of its module, h = exp(log_h), which is positive whatever is learned.

    It keeps the parameter's name and not the parameter: whoever exchanges the parameters of a module
    (`functional_call`, the replicas of `DataParallel`, FSDP) exchanges this one too. `at` a module it has a `value`
    to read and to `set`.
    """

    noticed = False  # whether it was said that it is frozen

    def __init__(self, name: str, module: Any = None) -> None:
        self.name = name
        self.module = module

    def current(self, module: Any, operand: Any = None) -> Tensor:
        log_h: Tensor = getattr(module, self.name)
        if type(log_h) is nn.Parameter and not log_h.requires_grad and not torch.compiler.is_compiling():
            self._notice_frozen(module)
        return log_h.exp().squeeze(0)  # without dimensions it takes part in no broadcast, and promotes no dtype

    def _notice_frozen(self, module: Any) -> None:
        """PEFT freezes what is there before it. Who freezes h alone, or without PEFT, means it."""
        if "peft" not in sys.modules or self.noticed or not module.training or not torch.is_grad_enabled():
            return
        adapted = any(type(inner).__module__.startswith("peft.tuners") for inner in module.modules())
        if adapted or not any(parameter.requires_grad for parameter in module.parameters()):
            self.noticed = True
            warnings.warn(
                f"{type(module).__name__} has an h that is learned, and frozen: PEFT freezes what is there before it. "
                "Patch after it: eulernet.patch(get_peft_model(model, config), h=0.1, trainable=True); or keep h as it "
                "is: eulernet.patch(model, h=eulernet.steps(model))",
                EulernetWarning,
                stacklevel=2,
            )

    def bound_to(self, module: Any) -> LearnedFactor:
        return LearnedFactor(self.name, module)

    def to_device_of(self, fn: Callable[[Tensor], Tensor]) -> None:
        """The module has moved the parameter with all others."""

    @property
    def saved(self) -> str:
        """Its value is among the weights."""
        return self.name

    @property
    def parameter(self) -> nn.Parameter:
        parameter: nn.Parameter = getattr(self.module, self.name)
        return parameter

    def _check_readable(self) -> None:
        """FSDP's flat parameters have no storage of their own, and a parametrization computes anew what is read."""
        parameter = getattr(self.module, self.name)
        if type(parameter) is not nn.Parameter and isinstance(parameter, Tensor) and _is_freed(parameter):
            raise EulernetError(
                f"the step factor is learned, and FSDP keeps its parameter {self.name} in a flat one, where it cannot "
                "be read. Patch and wrap with use_orig_params=True, or look at it inside "
                "FullyShardedDataParallel.summon_full_params(model): eulernet.steps(model)"
            )

    @property
    def value(self) -> float:
        self._check_readable()
        with _disable_current_modes():  # one of the caller's may have no values
            return self._value()

    def _value(self) -> float:
        whole = getattr(self.parameter, "full_tensor", lambda: self.parameter)()  # FSDP2 keeps a part of it
        if whole.device.type == "meta":
            raise EulernetError(
                f"the step factor is learned, and its parameter {self.name} is on the meta device: it has no value"
            )
        return float(torch.tensor(whole.item(), dtype=torch.float64).exp())  # infinite, not an error, where it diverged

    def set(self, value: float) -> list[Change]:
        """The changes that give it another value."""
        self._check_readable()
        if parametrize.is_parametrized(self.module, self.name):
            raise EulernetError(
                f"{self.name} of {type(self.module).__name__} is parametrized: what it is given is not what it gives. "
                "Take that off, set h, and put it on again: "
                f'torch.nn.utils.parametrize.remove_parametrizations(module, "{self.name}")'
            )
        return [Write(self.parameter, lambda parameter: parameter.fill_(math.log(value)))]

    @property
    def readable(self) -> bool:
        """Others cannot be read, or not by one process alone."""
        return type(self.parameter) is nn.Parameter and self.parameter.device.type != "meta"

    def __str__(self) -> str:
        return f"{self.value:.4g}" if self.readable else f"exp({self.name})"


class HeldFactor:
    """The h of a step as it was when a function began that adds to it more than once: the same in all additions."""

    def __init__(self, factor: StepFactor | LearnedFactor, h: float | Tensor) -> None:
        self.factor = factor
        self.h = h

    def current(self, module: Any, operand: Any = None) -> float | Tensor:
        if type(operand) is Proxy:
            self.factor.current(module, operand)  # which keeps in mind that a graph is made
        return self.h


def _is_freed(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and tensor.numel() > 0 and tensor.untyped_storage().size() == 0


def scaled_add(left: Any, right: Any, h: float | Tensor, skip_is_left: bool, alpha: float) -> Any:
    """`left + alpha * right` with the branch scaled; the result has the original's dtype and strides."""
    if isinstance(h, float):
        if h == 1.0:
            return _add(left, right, alpha)
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            if skip_is_left:
                return torch.add(left, right, alpha=alpha * h)
            if alpha == 1 and left.stride() == right.stride():  # else the first operand decides the result's strides
                return torch.add(right, left, alpha=h)
    if is_begun(left, right):
        return _add(left, right, alpha)
    return _add(left, _scaled(right, left, h), alpha) if skip_is_left else _add(_scaled(left, right, h), right, alpha)


def is_begun(left: Any, right: Any) -> bool:
    """Whether a running sum begins here, at a number: nothing is added to a state yet."""
    # No `int | float`, which Dynamo of torch 2.8 cannot trace.
    return isinstance(left, (int, float)) or isinstance(right, (int, float))


def _scaled(branch: Any, skip: Any, h: Any) -> Any:
    """`h * branch`, in the wider of the two dtypes, so that the product is not rounded before it is added."""
    if isinstance(branch, Tensor) and isinstance(skip, Tensor) and branch.dtype != skip.dtype:
        branch = branch.to(torch.promote_types(branch.dtype, skip.dtype))
    return branch * h


def _add(left: Any, right: Any, alpha: float) -> Any:
    if alpha == 1:
        return left + right
    return left - right if alpha == -1 else torch.add(left, right, alpha=alpha)


def scaled_add_(left: Any, right: Any, h: float | Tensor, skip_is_left: bool, alpha: float) -> Any:
    """`left += alpha * right` with the branch scaled, written into `left`."""
    if not isinstance(left, Tensor):
        return scaled_add(left, right, h, skip_is_left, alpha)
    if not isinstance(h, float):
        if skip_is_left:
            return left.add_(_scaled(right, left, h), alpha=alpha)
        return left.mul_(h).add_(right, alpha=alpha)  # for a learned h autograd keeps a copy of the branch
    if skip_is_left:
        return left.add_(right, alpha=alpha * h)
    if h == 1.0:
        return left.add_(right, alpha=alpha)
    if alpha == 1 and left.dtype == right.dtype and not torch.is_grad_enabled():
        return torch.add(right, left, alpha=h, out=left)  # one pass; autograd does not allow out=
    return left.mul_(h).add_(right, alpha=alpha)


def scaled_difference(total: Any, skip: Any, h: float | Tensor) -> Any:
    """`s + h * (y - s)` of a sum `y = s + f` that is made as it was: y itself, to the bit, where h is 1."""
    if isinstance(h, float):
        if h == 1.0:
            return total
        if total.dtype == skip.dtype and total.shape == skip.shape and total.stride() == skip.stride():
            return torch.lerp(skip, total, h)
    return (total + (total - skip) * (h - 1)).to(total.dtype)


def scale(branch: Any, h: float | Tensor) -> Any:
    """The branch alone, scaled, for an augmented assignment to a slice or an attribute."""
    return branch if isinstance(h, float) and h == 1.0 else branch * h
