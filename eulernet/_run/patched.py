"""The mixin of a patched block, and the names that rewritten source calls."""

from __future__ import annotations

import copyreg
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from types import CodeType, FrameType, MappingProxyType, MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from eulernet._checks import brief, check_module, unwrapped
from eulernet._commit import LOCK, put_back
from eulernet._errors import EulernetError, EulernetWarning
from eulernet._run import fuse
from eulernet._run.factor import (
    HeldFactor,
    LearnedFactor,
    StepFactor,
    is_begun,
    scale,
    scaled_add,
    scaled_add_,
    scaled_difference,
)
from eulernet._source import Targets, behind
from eulernet._step import Step, step_name

# ---- the protocol: what rewritten source calls on the module that it belongs to

STEP, STEP_IN_PLACE, SCALE = "_euler_step", "_euler_step_", "_euler_scale"
EPILOGUE, EPILOGUE_IN_PLACE = "_euler_epilogue", "_euler_epilogue_"
ADD_NORM, TAKE_NORM, TAKE_GIVEN = "_euler_add_norm", "_euler_take_norm", "_euler_take_given"
DEFER, DEFER_MUL, MATERIALIZE = "_euler_defer", "_euler_defer_mul", "_euler_materialize"
FUNCTION = "_euler_function_"  # with a number: a free function that the addition stands in
CALL_VIA = "_euler_via"  # with a callee and a number: a function that no name leads to
DIFFERENCE = "_euler_difference"  # with a sum and its skip
HOLD = "_euler_hold"  # with a step's number: its h, where a function begins that adds several times
# An addition that no example has run: of two, into the first, and by a function.
UNSEEN, UNSEEN_IN_PLACE, UNSEEN_CALL = "_euler_unseen", "_euler_unseen_", "_euler_unseen_call"
PROBE = "_euler_probe"  # with a value, and where it stands: not in a class, but for a moment in a copy's __dict__
# Those that a hook on the steps hides, by entries of the module's __dict__ with their names.
OBSERVED = (STEP, STEP_IN_PLACE, SCALE, EPILOGUE, EPILOGUE_IN_PLACE, ADD_NORM, DEFER, DEFER_MUL, DIFFERENCE)
# The entries of a patched module's __dict__: the factors of its steps, and the steps. Where one addition in a loop is
# a step for each module that makes its branch (a key), these modules too; each of them holds which step it is where.
# And the norm that the next block takes the state of, by the places where that is made.
FACTORS, STEPS, KEYS, NORMS = "_euler", "_euler_steps", "_euler_keys", "_euler_norms"
SLOTS = "_euler_slots"
KEY = "eulernet"  # under which the steps stand in the metadata of a state dict

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
    _euler_codes: ClassVar[tuple[weakref.ref[CodeType], ...]] = ()  # of its functions, as they were
    _euler_is_of_now: ClassVar[bool] = True  # whether they still have them
    _euler: list[Factor]
    _euler_steps: list[Step]
    _euler_norms: Mapping[int, nn.Module] = MappingProxyType({})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A patched class is not announced to the registries of its original's bases."""

    def _euler_slot(self, place: int, key: Any) -> int | None:
        """Which step of the module an addition is, None where it was not chosen."""
        slot = self._euler_places[place][0]
        if slot is not None:
            return slot
        key = key.func if isinstance(key, partial) else key.__self__ if isinstance(key, MethodType) else key
        slots = getattr(key, SLOTS, None)
        if slots is None or place not in slots:
            what = "no module" if key is None else f"a {type(key).__name__} without an h"
            raise EulernetError(
                f"{type(self).__name__}: {what} made the branch of a step that has an h for each module that makes it. "
                "Patch the model as it is now, with example_inputs that lead here: eulernet.patch(model, "
                "h=eulernet.steps(model), example_inputs=...)"
            )
        return slots[place]  # type: ignore[no-any-return]

    def _euler_factor(self, place: int, key: Any, left: Any = None, right: Any = None) -> Factor | HeldFactor:
        slot = self._euler_places[place][0]
        if slot is not None:
            return self._euler[slot] if key is None else key  # what `_euler_hold` gave
        if is_begun(left, right):  # a loop begins with a number, or adds one for want of a skip
            return _ONE
        slot = self._euler_slot(place, key)
        return _ONE if slot is None else self._euler[slot]

    def _euler_hold(self, slot: int) -> Factor | HeldFactor:
        factor = self._euler[slot]
        return factor if torch.compiler.is_compiling() else HeldFactor(factor, factor.current(self))

    def _euler_step(self, left: Any, right: Any, place: int, alpha: float = 1, key: Any = None) -> Any:
        slot, skip_is_left, sign = self._euler_places[place]
        one = self._euler[slot] if key is None and slot is not None else self._euler_factor(place, key, left, right)
        h = one.current(self, left)
        if not torch.compiler.is_compiling() and place in self._euler_norms and fuse.may_norm(left, right):
            return fuse.step_and_norm(self, self._euler_norms[place], left, right, h, skip_is_left, sign * alpha)
        if type(left) is fuse.DeferredBranch or type(right) is fuse.DeferredBranch or type(h) is not float:
            return fuse.step(None, left, right, h, skip_is_left, sign * alpha)
        return scaled_add(left, right, h, skip_is_left, sign * alpha)

    def _euler_step_(self, left: Any, right: Any, place: int, alpha: float = 1, key: Any = None) -> Any:
        slot, skip_is_left, sign = self._euler_places[place]
        one = self._euler[slot] if key is None and slot is not None else self._euler_factor(place, key, left, right)
        h = one.current(self, left)
        if type(left) is fuse.DeferredBranch or type(right) is fuse.DeferredBranch:
            return fuse.step(None, left, right, h, skip_is_left, sign * alpha, in_place=True)
        return scaled_add_(left, right, h, skip_is_left, sign * alpha)

    def _euler_epilogue(self, then: Any, left: Any, right: Any, place: int, key: Any = None) -> Any:
        _, skip_is_left, sign = self._euler_places[place]
        return fuse.step(
            then, left, right, self._euler_factor(place, key, left, right).current(self, left), skip_is_left, sign
        )

    def _euler_epilogue_(self, then: Any, left: Any, right: Any, place: int, key: Any = None) -> Any:
        _, skip_is_left, sign = self._euler_places[place]
        h = self._euler_factor(place, key, left, right).current(self, left)
        return fuse.step(then, left, right, h, skip_is_left, sign, in_place=True)

    def _euler_add_norm(
        self, norm: str, left: Any, right: Any, place: int, key: Any = None
    ) -> tuple[Any, fuse.PrecomputedNorm | None]:
        _, skip_is_left, sign = self._euler_places[place]
        h = self._euler_factor(place, key, left, right).current(self, left)
        return fuse.add_norm(self, norm, left, right, h, skip_is_left, sign)

    def _euler_take_norm(self, norm: Any, state: Any, known: fuse.PrecomputedNorm | None) -> Any:
        return fuse.take_norm(norm, state, known)

    def _euler_take_given(self, norm: Any, state: Any) -> Any:
        return fuse.take_given(norm, state)

    def _euler_defer(self, module: Any, branch: Any, place: int, key: Any = None) -> Any:
        if not fuse.may_defer(branch):
            return module(branch)
        return fuse.defer(module, branch, self._euler_factor(place, key))

    def _euler_defer_mul(self, left: Any, right: Any, gamma_first: bool, place: int, key: Any = None) -> Any:
        return fuse.defer_mul(left, right, gamma_first, self._euler_factor(place, key))

    def _euler_difference(self, total: Any, skip: Any, place: int, key: Any = None) -> Any:
        return scaled_difference(total, skip, self._euler_factor(place, key).current(self))

    def _euler_via(self, callee: Any, number: int) -> Any:
        """What is called here, whatever expression led to it, with its addition made a step."""
        function, before, keywords = behind(callee)
        rewritten = self._euler_vias[number](function)  # None: none of its steps was chosen
        return callee if rewritten is None else partial(rewritten, self, *before, **keywords)

    def _euler_materialize(self, value: Any) -> Any:
        return fuse.materialize(value)

    def _euler_scale(self, branch: Any, place: int, key: Any = None) -> Any:
        return scale(branch, self._euler_factor(place, key).current(self, branch))

    def _euler_unseen(self, left: Any, right: Any, *given: bool) -> Any:
        """`given`: of each whether it is an argument that may be left out; True where the right one is subtracted."""
        _tell_unseen(self, left, right, *given[:2])
        return left - right if len(given) > 2 else left + right

    def _euler_unseen_(self, left: Any, right: Any, *given: bool) -> Any:
        _tell_unseen(self, left, right, *given)
        return right

    def _euler_unseen_call(self, function: Any, *args: Any, **keywords: Any) -> Any:
        at = 0 if function is sum else 1 if function is reduce else None
        if at is not None and not isinstance(args[at], str | Tensor):  # which may be a generator
            args = (*args[:at], list(args[at]), *args[at + 1 :])
            added = (*args[at + 1 :], *keywords.values(), *args[at])
        else:
            added = (getattr(function, "__self__", None), *args, *keywords.values())
        tensors = [part for part in added if isinstance(part, Tensor)]
        if len(tensors) > 1:
            _tell_unseen(self, tensors[0], tensors[1])
        return function(*args, **keywords)

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
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)  # type: ignore[misc]
        factors = self.__dict__.get(FACTORS, ())  # which one that is being copied has not got yet
        try:
            before = [h for _, h in saved_steps(local_metadata.get(KEY, ()))]
        except EulernetError as error:  # torch raises it once all modules have their weights
            args[-1].append(str(error))
            return
        now = [factor.saved for factor in factors]
        scheduled = any(getattr(factor, "scheduled", False) for factor in factors)  # its state is loaded as well
        if any(isinstance(h, float) for h in before) and now and before != now and not scheduled:
            shown = [", ".join(f"{h:g}" if isinstance(h, float) else str(h) for h in hs) for hs in (before, now)]
            try:
                warnings.warn(
                    f"the weights were saved at h = {shown[0]}, and are loaded into steps with h = {shown[1]}. For the "
                    "h of the weights: eulernet.set_h(model, h=state_dict)",
                    EulernetWarning,
                    stacklevel=2,
                )
            except EulernetWarning as error:  # likewise
                args[-1].append(str(error))

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

    def _euler_deepcopy(self, memo: dict[int, Any]) -> Any:
        """The copy that the owner's `__deepcopy__` makes, maybe as a new module of this class, with the steps."""
        twin: Any = self._euler_original.__deepcopy__(self, memo)  # type: ignore[attr-defined]
        if isinstance(twin, Patched) and FACTORS not in twin.__dict__:
            memo[id(self)] = twin
            for name in (FACTORS, STEPS, KEYS, NORMS, SLOTS):
                if name in self.__dict__:
                    twin.__dict__[name] = deepcopy(self.__dict__[name], memo)
            for name in learned_names(self):  # type: ignore[arg-type]
                twin._parameters[name] = deepcopy(self._parameters[name], memo)  # type: ignore[attr-defined]
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        held = [getattr(self, name, None) for name in (FACTORS, STEPS)]
        number = len({slot for _, slot, *_ in self._euler_plan})
        if any(slot is None for _, slot, *_ in self._euler_plan) and isinstance(held[1], list):
            number = len(held[1])  # the keys, which say which step is whose, may not be filled yet
        if not all(isinstance(values, list | tuple) and len(values) == number for values in held):
            raise EulernetError(
                f"the pickle of {type(self).__name__} has a plan for {number} steps, and not as many step factors. "
                "Build the model anew, load its state_dict, and patch it with h=Steps.from_json(...)"
            )

    def __prepare_scriptable__(self) -> Any:
        raise EulernetError(
            f"torch.jit.script compiles the source of {type(self).__name__}, which does not hold its step factors. Use "
            "torch.export, torch.compile or torch.jit.trace, or fold h into the weights first: eulernet.fold(model)."
        )


