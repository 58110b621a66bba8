"""What a module computes, as far as a step can do it together with its addition, and whether calling it does more."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from eulernet import kernels
from eulernet._draws import Draws, entered

# Known by name, so that nothing is imported for them.
_BEFORE = {
    ("torch.nn.modules.linear", "Identity"): "identity",
    ("timm.layers.drop", "DropPath"): "drop path",
    ("timm.layers.layer_scale", "LayerScale"): "LayerScale",
    ("timm.layers.layer_scale", "LayerScale2d"): "LayerScale",
    ("timm.models.metaformer", "Scale"): "LayerScale",
    ("torchvision.ops.stochastic_depth", "StochasticDepth"): "drop path",
    ("torch.nn.modules.batchnorm", "BatchNorm1d"): "batch norm",
    ("torch.nn.modules.batchnorm", "BatchNorm2d"): "batch norm",
    ("torch.nn.modules.batchnorm", "BatchNorm3d"): "batch norm",
    ("timm.layers.norm_act", "BatchNormAct2d"): "batch norm",
}
_NORMS = {
    ("torch.nn.modules.normalization", "LayerNorm"): "layer_norm",
    ("torch.nn.modules.normalization", "RMSNorm"): "rms_norm",
    ("timm.layers.norm", "LayerNorm"): "layer_norm",
    ("timm.layers.norm", "RmsNorm"): "rms_norm",
}
DIMENSIONS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}


def before(module: Any) -> str | None:
    """What a module does to a branch that is about to be added, None where it is nothing that a step knows."""
    cls: Any = type(module)
    role = _role(cls, getattr(cls, "forward", None))
    if role == "batch norm" and not all([type(each) is nn.Identity for each in module._modules.values()]):
        return None  # with an activation or dropout of its own
    if role == "LayerScale" and {"lambda1", "gamma"} <= module._parameters.keys():
        return None  # which of them it would be
    return role


@lru_cache(maxsize=256)
def _role(cls: type, forward: Any) -> str | None:
    known = _BEFORE.get((cls.__module__, cls.__qualname__))
    if known is not None:
        return known
    return next((name for name in ("LayerScale", "DropPath") if _proven(cls, name)), None)


def after(module: Any) -> bool:
    """Whether a step can do what a module does to a sum."""
    return activation(module) is not None or norm(module) is not None


def activation(module: Any) -> str | None:
    """The name of an activation."""
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is nn.SiLU:
        return "silu"
    return "gelu" if type(module) is nn.GELU and module.approximate == "none" else None


class Norm(NamedTuple):
    """A norm over the last dimension, as `functional.euler_step_norm` takes it."""

    kind: str
    columns: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    written_out: bool = False  # in operations that autocast leaves alone, rounded to float32 at most
    shifted: bool = False  # its factor is 1 + weight, in float32, and the result has the state's dtype: Gemma

    @property
    def pays(self) -> kernels.Pays:
        """From which size on a kernel pays for it."""
        return _pays(None if self.written_out else self.kind)


def norm(module: Any) -> Norm | None:
    """What a module normalizes a new state with, None where it is no norm that a step knows."""
    cls: Any = type(module)
    kind = _norm(cls, getattr(cls, "forward", None))
    if kind is None:
        return None
    if kind in ("RMSNorm", "shifted RMSNorm"):
        shifted = kind == "shifted RMSNorm"
        weight, eps = held(module, "weight"), module.eps if shifted else module.variance_epsilon
        return Norm("rms_norm", weight.numel(), weight, None, eps, written_out=True, shifted=shifted)
    state = module.__dict__
    shape, eps = state["normalized_shape"], state["eps"]
    if len(shape) != 1 or state.get("_fast_norm", False) or eps is None:
        return None
    return Norm(kind, shape[0], held(module, "weight"), held(module, "bias") if kind == "layer_norm" else None, eps)


@lru_cache(maxsize=256)
def _norm(cls: type, forward: Any) -> str | None:
    """Which norm a class computes: by the names of torch's functions, or one of those that are written out."""
    kind = _NORMS.get((cls.__module__, cls.__qualname__))
    if kind is not None:  # the RmsNorm of timm before 1.0.13 divides by the variance
        return kind if cls.__module__.startswith("torch.") or _computes(cls, kind) else None
    return next((what for what in ("RMSNorm", "shifted RMSNorm") if _proven(cls, "RMSNorm", what)), None)


