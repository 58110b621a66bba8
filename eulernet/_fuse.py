"""What stands around a patched addition: LayerScale and drop path before it, the activation after it.

The rewriting hands their modules over instead of calling them. At each call it is decided anew: where a kernel is to
run (see `eulernet.kernels`) and no hook, replaced module or forward of its own would be skipped, they are part of the
step's one operation; else they are called as they were, in their order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from eulernet import _factor, kernels
from eulernet.functional import _factors, _mask, _promoted

# Known by name, so that timm is not imported for them.
_BEFORE = {
    ("torch.nn.modules.linear", "Identity"): "identity",
    ("timm.layers.drop", "DropPath"): "drop path",
    ("timm.layers.layer_scale", "LayerScale"): "LayerScale",
    ("timm.layers.layer_scale", "LayerScale2d"): "LayerScale",
}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def before(module: Any) -> str | None:
    """What a module does to a branch that is about to be added, None where it is nothing that a step knows."""
    return _BEFORE.get((type(module).__module__, type(module).__qualname__))


def after(module: Any) -> str | None:
    """The name of an activation."""
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is nn.SiLU:
        return "silu"
    return "gelu" if type(module) is nn.GELU and module.approximate == "none" else None


def _bare(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else."""
    state = vars(module)
    hooked = any(state.get(name) for name in _HOOKS) or _has_any_global_hook()  # type: ignore[no-untyped-call]
    return "forward" not in state and not hooked


class Later:
    """A branch before its LayerScale and drop path."""

    def __init__(self, branch: Tensor) -> None:
        self.branch = branch
        self.modules: list[nn.Module] = []
        self.scale: Tensor | None = None
        self.drop_path: nn.Module | None = None
        self.mask: Tensor | None = None

    def take(self, module: nn.Module) -> bool:
        """Put off one more module, if it can be part of the step."""
        role = before(module)
        if role is None or not _bare(module) or self.drop_path is not None:
            return False
        if role == "LayerScale":
            gamma: Any = module.gamma
            if self.scale is not None or not kernels.plain(gamma):
                return False
            self.scale = gamma.view(1, -1, 1, 1) if type(module).__name__ == "LayerScale2d" else gamma
        elif role == "drop path" and module.training:
            probability: Any = module.drop_prob
            if not (module.scale_by_keep and 0 < probability < 1):
                return False
            self.drop_path = module
        self.modules.append(module)
        return True

    def draw(self) -> Tensor | None:
        """The mask of the drop path, drawn once."""
        if self.mask is None and self.drop_path is not None:
            self.mask = _mask(self.branch, self.scale, self.drop_path.drop_prob)  # type: ignore[arg-type]
        return self.mask

    def run(self) -> Any:
        """What the modules give."""
        result: Any = self.branch
        for module in self.modules:
            result = result * self.mask if module is self.drop_path and self.mask is not None else module(result)
        return result


def later(module: Any, branch: Any) -> Any:
    """`module(branch)`, put off if a kernel may do it together with the addition."""
    if type(branch) is Later:
        return branch if branch.take(module) else module(branch.run())
    if not torch.compiler.is_compiling() and kernels.chosen(branch, branch):
        waiting = Later(branch)
        if waiting.take(module):
            return waiting
    return module(branch)


def step(
    activation: Any,
    left: Any,
    right: Any,
    h: float | Tensor,
    skip_is_left: bool,
    alpha: float,
    in_place: bool = False,
) -> Any:
    """`activation(left + alpha * right)` with the branch scaled, in one operation where that is possible."""
    if type(right) is Later and not skip_is_left:
        right = right.run()  # it is the skip
    if not torch.compiler.is_compiling():
        result = _fused(activation, left, right, h, skip_is_left, alpha, in_place)
        if result is not None:
            return result
    if type(right) is Later:
        right = right.run()
    add = _factor.step_in_place if in_place else _factor.step
    state = add(left, right, h, skip_is_left, alpha)
    return state if activation is None else activation(state)


def _fused(
    activation: Any,
    left: Any,
    right: Any,
    h: float | Tensor,
    skip_is_left: bool,
    alpha: float,
    in_place: bool,
) -> Tensor | None:
    waiting = right if type(right) is Later else None
    other = right if waiting is None else waiting.branch
    name = after(activation)
    if activation is not None and (name is None or not _bare(activation)):
        return None
    if not isinstance(h, Tensor) and h == 1 and (waiting is not None or name not in (None, "relu")):
        return None  # with h = 1 the bits are the original's: a kernel rounds once where several operations round each
    scale, drops = (None, False) if waiting is None else (waiting.scale, waiting.drop_path is not None)
    if not kernels.chosen(left, other, worth=name is not None or scale is not None or drops):
        return None
    if not skip_is_left and (alpha != 1 or left.stride() != other.stride()):
        return None  # the first operand decides the result's strides
    if in_place and (waiting is not None or left.dtype != other.dtype or isinstance(h, Tensor)):
        return None
    from eulernet.kernels import _step

    skip, branch = (left, other) if skip_is_left else (other, left)
    mask = None if waiting is None else waiting.draw()
    dtype = _promoted(skip, branch, scale, mask)
    number, scale = _factors(h, scale, dtype)
    return _step.step(skip, branch, alpha * number, scale, mask, name, dtype, left if in_place else None)
