"""The subclass of a block's class in which its additions are steps."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from eulernet._errors import EulernetError
from eulernet._patch.rewrite import rewrite
from eulernet._run.patched import FACTORS, FUNCTION, KEYS, SLOTS, STEPS, Patched, Plan, places_of, restore_class
from eulernet._source import VIA, Span, Target, digest, free_function, rebuild

# Weak, so that a class that was made in a function goes when its last patched model does.
_classes: weakref.WeakValueDictionary[tuple[type[nn.Module], Plan], type[nn.Module]] = weakref.WeakValueDictionary()


def patched_class(original: type[nn.Module], plan: Plan) -> type[nn.Module]:
    """The subclass of a block's class in which the planned additions are steps."""
    cls = _classes.get((original, plan))
    if cls is None:
        cls = _classes[original, plan] = _build(original, plan)
    return cls


def _build(original: type[nn.Module], plan: Plan) -> type[nn.Module]:
    tree: dict[Target, Any] = {}  # method -> span -> place, or the callee with spans of its own
    for place, (targets, *_) in enumerate(plan):
        level: dict[Any, Any] = tree
        for target, span in targets[:-1]:
            level = level.setdefault(target, {}).setdefault(span, {})
        target, span = targets[-1]
        level.setdefault(target, {})[span] = place

    functions: dict[str, types.FunctionType] = {}
    vias: list[Callable[[Any], Any]] = []
    methods: dict[type, dict[str, Any]] = {}
    for target, edits in tree.items():
        owner = _owner(original, target)
        namespace = methods.setdefault(owner, {})
        value = namespace.get(target.name) or vars(owner)[target.name]
        change = partial(_rewrite, target=target, edits=edits, functions=functions, vias=vias)
        namespace[target.name] = rebuild(value, target.path, change)

    bases: list[type] = [Patched, original]
    for owner in original.__mro__:  # a method that super() reaches needs a class of its own in between
        if owner in methods and owner is not original:
            quiet = type("_Quiet", (), {"__init_subclass__": Patched.__init_subclass__})  # one each, for the order
            bases.append(_subclass(owner, (quiet, owner), methods[owner]))
    namespace = {
        **methods.get(original, {}),
        **functions,
        "_euler_original": original,
        "_euler_plan": plan,
        "_euler_vias": tuple(vias),
        "_euler_restore": staticmethod(restore),
        "_euler_places": tuple((slot, left, -1 if subtracts else 1) for _, slot, left, subtracts in plan),
    }
    if issubclass(original, nn.TransformerEncoderLayer):  # the fused inference path does not reach the additions
        namespace["activation_relu_or_gelu"] = property(lambda self: 0, _set_in_dict("activation_relu_or_gelu"))
    if issubclass(original, nn.TransformerEncoder):  # nor does its container's conversion to nested tensors
        namespace["use_nested_tensor"] = property(lambda self: False, _set_in_dict("use_nested_tensor"))
    cls: type[nn.Module] = _subclass(original, tuple(bases), namespace)
    return cls