def _tell_unseen(module: Any, left: Any, right: Any, left_given: bool = False, right_given: bool = False) -> None:
    """Say that two tensors of one shape are added where nothing was run when the model was patched.

    Not where one is no state: a loss of each sample, a parameter, or what takes no gradient beside what does, as noise,
    masks and positions. `left_given`, `right_given`: which are arguments that may be left out.
    """
    if torch.compiler.is_compiling() or not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return
    if left.shape != right.shape or left.dim() < 2 or not all(_is_continuous(t) for t in (left, right)):
        return
    if any(isinstance(t, nn.Parameter) for t in (left, right)):
        return
    if left.requires_grad != right.requires_grad:
        without, given = (right, right_given) if left.requires_grad else (left, left_given)
        if given or _arguments_differ_from(without, sys._getframe(2)):
            return
    warnings.warn(
        f"{type(module).__name__} adds here what the example_inputs that it was patched with did not run. If it is a "
        "residual step, its h is 1. Patch with an example that leads here, or write the step as one addition for all "
        "ways, or by eulernet.functional.euler_step",
        EulernetWarning,
        stacklevel=3,
    )


def _arguments_differ_from(tensor: Tensor, frame: FrameType) -> bool:
    """Whether the arguments of this shape that a function was called with, and there are some, all take a gradient."""
    code = frame.f_code
    given = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount]]
    alike = [t for t in given if isinstance(t, Tensor) and t.shape == tensor.shape and _is_continuous(t)]
    return bool(alike) and all(t.requires_grad for t in alike)


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


