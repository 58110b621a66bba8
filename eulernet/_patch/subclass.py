"""The subclass of a block's class in which its additions are steps."""

from __future__ import annotations

import ast
import contextlib
import types
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from eulernet._checks import brief
from eulernet._commit import Change
from eulernet._errors import EulernetError
from eulernet._patch.rewrite import rewrite
from eulernet._patch.saved import saves_itself, with_steps
from eulernet._run.factor import LearnedFactor
from eulernet._run.patched import (
    FACTORS,
    FUNCTION,
    KEYS,
    OBSERVED,
    SLOTS,
    STEPS,
    Become,
    Patched,
    Plan,
    original,
    original_class,
    places_of,
)
from eulernet._source import (
    VIA,
    Span,
    Target,
    Unsupported,
    definition_of,
    digest,
    expression_at,
    free_function,
    rebuild,
)

# Weak, so that a class that was made in a function goes when its last patched model does.
_classes: weakref.WeakValueDictionary[Any, type[nn.Module]] = weakref.WeakValueDictionary()


def patched_class(original: type[nn.Module], plan: Plan) -> type[nn.Module]:
    """The subclass of a block's class in which the planned additions are steps."""
    key = _key(original, plan)
    cls: Any = _classes.get(key)
    if cls is None or not cls._euler_is_of_now:
        cls = _classes[key] = _build(original, plan)
    return cls  # type: ignore[no-any-return]


def _key(original: type[nn.Module], plan: Plan) -> Any:
    """What tells two patched classes apart: what is not compared of a span, too, where something becomes of it."""
    return original, plan, tuple((span.unseen, span.callees) for targets, *_ in plan for _, span in targets)


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
    slots = tuple(slot for _, slot, *_ in plan)
    sources: list[tuple[types.FunctionType, Target]] = []
    methods: dict[type, dict[str, Any]] = {}
    for target, edits in tree.items():
        owner = _owner(original, target)
        namespace = methods.setdefault(owner, {})
        value = namespace.get(target.name) or vars(owner)[target.name]
        packages = frozenset(cls.__module__.partition(".")[0] for cls in original.__mro__)
        change = partial(
            _rewrite, target=target, edits=edits, called=_Called(functions, vias, packages, slots, sources)
        )
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
    if hasattr(original, "__deepcopy__"):
        namespace["__deepcopy__"] = Patched._euler_deepcopy
    if saves_itself(original):
        namespace["save_pretrained"] = with_steps(original.save_pretrained)  # type: ignore[attr-defined]
    if not plan:  # one that is made by the class, `type(model)(config)`, is not patched
        namespace |= {FACTORS: (), STEPS: ()}
    cls: type[nn.Module] = _subclass(original, tuple(bases), namespace)
    for function, target in sources:
        _watch(cls, function, target)
    return cls


def _watch(cls: Any, function: types.FunctionType, target: Target) -> None:
    """Notice where a function gets other code, as by IPython's autoreload: then what it was rewritten from goes."""
    of, by = weakref.ref(function), weakref.ref(cls)
    cls._euler_codes = (*cls._euler_codes, weakref.ref(function.__code__, lambda _: _changed(by(), of(), target)))


def _changed(cls: Any, function: types.FunctionType | None, target: Target) -> None:
    """The additions of a class whose source is another one now raise, for they would be those of before."""
    if cls is None:
        return
    again = "Import it anew (restart Python or the notebook's kernel), and patch it"
    with contextlib.suppress(EulernetError):  # of source that cannot be read
        if function is not None and digest(function) == target.digest:  # it stands at other lines, or is profiled
            return _watch(cls, function, target)
        if function is None or definition_of(function):
            again = "Patch it again"
    error = (
        f"{cls.__module__}.{cls.__qualname__}: {target.name} was changed after the model was patched (reloaded, or put "
        f"in the place of the former), and the patched model would run it as it was. {again}: "
        "eulernet.patch(model, h=eulernet.steps(model), example_inputs=...)"
    )

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise EulernetError(error)

    for name in OBSERVED:
        setattr(cls, name, refuse)
    cls._euler_is_of_now = False


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


