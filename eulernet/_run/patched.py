"""The mixin of a patched block, and the names that rewritten source calls."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from eulernet._checks import check_module, unwrapped
from eulernet._commit import put_back
from eulernet._errors import EulernetError
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
        if type(left) is fuse.DeferredBranch or type(right) is fuse.DeferredBranch or type(h) is not float:
            return fuse.step(None, left, right, h, skip_is_left, sign * alpha)
        return scaled_add(left, right, h, skip_is_left, sign * alpha)

    def _euler_step_(self, left: Any, right: Any, place: int, alpha: float = 1) -> Any:
        slot, skip_is_left, sign = self._euler_places[place]
        h = self._euler[slot].current(self)
        if type(left) is fuse.DeferredBranch or type(right) is fuse.DeferredBranch:
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
        return fuse.add_norm(self, norm, left, right, h, skip_is_left, sign)

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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        held = [self.__dict__.get(name) for name in (FACTORS, STEPS)]
        number = len({slot for _, slot, *_ in self._euler_plan})
        if not all(isinstance(values, list) and len(values) == number for values in held):
            raise EulernetError(
                f"the pickle of {type(self).__name__} has a plan for {number} steps, and not as many step factors. "
                "Build the model anew, load its state_dict, and patch it with h=Steps.from_json(...)"
            )

    def __prepare_scriptable__(self) -> Any:
        raise EulernetError(
            f"torch.jit.script compiles the source of {type(self).__name__}, which does not hold its step factors. Use "
            "torch.export, torch.compile or torch.jit.trace, or fold h into the weights first: eulernet.fold(model)."
        )


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

    def before(self) -> Callable[[], None]:
        for name in learned_names(self.module):
            if parametrize.is_parametrized(self.module, name):
                raise EulernetError(
                    f"{name} of {type(self.module).__name__} is parametrized, and would go without that. "
                    f'Take that off first: torch.nn.utils.parametrize.remove_parametrizations(module, "{name}")'
                )
        held, cls = self.module.__dict__, type(self.module)
        entries, parameters = dict(held), dict(self.module._parameters)

        def undo() -> None:
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
        if self.factors is not None:
            held.update({FACTORS: self.factors, STEPS: list(self.steps)})
        # Not through the module, whose own __setattr__ may refuse what it does not know.
        object.__setattr__(module, "__class__", on_top_of(self.cls, module))
        if self.factors is None:
            for name in (FACTORS, STEPS):
                held.pop(name, None)


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
    return sorted(held, key=lambda one: one[1].index)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module was given by its owner: below the patch, and below its parametrizations."""
    cls = type(module)
    while _is_parametrized(cls):
        (cls,) = cls.__bases__
    return cls._euler_original if issubclass(cls, Patched) else cls


def check_names(module: nn.Module, step: Step) -> None:
    """Raise where a module to be patched has attributes with the names that a patched one gets."""
    own = {FACTORS, STEPS, *OBSERVED} if isinstance(module, Patched) else set()
    held = {*vars(module), *module._parameters, *module._buffers, *module._modules} - own
    held |= {name for cls in original_class(module).__mro__ for name in vars(cls)}
    if taken := sorted(name for name in held if name.startswith("_euler")):
        raise EulernetError(
            f"{step.name} ({step.module_class}) has {', '.join(taken)} of its own; names that begin with _euler are "
            "those of eulernet's additions to a module. Rename the attribute, or leave the step out: "
            f"eulernet.patch(model, ..., exclude={step.name!r})"
        )


def on_top_of(cls: type[nn.Module], module: nn.Module) -> type[nn.Module]:
    """`cls`, with the class on top that `torch.nn.utils.parametrize` has given a module of its own.

    So parametrizations can be put on and taken off before, while and after the module is patched.
    """
    top: type = type(module)
    if not _is_parametrized(top):
        return cls
    names = {name: value for name, value in vars(top).items() if name not in ("__dict__", "__weakref__")}
    both: type[nn.Module] = type(top)(f"Parametrized{cls.__name__}", (cls,), names)
    return both


def _is_parametrized(cls: type) -> bool:
    return cls.__module__ == parametrize.__name__ and cls.__name__ == f"Parametrized{cls.__bases__[0].__name__}"