# ---- the patched modules of a model


@dataclass(frozen=True)
class Become:
    """A module gets the class, the factors, the steps and the parameters log_h that it is to have, whatever it had.

    Where `factors` is None, it becomes what it was before it was patched.
    """

    module: nn.Module
    cls: type[nn.Module]
    factors: list[Factor] | None = None
    steps: Sequence[Step] = ()
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)  # those of `factors`, by their names
    keys: Mapping[nn.Module, Mapping[int, int | None]] = field(default_factory=dict)  # which step each is at a place
    norms: Mapping[int, nn.Module] = field(default_factory=dict)  # that the next block calls with the state of a place

    def before(self) -> Callable[[], None]:
        for name in learned_names(self.module):
            if parametrize.is_parametrized(self.module, name):
                raise EulernetError(
                    f"{name} of {type(self.module).__name__} is parametrized, and would go without that. "
                    f'Take that off first: torch.nn.utils.parametrize.remove_parametrizations(module, "{name}")'
                )
        held, cls = self.module.__dict__, type(self.module)
        entries, parameters = dict(held), dict(self.module._parameters)
        keys = [(key, dict(key.__dict__)) for key in (*held.get(KEYS, ()), *self.keys)]

        def undo() -> None:
            for key, before in keys:
                put_back(key.__dict__, before)
            put_back(held, entries)
            put_back(self.module._parameters, parameters)
            object.__setattr__(self.module, "__class__", cls)

        return undo

    def make(self) -> None:
        module, held = self.module, self.module.__dict__
        parameters = module._parameters
        for name in learned_names(module):
            if name in parameters and parameters[name] is not self.parameters.get(name):
                del parameters[name]
        for name, parameter in self.parameters.items():
            try:
                if parameters.get(name) is not parameter:
                    module.register_parameter(name, parameter)
            except Exception as error:
                raise EulernetError(
                    f"{type(module).__name__} does not take the parameter {name} ({type(error).__name__}: {error}); "
                    "nothing was changed. Patch without trainable=, or leave it out: eulernet.patch(model, ..., "
                    f"trainable=True, exclude={original_class(module).__name__})"
                ) from error
        former = [key for key in held.get(KEYS, ()) if key not in self.keys]
        for key, at in self.keys.items():
            key.__dict__[SLOTS] = dict(at)
        if self.keys:
            held[KEYS] = list(self.keys)
        if self.factors is not None:
            held.update({FACTORS: self.factors, STEPS: list(self.steps)})
        if self.norms:
            held[NORMS] = dict(self.norms)
        # Not through the module, whose own __setattr__ may refuse what it does not know.
        object.__setattr__(module, "__class__", on_top_of(self.cls, module))
        for key in former:
            key.__dict__.pop(SLOTS, None)
        gone = {KEYS: not self.keys, NORMS: not self.norms, **dict.fromkeys((FACTORS, STEPS), self.factors is None)}
        for name in (name for name, is_gone in gone.items() if is_gone):
            held.pop(name, None)


