"""One rule each for what a caller may hand over: a positive number, a whole number, a model."""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from eulernet._errors import EulernetError
from eulernet._step import ROOT


def positive(value: Any, what: str, example: str) -> float:
    """A positive, finite number of Python, NumPy or torch, or an error that says what must be one."""
    try:
        number = math.nan if _is_no_number(value) else float(value)
    except Exception:  # what `__float__` of anybody's class raises
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise EulernetError(f"{what} must be a positive, finite number, not {brief(value)}; for example {example}")
    return number


def whole_number(value: Any, what: str, example: str, least: int = 0, most: int | None = None) -> int:
    """A whole number of Python or NumPy within bounds, or an error that says what must be one."""
    try:
        number = least - 1 if _is_no_number(value) else operator.index(value)
    except Exception:
        number = least - 1
    if number < least or (most is not None and number > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise EulernetError(f"{what} must be a whole number, {bounds}, not {brief(value)}; for example {example}")
    return number


def truth(value: Any, what: str) -> bool:
    """True or False, or an error that says what must be one."""
    if not isinstance(value, bool):
        raise EulernetError(f"{what} must be True or False, not {brief(value)}; for example {what}=True")
    return value


def _is_no_number(value: Any) -> bool:
    """What `float` would take, and is none: text, bytes, truth values and complex numbers, of NumPy and torch too."""
    kind = str(getattr(value, "dtype", "")).removeprefix("torch.")
    return isinstance(value, (str, bytes, bytearray, memoryview, bool)) or kind.startswith(("bool", "complex"))


def brief(value: Any) -> str:
    """What a message shows of a value that a caller handed over."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:76]} ..."


def check_module(model: object, caller: str) -> None:
    """A model: any module, also within a wrapper."""
    if not isinstance(model, nn.Module):
        raise EulernetError(f"eulernet.{caller} takes a torch.nn.Module, not {type(model).__name__}")


def each_of(models: nn.Module | Sequence[nn.Module], caller: str) -> list[nn.Module]:
    """A model alone, or with its copies."""
    each: list[Any] = list(models) if isinstance(models, list | tuple) else [models]
    if not each:
        raise EulernetError(f"eulernet.{caller}: the list of models is empty; for example [model, average]")
    for model in each:
        check_module(model, caller)
    return each


def check_model(model: nn.Module, caller: str) -> None:
    """A model that can be traced and patched: not wrapped, not sharded, made of Python."""
    check_module(model, caller)
    name = type(model).__name__
    if isinstance(model, weakref.ProxyTypes):
        raise EulernetError(f"eulernet.{caller} was given a weak reference to a model; give it the model itself")
    if unwrapped(model) is not model:
        inner, again = ("_orig_mod", "torch.compile") if name == "OptimizedModule" else ("module", name)
        advice = (
            f"Patch the model itself, then wrap it: model = {again}(eulernet.patch(wrapped.{inner}, h=0.1))"
            if caller == "patch"
            else f"Look at the model itself: eulernet.{caller}(wrapped.{inner})"
        )
        raise EulernetError(f"{name} wraps the model. {advice}")
    for path, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor" and not any(is_sharded(module) for module in model.modules()):
            raise EulernetError(
                f"{path} is a DTensor: {name} is distributed (tensor parallel) already. eulernet.{caller} takes the "
                "model before that: eulernet.patch(model, h=0.1), then parallelize_module(model, ...)"
            )
        if isinstance(parameter, FakeTensor):
            raise EulernetError(
                f"{path} is a fake tensor: {name} was made inside a FakeTensorMode, and holds no weights. Make it on "
                f"the meta device instead: with torch.device('meta'): model = {name}(...), then "
                f"eulernet.{caller}(model)"
            )
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise EulernetError(
                f"{path} has no shape yet: {name} holds lazy modules. Run it once, model(example), then "
                f"eulernet.{caller}(model)"
            )
        if hasattr(tensor, "ds_id"):
            raise EulernetError(
                f"{path} is partitioned by DeepSpeed (ZeRO-3): this process holds no more than a part of {name}. "
                f"Before deepspeed.zero.Init and deepspeed.initialize: eulernet.{caller}(model)"
            )
    if isinstance(model, torch.jit.ScriptModule):
        raise EulernetError(
            f"{ROOT} is a scripted or traced module ({name}), whose code is compiled. "
            "Patch the Python model it was made from, then use torch.jit.trace or torch.export."
        )
    for path, module in model.named_modules():
        if _is_offloaded(module):
            raise EulernetError(
                f"{path or ROOT} is offloaded by accelerate, which brings its weights from elsewhere for each "
                f"call. Load {name} without offloading (no device_map), call eulernet.patch(model, h=0.1), then "
                "accelerate.cpu_offload(model), disk_offload or dispatch_model"
            )
        if is_sharded(module):
            raise EulernetError(
                f"{path or ROOT} is sharded by FSDP. Patch before sharding: eulernet.{caller}(model), then "
                "fully_shard(model)."
            )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that leave its modules as they are."""
    wrappers = {"OptimizedModule", "DistributedDataParallel", "DataParallel"}
    wrappers |= {"AveragedModel", "ModelEmaV2", "ModelEmaV3"}  # torch.optim.swa_utils, timm
    while any(cls.__name__ in wrappers for cls in type(model).__mro__):
        model = getattr(model, "_orig_mod", None) or model.module  # type: ignore[assignment]
    return model


def _is_offloaded(module: nn.Module) -> bool:
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(one, "offload", False) is True for one in (hook, *getattr(hook, "hooks", ())))


def is_sharded(module: nn.Module) -> bool:
    return any(cls.__name__ in ("FSDPModule", "FullyShardedDataParallel") for cls in type(module).__mro__)


def described(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> str:
    """The arguments of a model in words: dtypes and shapes of tensors."""

    def one(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(one, value))}]"
        return brief(value)[:40]

    args, kwargs = arguments
    return "(" + ", ".join([*map(one, args), *(f"{k}={one(v)}" for k, v in kwargs.items())]) + ")"


def short(error: BaseException) -> str:
    """An error in one line."""
    first = (str(error).strip() or repr(error)).splitlines()[0]
    return f"{type(error).__name__}: {first[:300]}"
