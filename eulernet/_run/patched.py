"""The mixin of a patched block, and the names that rewritten source calls."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from eulernet._checks import check_module, unwrapped
from eulernet._errors import EulernetError
from eulernet._run import fuse
from eulernet._run.factor import LearnedFactor, StepFactor, scale, scaled_add, scaled_add_
from eulernet._source import Targets, behind
from eulernet._step import Step, step_name

# ---- the protocol: what rewritten source calls on the module that it belongs to

STEP, STEP_IN_PLACE, SCALE = "_euler_step", "_euler_step_", "_euler_scale"
EPILOGUE, EPILOGUE_IN_PLACE = "_euler_epilogue", "_euler_epilogue_"
ADD_NORM, TAKE_NORM = "_euler_add_norm", "_euler_take_norm"
DEFER, DEFER_MUL, MATERIALIZE = "_euler_defer", "_euler_defer_mul", "_euler_materialize"
FUNCTION = "_euler_function_"  # with a number: a free function that the addition stands in
CALL_VIA = "_euler_via"  # with a callee and a number: a function that no name leads to
# Those that a hook on the steps hides, by entries of the module's __dict__ with their names.
OBSERVED = (STEP, STEP_IN_PLACE, SCALE, EPILOGUE, EPILOGUE_IN_PLACE, ADD_NORM, DEFER, DEFER_MUL)
# The entries of a patched module's __dict__: the factors of its steps, and the steps. Where one addition in a loop is
# a step for each module that makes its branch (a key), these modules too; each of them holds which step it is where.
FACTORS, STEPS, KEYS = "_euler", "_euler_steps", "_euler_keys"
SLOTS = "_euler_slots"

# What makes a patched class: for each place its targets, its step's number in the module (None where each key has one),
# and its form.
Plan = tuple[tuple[Targets, int | None, bool, bool], ...]
Factor = StepFactor | LearnedFactor
_ONE = StepFactor(1.0)  # of a key that was not chosen


class Patched:
    """The first base of each patched class."""

    _euler_original: ClassVar[type[nn.Module]]
    _euler_plan: ClassVar[Plan]
    _euler_places: ClassVar[tuple[tuple[int | None, bool, int], ...]]  # the step's number, skip is left, sign
    _euler_vias: ClassVar[tuple[Callable[[Any], Any], ...]]  # each gives a function with its addition rewritten
    _euler_restore: ClassVar[Callable[..., Any]]  # makes the patched class again when a module is unpickled
    _euler: list[Factor]
    _euler_steps: list[Step]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A patched class is not announced to the registries of its original's bases."""

    def _euler_slot(self, place: int, key: Any) -> int | None:
        """Which step of the module an addition is, None where it was not chosen."""
        slot = self._euler_places[place][0]
        if slot is not None:
            return slot
        slots = getattr(key.func if isinstance(key, partial) else key, SLOTS, None)
        if slots is None or place not in slots:
            what = "no module" if key is None else f"a {type(key).__name__} without an h"
            raise EulernetError(
                f"{type(self).__name__}: {what} made the branch of a step that has an h for each module that makes it. "
                "Patch the model as it is now, with example_inputs that lead here: eulernet.patch(model, "
                "h=eulernet.steps(model), example_inputs=...)"
            )
        return slots[place]  # type: ignore[no-any-return]

    def _euler_factor(self, place: int, key: Any) -> Factor:
        slot = self._euler_slot(place, key)
        return _ONE if slot is None else self._euler[slot]

    def _euler_step(self, left: Any, right: Any, place: int, alpha: float = 1, key: Any = None) -> Any:
        slot, skip_is_left, sign = self._euler_places[place]
        h = (self._euler_factor(place, key) if slot is None else self._euler[slot]).current(self)
        if fuse.DeferredBranch in (type(left), type(right)):
            return fuse.step(None, left, right, h, skip_is_left, sign * alpha)
        return scaled_add(left, right, h, skip_is_left, sign * alpha)

    def _euler_step_(self, left: Any, right: Any, place: int, alpha: float = 1, key: Any = None) -> Any:
        slot, skip_is_left, sign = self._euler_places[place]
        h = (self._euler_factor(place, key) if slot is None else self._euler[slot]).current(self)
        if fuse.DeferredBranch in (type(left), type(right)):
            return fuse.step(None, left, right, h, skip_is_left, sign * alpha, in_place=True)
        return scaled_add_(left, right, h, skip_is_left, sign * alpha)

    def _euler_epilogue(self, then: Any, left: Any, right: Any, place: int, key: Any = None) -> Any:
        _, skip_is_left, sign = self._euler_places[place]
        return fuse.step(then, left, right, self._euler_factor(place, key).current(self), skip_is_left, sign)

    def _euler_epilogue_(self, then: Any, left: Any, right: Any, place: int, key: Any = None) -> Any:
        _, skip_is_left, sign = self._euler_places[place]
        h = self._euler_factor(place, key).current(self)
        return fuse.step(then, left, right, h, skip_is_left, sign, in_place=True)

    def _euler_add_norm(
        self, norm: str, left: Any, right: Any, place: int, key: Any = None
    ) -> tuple[Any, fuse.PrecomputedNorm | None]:
        _, skip_is_left, sign = self._euler_places[place]
        h = self._euler_factor(place, key).current(self)
        return fuse.add_norm(getattr(self, norm, None), left, right, h, skip_is_left, sign)

    def _euler_take_norm(self, norm: Any, state: Any, known: fuse.PrecomputedNorm | None) -> Any:
        return fuse.take_norm(norm, state, known)

    def _euler_defer(self, module: Any, branch: Any, place: int, key: Any = None) -> Any:
        return fuse.defer(module, branch, self._euler_factor(place, key))

    def _euler_defer_mul(self, left: Any, right: Any, gamma_first: bool, place: int, key: Any = None) -> Any:
        return fuse.defer_mul(left, right, gamma_first, self._euler_factor(place, key))

    def _euler_via(self, callee: Any, number: int) -> Any:
        """What is called here, whatever expression led to it, with its addition made a step."""
        function, before, keywords = behind(callee)
        return partial(self._euler_vias[number](function), self, *before, **keywords)

    def _euler_materialize(self, value: Any) -> Any:
        return fuse.materialize(value)

    def _euler_scale(self, branch: Any, place: int, key: Any = None) -> Any:
        return scale(branch, self._euler_factor(place, key).current(self))

    def extra_repr(self) -> str:
        shown = ", ".join(str(factor.bound_to(self)) for factor in self._euler)
        h = f"h=({shown})" if len(self._euler) > 1 else f"h={shown}" if shown else ""
        return ", ".join(part for part in (super().extra_repr(), h) if part)  # type: ignore[misc]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        for factor in self._euler:
            factor.to_device_of(fn)
        return self

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
        for key in module.__dict__.pop(KEYS, ()):
            key.__dict__.pop(SLOTS, None)


def slots(model: nn.Module) -> Iterator[tuple[Patched, int, Step]]:
    """The steps of a patched model, as they are named now and with their h: each with its module and number there."""
    names = {id(module): name for name, module in unwrapped(model).named_modules()}
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, Patched):
            keys = {slot: key for key in module.__dict__.get(KEYS, ()) for slot in key.__dict__[SLOTS].values()}
            for slot, (step, factor) in enumerate(zip(module._euler_steps, module._euler, strict=True)):
                at = names.get(id(keys[slot]), step.module_name) if slot in keys else name
                called = step_name(at, step.number)
                yield module, slot, replace(step, name=called, module_name=at, h=factor.bound_to(module).value)


def places_of(module: Patched, slot: int) -> Iterator[int]:
    """The places of one step of a patched module."""
    keyed = {place for key in module.__dict__.get(KEYS, ()) for place, s in key.__dict__[SLOTS].items() if s == slot}
    return (p for p, (number, *_) in enumerate(module._euler_places) if number == slot or p in keyed)


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
    return sorted(held, key=lambda one: one[1].index)


def original_class(module: nn.Module) -> type[nn.Module]:
    return module._euler_original if isinstance(module, Patched) else type(module)