def pays(module: Any) -> kernels.Pays:
    """From which size on a kernel pays for this norm, if it is one that a step knows."""
    cls: Any = type(module)
    return _pays(_norm(cls, getattr(cls, "forward", None)))


def _pays(kind: str | None) -> kernels.Pays:
    if kind == "layer_norm":
        return kernels.LAYER_NORM
    return kernels.RMS_NORM if kind == "rms_norm" else kernels.WRITTEN_OUT


def held(module: nn.Module, name: str) -> Any:
    """`getattr(module, name)`, which looks for a parameter or buffer last, after all classes."""
    state = module.__dict__
    for kind in ("_parameters", "_buffers"):
        if name in state[kind] and name not in state:
            return state[kind][name]
    return getattr(module, name)


def _proven(cls: type, name: str, what: str = "") -> bool:
    """Whether a class of this name computes what those of Hugging Face and timm do, of which models have their own."""
    return cls.__name__.endswith(name) and issubclass(cls, nn.Module) and _computes(cls, what or name)


def _computes(cls: type[nn.Module], what: str) -> bool:
    """The proof: its forward, called once with a stand-in for the module that has no more than what is known."""
    x = torch.linspace(-2, 2, 64, device="cpu", dtype=torch.float32).view(16, 4)
    gamma, keep, eps = x[5], 0.75, 1e-3
    scales = {"lambda1": gamma, "gamma": gamma, "inplace": False}
    module: Any = SimpleNamespace(**scales, drop_prob=1 - keep, training=True, weight=gamma, variance_epsilon=eps)
    if what in _NORMS.values():
        module = SimpleNamespace(normalized_shape=(4,), weight=gamma, bias=gamma, eps=eps, _fast_norm=False)
    if what == "shifted RMSNorm":
        module = SimpleNamespace(weight=gamma, eps=eps)
        if callable(part := getattr(cls, "_norm", None)):
            module._norm = partial(part, module)
    expected: dict[str, Callable[[], Tensor]] = {
        "LayerScale": lambda: x * gamma,
        "DropPath": lambda: x.div(keep) * torch.rand(16, 1, device="cpu").add_(keep).floor_(),
        "RMSNorm": lambda: F.rms_norm(x, (4,), gamma, eps),
        "shifted RMSNorm": lambda: F.rms_norm(x, (4,), 1 + gamma, eps),
        "rms_norm": lambda: F.rms_norm(x, (4,), gamma, eps),
        "layer_norm": lambda: F.layer_norm(x, (4,), gamma, gamma, eps),
    }
    draws = Draws()
    with entered(draws), torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            result = cls.forward(module, x)
            if what == "shifted RMSNorm" and cls.forward(module, x.half()).dtype != torch.float16:
                return False
        except Exception:
            return False
        draws.seed(0)
        same = isinstance(result, Tensor) and result.shape == x.shape
        return same and torch.allclose(result, expected[what](), atol=1e-6)


def bare(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else."""
    state = module.__dict__
    return not (
        state["_forward_pre_hooks"]
        or state["_forward_hooks"]
        or state["_backward_pre_hooks"]
        or state["_backward_hooks"]
        or "forward" in state
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def gamma(module: Any) -> Tensor:
    """What a LayerScale multiplies with."""
    name = type(module).__name__
    if name == "Scale":
        return module.scale.view(module.shape)  # type: ignore[no-any-return]
    if name == "LayerScale2d":
        return module.gamma.view(1, -1, 1, 1)  # type: ignore[no-any-return]
    return module.lambda1 if hasattr(module, "lambda1") else module.gamma  # type: ignore[no-any-return]
