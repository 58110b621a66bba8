"""The mixin of a patched block, and the names that rewritten source calls."""

from __future__ import annotations

import copyreg
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from eulernet._checks import check_module, unwrapped
from eulernet._errors import EulernetError, EulernetWarning
from eulernet._run import fuse
from eulernet._run.factor import LearnedFactor, StepFactor, scale, scaled_add, scaled_add_
from eulernet._source import Targets
from eulernet._step import Step, step_name

# ---- the protocol: what rewritten source calls on the module that it belongs to

STEP, STEP_IN_PLACE, SCALE = "_euler_step", "_euler_step_", "_euler_scale"
EPILOGUE, EPILOGUE_IN_PLACE = "_euler_epilogue", "_euler_epilogue_"
ADD_NORM, TAKE_NORM = "_euler_add_norm", "_euler_take_norm"
DEFER, DEFER_MUL, MATERIALIZE = "_euler_defer", "_euler_defer_mul", "_euler_materialize"
FUNCTION = "_euler_function_"  # with a number: a free function that the addition stands in
# Those that a hook on the steps hides, by entries of the module's __dict__ with their names.
OBSERVED = (STEP, STEP_IN_PLACE, SCALE, EPILOGUE, EPILOGUE_IN_PLACE, ADD_NORM, DEFER, DEFER_MUL)
# The entries of a patched module's __dict__: the factors of its steps, and the steps.
FACTORS, STEPS = "_euler", "_euler_steps"
KEY = "eulernet"  # under which the steps stand in the metadata of a state dict

# What makes a patched class: for each place its targets, its step's number in the module, and its form.
Plan = tuple[tuple[Targets, int, bool, bool], ...]
Factor = StepFactor | LearnedFactor