def saved_steps(entry: Any) -> Sequence[tuple[int | None, float | str]]:
    """What the metadata of a state dict holds of a module: of each step its number there, and its h or parameter."""

    def fits(one: Any) -> bool:
        if not (isinstance(one, list | tuple) and len(one) == 2):
            return False
        number, h = one
        return type(number) in (int, type(None)) and (isinstance(h, str) or (type(h) is float and 0 < h < math.inf))

    if not (isinstance(entry, list | tuple) and all(map(fits, entry))):
        raise EulernetError(
            f"the metadata of the state dict holds no steps of eulernet, but {brief(entry)}. Load weights without it, "
            "model.load_state_dict(dict(state_dict)), and where h is known, give it: eulernet.set_h(model, 0.1)"
        )
    return entry


def learned_names(module: nn.Module) -> list[str]:
    """The names of the parameters log_h of a module."""
    return [f.name for f in module.__dict__.get(FACTORS, ()) if isinstance(f, LearnedFactor)]


def original(module: nn.Module) -> Become:
    """The change that makes a patched module what it was."""
    return Become(module, original_class(module))


def restore_class(module: nn.Module) -> None:
    """Make a patched module what it was."""
    if isinstance(module, Patched):
        original(module).make()


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
    with LOCK:
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
    """The class that a module was given by its owner: below the patch, and below its parametrizations."""
    cls = type(module)
    while _is_parametrized(cls):
        (cls,) = cls.__bases__
    return cls._euler_original if issubclass(cls, Patched) else cls


