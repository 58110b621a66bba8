"""Step factors that are learned: which steps share one, and the parameters that hold them."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _disable_current_modes

from eulernet._checks import brief
from eulernet._errors import EulernetError
from eulernet._run.factor import LearnedFactor
from eulernet._run.patched import FACTORS
from eulernet._step import ROOT, Step

# What steps share one h: those for which this is equal.
_SHARING: dict[str, Callable[[Step], object]] = {
    "step": lambda step: step.index,
    "stage": lambda step: stage(step),
    "model": lambda step: None,
}


def stage(step: Step) -> str:
    """The name of a step's module up to its last number, such as `layer1` or `encoder.layer`; all of it without one."""
    parts = (step.module_name or ROOT).split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[-1]] if numbers else parts)


def checked(trainable: Any) -> str | None:
    """What shares one h; None where h is not learned."""
    if trainable is False:
        return None
    if trainable is True:
        return "step"
    if not (isinstance(trainable, str) and trainable in _SHARING):
        raise EulernetError(
            f'trainable={brief(trainable)}: write trainable=True or "step" for one h a step, "stage" or "model" for '
            "one that steps share, or False"
        )
    return trainable


@dataclass(frozen=True)
class Slot:
    """A step of a module that gets a parameter for its h."""

    module: nn.Module
    number: int
    name: str
    parameter: nn.Parameter


def plan_learned(
    model: nn.Module, blocks: Iterable[tuple[nn.Module, Sequence[Step], Sequence[float]]], sharing: str
) -> list[Slot]:
    """A parameter for the h of each step of these blocks; nothing is changed."""
    _check_ranks(model)
    registered = {module: name for name, module in model.named_modules()}
    parameters: dict[object, nn.Parameter] = {}
    slots: list[Slot] = []
    shared: list[tuple[Step, object, float]] = []
    for module, steps, hs in blocks:
        for number, (step, h) in enumerate(zip(steps, hs, strict=True)):
            if module not in registered:
                raise EulernetError(
                    f"{step.name}: the module is not registered in {type(model).__name__}, so that its h would not be "
                    f"in model.parameters(); patch without trainable=, or with exclude={step.name!r}"
                )
            like = _first_of(model.get_submodule(step.module_name), module, model)
            if like.device.type == "meta":
                raise EulernetError(
                    f"{step.name} is on the meta device, where the parameter of a learned h has no value. Put the "
                    "model on a real device first: model.to_empty(device='cpu'), load its weights, then patch"
                )
            key = _SHARING[sharing](step)
            if key not in parameters:
                with torch.inference_mode(False), _disable_current_modes():
                    log_h = torch.full((1,), math.log(h), device=like.device, dtype=like.dtype)
                    parameters[key] = nn.Parameter(log_h)
            if parameters[key].device != like.device:
                raise EulernetError(
                    f'{step.name} is on {like.device}, others that trainable="{sharing}" would let it share one h with '
                    f'on {parameters[key].device}; use trainable="step"'
                )
            shared.append((step, parameters[key], h))
            slots.append(Slot(module, number, _free_name(module, registered[module], step, slots), parameters[key]))
    check_shared(shared)
    return slots


def _check_ranks(model: nn.Module) -> None:
    """`DistributedDataParallel` averages the gradients of the parameters that it saw when it was made."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    inside = set(model.modules())
    wrappers = [o for o in gc.get_objects() if issubclass(type(o), nn.parallel.DistributedDataParallel)]
    if any(not inside.isdisjoint(wrapper.modules()) for wrapper in wrappers):
        raise EulernetError(
            f"{type(model).__name__} is inside DistributedDataParallel already, which would not average the gradients "
            "of a learned h, so that each rank would learn its own. Patch first: model = "
            "DistributedDataParallel(eulernet.patch(model, h=0.1, trainable=True))"
        )


def _first_of(*modules: nn.Module) -> torch.Tensor:
    """The first floating tensor that one of these modules holds."""
    held = (t for module in modules for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    return next(held, torch.empty(0))


def check_shared(steps: Iterable[tuple[Step, object, float]]) -> None:
    """Steps that share one h, each given as (step, its factor or parameter, value), must be given one value."""
    first: dict[int, tuple[Step, float]] = {}
    for step, holder, h in steps:
        holder = holder.parameter if isinstance(holder, LearnedFactor) else holder
        other, value = first.setdefault(id(holder), (step, h))
        if value != h:
            raise EulernetError(
                f"{other.name} and {step.name} share one learned h, and are given two: {value:g} and {h:g}. Give them "
                'one, for example h=0.1, or patch with trainable="step"'
            )


def _free_name(module: nn.Module, module_name: str, step: Step, slots: Iterable[Slot]) -> str:
    """`log_h_bias`, `log_h_1_bias` for the step `:1` of its module, `log_h_layers_0_bias` for a layer of a loop.

    What is called a bias gets no weight decay from those who go by names, as Hugging Face's Trainer does.
    """
    key = ""
    if step.module_name != module_name:
        key = "_" + step.module_name.removeprefix(f"{module_name}." if module_name else "").replace(".", "_")
    name = f"log_h{key}{'' if step.number is None else f'_{step.number}'}_bias"
    taken = any(slot.module is module and slot.name == name for slot in slots)
    mine = [f.name for f in module.__dict__.get(FACTORS, ()) if isinstance(f, LearnedFactor)]
    if taken or (hasattr(module, name) and name not in mine):
        raise EulernetError(
            f"{step.name} ({step.module_class}) has an attribute {name} of its own, the name that its learned h would "
            f"get; patch without trainable=, or with exclude={step.name!r}"
        )
    return name


def step_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters log_h of a model patched with `trainable=`, each once; they are to have no weight decay."""
    seen: set[int] = set()
    for module in model.modules():
        for factor in module.__dict__.get(FACTORS, ()):
            if isinstance(factor, LearnedFactor):
                for parameter in _behind(module, factor.name):
                    if id(parameter) not in seen:
                        seen.add(id(parameter))
                        yield parameter


def _behind(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameter itself, or those of its parametrization."""
    if parametrize.is_parametrized(module, name):
        return list(module.parametrizations[name].parameters())  # type: ignore[index,union-attr]
    return [getattr(module, name)]