class _Called(NamedTuple):
    """What methods call: rewritten functions by their names, those found at run time, the packages they may be in; the
    step's number for each place; and what has been rewritten."""

    functions: dict[str, types.FunctionType]
    vias: list[Callable[[Any], Any]]
    packages: frozenset[str]
    slots: tuple[int | None, ...]
    sources: list[tuple[types.FunctionType, Target]]


def _rewrite(
    function: types.FunctionType,
    target: Target,
    edits: dict[Span, Any],
    called: _Called,
) -> types.FunctionType:
    if digest(function) != target.digest:
        raise EulernetError(
            f"{function.__module__}.{function.__qualname__} is not the version that was patched: its source has "
            "changed. Install the version of the library with which the model was patched, or build the model anew, "
            "load its state_dict, and patch it with h=Steps.from_json(...)."
        )
    called.sources.append((function, target))
    for span in edits:
        expression_at(function, span, (ast.BinOp, ast.AugAssign, ast.Call))
    return rewrite(function, _spans(edits, called), free=target.owner is None, slots=called.slots)


def _spans(edits: dict[Span, Any], called: _Called) -> dict[Span, tuple[str, int]]:
    """What becomes of each expression of a function; the functions that it calls are rewritten on the way."""
    spans: dict[Span, tuple[str, int]] = {}
    for span, edit in edits.items():
        if isinstance(edit, int):
            spans[span] = ("step", edit)
            continue
        if all(callee.name.startswith(VIA) for callee in edit):  # several, where a loop goes over functions
            spans[span] = ("via", len(called.vias))
            called.vias.append(lambda function: function)  # keeps the number
            inside = {callee: _spans(inner, called) for callee, inner in edit.items()}
            called.vias[spans[span][1]] = _via(inside, span.callees, called.slots)
            continue
        ((callee, inner),) = edit.items()
        free = free_function(callee.name, called.packages)
        if free is None:
            raise EulernetError(f"{callee.name}, which makes the addition of a patched step, does not exist any more")
        number = len(called.functions)
        called.functions[f"{FUNCTION}{number}"] = free  # keeps the number while the inner ones get theirs
        called.functions[f"{FUNCTION}{number}"] = _rewrite(free, callee, inner, called)
        spans[span] = ("call", number)
    return spans


def _via(
    inside: dict[Target, dict[Span, tuple[str, int]]], callees: Sequence[str], slots: tuple[int | None, ...]
) -> Callable[[Any], Any]:
    """What gives each function at a call, of one of these sources, with its addition rewritten; None for others that
    are known to be called there (`callees`, their digests)."""
    spans = {target.digest: spans for target, spans in inside.items()}
    names = " or ".join(target.name.removeprefix(VIA) for target in inside)
    # By the function's id, as long as it lives: a compiler looks it up here.
    made: dict[int, types.FunctionType | None] = {}

    def rewritten(function: Any) -> Any:
        return made[id(function)] if id(function) in made else make(function)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def make(function: Any) -> types.FunctionType | None:
        of = None if function is None else digest(function)
        if of is None or (of not in spans and of not in callees):
            called = getattr(function, "__qualname__", "something that is no function in Python")
            raise EulernetError(
                f"{called} is called where {names} was when the model was patched; patch it again: "
                "eulernet.patch(model, h=eulernet.steps(model), example_inputs=...)"
            )
        for one in {id(f): f for f in (function, _copied(function))}.values():
            made[id(one)] = rewrite(one, spans[of], free=True, slots=slots) if of in spans else None
            weakref.finalize(one, made.pop, id(one), None).atexit = False
        return made[id(function)]

    return rewritten


def _copied(function: Any) -> Any:
    """What a function is the copy of, with variables of its own, as the copy of a model has them; else itself."""
    wrapped = vars(function).get("__wrapped__")
    return wrapped if getattr(wrapped, "__code__", None) is function.__code__ else function