def _set_in_dict(name: str) -> Callable[[Any, Any], None]:
    def setter(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    return setter


def _subclass(of: type, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
    names = {"__module__": of.__module__, "__qualname__": of.__qualname__, "__doc__": of.__doc__}

    def fill(namespace_: dict[str, Any]) -> None:
        namespace_.update(names)
        namespace_.update(namespace)

    return types.new_class(of.__name__, bases, exec_body=fill)


def _rewrite(
    function: types.FunctionType,
    target: Target,
    edits: dict[Span, Any],
    functions: dict[str, types.FunctionType],
    vias: list[Callable[[Any], Any]],
) -> types.FunctionType:
    if digest(function) != target.digest:
        raise EulernetError(
            f"{function.__module__}.{function.__qualname__} is not the version that was patched: its source has "
            "changed. Install the version of the library with which the model was patched, or build the model anew, "
            "load its state_dict, and patch it with h=Steps.from_json(...)."
        )
    return rewrite(function, _spans(edits, functions, vias), free=target.owner is None)


def _spans(
    edits: dict[Span, Any], functions: dict[str, types.FunctionType], vias: list[Callable[[Any], Any]]
) -> dict[Span, tuple[str, int]]:
    """What becomes of each expression of a function; the functions that it calls are rewritten on the way."""
    spans: dict[Span, tuple[str, int]] = {}
    for span, edit in edits.items():
        if isinstance(edit, int):
            spans[span] = ("step", edit)
            continue
        ((callee, inner),) = edit.items()
        if callee.name.startswith(VIA):
            spans[span] = ("via", len(vias))
            vias.append(lambda function: function)  # keeps the number
            vias[spans[span][1]] = _via(callee, _spans(inner, functions, vias))
            continue
        free = free_function(callee.name)
        if free is None:
            raise EulernetError(f"{callee.name}, which makes the addition of a patched step, does not exist any more")
        number = len(functions)
        functions[f"{FUNCTION}{number}"] = free  # keeps the number while the inner ones get theirs
        functions[f"{FUNCTION}{number}"] = _rewrite(free, callee, inner, functions, vias)
        spans[span] = ("call", number)
    return spans


def _via(target: Target, spans: dict[Span, tuple[str, int]]) -> Callable[[Any], Any]:
    """What gives each function at a call, all of one source, with its addition rewritten."""
    made: dict[int, types.FunctionType] = {}  # by the function's id, as long as it lives: a compiler looks it up here

    def rewritten(function: Any) -> Any:
        return made[id(function)] if id(function) in made else make(function)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def make(function: Any) -> types.FunctionType:
        if function is None or digest(function) != target.digest:
            called = getattr(function, "__qualname__", "something that is no function in Python")
            raise EulernetError(
                f"{called} is called where {target.name.removeprefix(VIA)} was when the model was patched; patch it "
                "again: eulernet.patch(model, h=eulernet.steps(model), example_inputs=...)"
            )
        made[id(function)] = rewrite(function, spans, free=True)
        weakref.finalize(function, made.pop, id(function), None).atexit = False
        return made[id(function)]

    return rewritten


def _owner(cls: type, target: Target) -> type:
    for owner in cls.__mro__:
        if (owner.__module__, owner.__qualname__) == target.owner and target.name in vars(owner):
            return owner
    raise EulernetError(
        f"{cls.__module__}.{cls.__qualname__} has no {target.name} of {target.owner}: another version of it"
    )


def restore(original: type[nn.Module], plan: Plan, *args: Any) -> Any:
    """What a pickle of a patched module calls by name, so this function stays where it is."""
    cls = patched_class(original, plan)
    return cls.__new__(cls, *args)


def remove_steps(model: nn.Module, folded: set[tuple[int, int]]) -> None:
    """Take steps, each a module's id and a number there, out of a patched model; the others stay as they are."""
    for module in reversed(list(model.modules())):
        if isinstance(module, Patched):
            kept = [slot for slot in range(len(module._euler)) if (id(module), slot) not in folded]
            around = not module._euler and any(isinstance(m, Patched) for m in module.modules() if m is not module)
            if not kept and not around:
                restore_class(module)
            elif len(kept) < len(module._euler):
                _keep_steps(module, kept)


def _keep_steps(module: Patched, kept: list[int]) -> None:
    """Leave these steps of a module, which are numbered anew, as are the places."""
    number = {slot: i for i, slot in enumerate(kept)}
    places = sorted({place for slot in kept for place in places_of(module, slot)})
    plan = tuple((t, number.get(slot), left, sub) for t, slot, left, sub in (module._euler_plan[p] for p in places))  # type: ignore[arg-type]
    keys = module.__dict__.get(KEYS, ())
    for key in keys:
        held = key.__dict__.pop(SLOTS)
        if held := {places.index(place): number.get(slot) for place, slot in held.items() if place in places}:
            key.__dict__[SLOTS] = held
    if keys:
        module.__dict__[KEYS] = [key for key in keys if SLOTS in key.__dict__]
    for slot, factor in enumerate(module._euler):
        if slot not in number:
            factor.remove_from(module)
    module.__dict__[FACTORS] = [module._euler[slot] for slot in kept]
    module.__dict__[STEPS] = [module._euler_steps[slot] for slot in kept]
    module.__class__ = patched_class(module._euler_original, plan)  # type: ignore[assignment]