class Patched:
    """The first base of each patched class."""

    _euler_original: ClassVar[type[nn.Module]]
    _euler_plan: ClassVar[Plan]
    _euler_places: ClassVar[tuple[tuple[int, bool, int], ...]]  # the step's number, skip is left, sign
    _euler_restore: ClassVar[Callable[..., Any]]  # makes the patched class again when a module is unpickled
    _euler: list[Factor]
    _euler_steps: list[Step]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A patched class is not announced to the registries of its original's bases."""

    def _euler_step(self, left: Any, right: Any, place: int, alpha: float = 1) -> Any:
        slot, skip_is_left, sign = self._euler_places[place]
        h = self._euler[slot].current(self)
        if fuse.DeferredBranch in (type(left), type(right)):
            return fuse.step(None, left, right, h, skip_is_left, sign * alpha)
        return scaled_add(left, right, h, skip_is_left, sign * alpha)

    def _euler_step_(self, left: Any, right: Any, place: int, alpha: float = 1) -> Any:
        slot, skip_is_left, sign = self._euler_places[place]
        h = self._euler[slot].current(self)
        if fuse.DeferredBranch in (type(left), type(right)):
            return fuse.step(None, left, right, h, skip_is_left, sign * alpha, in_place=True)
        return scaled_add_(left, right, h, skip_is_left, sign * alpha)

    def _euler_epilogue(self, then: Any, left: Any, right: Any, place: int) -> Any:
        slot, skip_is_left, sign = self._euler_places[place]
        return fuse.step(then, left, right, self._euler[slot].current(self), skip_is_left, sign)

    def _euler_epilogue_(self, then: Any, left: Any, right: Any, place: int) -> Any:
        slot, skip_is_left, sign = self._euler_places[place]
        return fuse.step(then, left, right, self._euler[slot].current(self), skip_is_left, sign, in_place=True)

    def _euler_add_norm(self, norm: str, left: Any, right: Any, place: int) -> tuple[Any, fuse.PrecomputedNorm | None]:
        slot, skip_is_left, sign = self._euler_places[place]
        h = self._euler[slot].current(self)
        return fuse.add_norm(getattr(self, norm, None), left, right, h, skip_is_left, sign)

    def _euler_take_norm(self, norm: Any, state: Any, known: fuse.PrecomputedNorm | None) -> Any:
        return fuse.take_norm(norm, state, known)

    def _euler_defer(self, module: Any, branch: Any, place: int) -> Any:
        return fuse.defer(module, branch, self._euler[self._euler_places[place][0]])

    def _euler_defer_mul(self, left: Any, right: Any, gamma_first: bool, place: int) -> Any:
        return fuse.defer_mul(left, right, gamma_first, self._euler[self._euler_places[place][0]])

    def _euler_materialize(self, value: Any) -> Any:
        return fuse.materialize(value)

    def _euler_scale(self, branch: Any, place: int) -> Any:
        return scale(branch, self._euler[self._euler_places[place][0]].current(self))

    def extra_repr(self) -> str:
        shown = ", ".join(str(factor.bound_to(self)) for factor in self._euler)
        h = f"h=({shown})" if len(self._euler) > 1 else f"h={shown}" if shown else ""
        return ", ".join(part for part in (super().extra_repr(), h) if part)  # type: ignore[misc]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        for factor in self._euler:
            factor.to_device_of(fn)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """The steps go with the weights: into the metadata of the state dict, which has the same keys as ever."""
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None and self._euler:
            saved = [[step.number, f.saved] for step, f in zip(self._euler_steps, self._euler, strict=True)]
            metadata.setdefault(prefix[:-1], {})[KEY] = saved

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        before, now = [h for _, h in local_metadata.get(KEY, ())], [factor.saved for factor in self._euler]
        scheduled = any(getattr(factor, "scheduled", False) for factor in self._euler)  # its state is loaded as well
        if any(isinstance(h, float) for h in before) and before != now and not scheduled:
            shown = [", ".join(f"{h:g}" if isinstance(h, float) else str(h) for h in hs) for hs in (before, now)]
            warnings.warn(
                f"the weights were saved at h = {shown[0]}, and are loaded into steps with h = {shown[1]}. For the h "
                "of the weights: eulernet.set_h(model, h=state_dict)",
                EulernetWarning,
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        function, args, *rest = reduced
        if function is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise EulernetError(
                f"{type(self).__name__} pickles itself in a way of its own, which would lose its step factors; call "
                "eulernet.unpatch(model) first, keep eulernet.steps(model).to_json() beside it, and patch it again "
                "with h=Steps"
            )
        if rest and isinstance(rest[0], dict):  # who observes this module does not observe its copies
            rest[0] = {name: value for name, value in rest[0].items() if name not in OBSERVED}
        return (type(self)._euler_restore, (self._euler_original, self._euler_plan, *args[1:]), *rest)

    def __prepare_scriptable__(self) -> Any:
        raise EulernetError(
            f"torch.jit.script compiles the source of {type(self).__name__}, which does not hold its step factors. Use "
            "torch.export, torch.compile or torch.jit.trace, or fold h into the weights first: eulernet.fold(model)."
        )


# ---- the patched modules of a model


def restore_class(module: nn.Module) -> None:
    """Make a patched module what it was."""
    if isinstance(module, Patched):
        for factor in module._euler:
            factor.remove_from(module)
        module.__class__ = module._euler_original  # type: ignore[assignment]
        del module.__dict__[FACTORS], module.__dict__[STEPS]


def slots(model: nn.Module) -> Iterator[tuple[Patched, int, Step]]:
    """The steps of a patched model, as they are named now and with their h: each with its module and number there."""
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, Patched):
            for slot, (step, factor) in enumerate(zip(module._euler_steps, module._euler, strict=True)):
                called = step_name(name, step.number)
                yield module, slot, replace(step, name=called, module_name=name, h=factor.bound_to(module).value)


def by_module(model: nn.Module) -> dict[Patched, list[Step]]:
    """The modules that hold steps, each with its steps, in the order of their factors."""
    held: dict[Patched, list[Step]] = {}
    for module, _, step in slots(model):
        held.setdefault(module, []).append(step)
    return held


def bound(model: nn.Module, caller: str) -> list[tuple[Any, Step, Factor]]:
    """The steps of a patched model, each with its module and its factor, in the order of execution."""
    check_module(model, caller)
    held = [(module, step, module._euler[slot].bound_to(module)) for module, slot, step in slots(model)]
    if not held:
        raise EulernetError(
            f"{type(model).__name__} is not patched; call eulernet.patch(model, h=0.1) first "
            "(eulernet.find_steps(model) shows what that would change)"
        )
    held.sort(key=lambda one: one[1].index)
    if len({step.index for _, step, _ in held}) < len(held):  # parts that were patched apart, layers of eulernet.nn
        held = [(module, replace(step, index=index), factor) for index, (module, step, factor) in enumerate(held)]
    return held


def original_class(module: nn.Module) -> type[nn.Module]:
    return module._euler_original if isinstance(module, Patched) else type(module)