def _owner(cls: type, target: Target) -> type:
    for owner in cls.__mro__:
        if target.owner is None or target.name not in vars(owner):
            continue
        # A spawned process imports the script that started it under the second of these names.
        modules = {owner.__module__.replace("__mp_main__", "__main__"), owner.__module__}
        if owner.__qualname__ == target.owner[1] and target.owner[0].replace("__mp_main__", "__main__") in modules:
            return owner
    raise EulernetError(
        f"{cls.__module__}.{cls.__qualname__} has no {target.name} of {target.owner}: another version of it"
    )


def restore(original: type[nn.Module], plan: Plan, *args: Any) -> Any:
    """What a pickle of a patched module calls by name, so this function stays where it is."""
    if not (isinstance(original, type) and issubclass(original, nn.Module) and _is_plan(plan)):
        raise EulernetError(
            f"the pickle holds no plan of a patched module, but ({brief(original)}, {brief(plan)}). Build the model "
            "anew, load its state_dict, and patch it with h=Steps.from_json(...)"
        )
    try:
        # A copy of a model whose source was changed refuses to run as well: it gets the same class.
        cls = _classes.get(_key(original, plan)) or patched_class(original, plan)
    except Unsupported as reason:
        raise EulernetError(
            f"the plan in the pickle does not fit {original.__module__}.{original.__qualname__}: {reason}. Build the "
            "model anew, load its state_dict, and patch it with h=Steps.from_json(...)"
        ) from reason
    return cls.__new__(cls, *args)


def _is_plan(plan: Any) -> bool:
    """Whether it has the form of a plan, whose slots are 0, 1, ... without a gap."""
    if not (isinstance(plan, tuple) and all(isinstance(place, tuple) and len(place) == 4 for place in plan)):
        return False
    for targets, slot, left, subtracts in plan:
        pairs = [pair for pair in targets if isinstance(pair, tuple)] if isinstance(targets, tuple) else []
        flags = [type(flag) for flag in (slot, left, subtracts)]
        if not pairs or len(pairs) < len(targets) or flags[0] not in (int, type(None)) or flags[1:] != [bool, bool]:
            return False
        if not all(len(p) == 2 and isinstance(p[0], Target) and isinstance(p[1], Span) for p in pairs):
            return False
    slots = {slot for _, slot, _, _ in plan}
    return None in slots or slots == set(range(len(slots)))  # a key has the others


def remove_steps(model: nn.Module, folded: set[tuple[int, int]]) -> list[Change]:
    """The changes that take steps, each a module's id and a number there, out of a patched model."""
    changes: list[Change] = []
    left: set[nn.Module] = set()  # modules that stay patched
    for module in reversed(list(model.modules())):
        if isinstance(module, Patched):
            kept = [slot for slot in range(len(module._euler)) if (id(module), slot) not in folded]
            around = not module._euler and any(m in left for m in module.modules())
            if kept or around:
                left.add(module)
            if not kept and not around:
                changes.append(original(module))
            elif len(kept) < len(module._euler):
                changes.append(_keeping(module, kept))
    return changes


def _keeping(module: Any, kept: list[int]) -> Become:
    """The change that leaves these steps of a module, which are numbered anew, as are the places."""
    number = {slot: i for i, slot in enumerate(kept)}
    places = sorted({place for slot in kept for place in places_of(module, slot)})
    entries = [module._euler_plan[place] for place in places]
    plan = tuple((t, None if slot is None else number[slot], left, sub) for t, slot, left, sub in entries)
    keys: dict[nn.Module, dict[int, int | None]] = {}
    for key in module.__dict__.get(KEYS, ()):
        held = {places.index(p): number.get(slot) for p, slot in key.__dict__[SLOTS].items() if p in places}
        if held:
            keys[key] = held
    factors, steps = [module._euler[slot] for slot in kept], [module._euler_steps[slot] for slot in kept]
    names = [factor.name for factor in factors if isinstance(factor, LearnedFactor)]
    parameters = {name: p for name in names if (p := module._parameters.get(name)) is not None}
    cls = patched_class(original_class(module), plan)
    norms = {places.index(p): norm for p, norm in module._euler_norms.items() if p in places}
    return Become(module, cls, factors, steps, parameters, keys, norms)