def check_names(module: nn.Module, step: Step, exclude: str | list[str]) -> None:
    """Raise where a module to be patched has attributes with the names that a patched one gets."""
    own = {*(FACTORS, STEPS, KEYS, NORMS, *OBSERVED)} if isinstance(module, Patched) else set()
    slots = vars(module).get(SLOTS)  # of a key, whose host may be another model's
    if isinstance(slots, dict) and slots and all(type(place) is int for place in slots):
        own.add(SLOTS)
    held = {*vars(module), *module._parameters, *module._buffers, *module._modules} - own
    held |= {name for cls in original_class(module).__mro__ for name in vars(cls)}
    if taken := sorted(name for name in held if name.startswith("_euler")):
        raise EulernetError(
            f"{step.name} ({step.module_class}) has {', '.join(taken)} of its own; names that begin with _euler are "
            "those of eulernet's additions to a module. Rename the attribute, or leave the step out: "
            f"eulernet.patch(model, ..., exclude={exclude!r})"
        )


_FORMER = "_euler_former"  # of a class on top of a patched one: that which the owner had


def on_top_of(cls: type[nn.Module], module: nn.Module) -> type[nn.Module]:
    """`cls`, with the class on top that `torch.nn.utils.parametrize` has given a module of its own.

    So parametrizations can be put on and taken off before, while and after the module is patched.
    """
    top: type = type(module)
    if not _is_parametrized(top):
        return cls
    names = {name: value for name, value in vars(top).items() if name not in ("__dict__", "__weakref__")}
    former: Any = names.pop(_FORMER, None)
    if former is not None and former.__bases__ == (cls,) and names.keys() <= vars(former).keys():
        return former  # type: ignore[no-any-return]  # the owner's, whose parametrizations are what they were
    if issubclass(cls, Patched):
        names[_FORMER] = former or top
    both: type[nn.Module] = type(top)(f"Parametrized{cls.__name__}", (cls,), names)
    return both


def _is_parametrized(cls: type) -> bool:
    return cls.__module__ == parametrize.__name__ and cls.__name__ == f"Parametrized{cls.__bases__[0].__name__}"
