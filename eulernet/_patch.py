"""Patch a model: give each block that holds a step a subclass of its class, with the additions rewritten.

Only `block.__class__` changes, and one entry of `block.__dict__` that holds h. The subclass is cached: all blocks of
one class with the same steps share it.
"""

from __future__ import annotations

import copyreg
import types
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from eulernet import _doubts, _factor, _fuse
from eulernet._errors import EulernetError, EulernetWarning
from eulernet._find import Found, Search, search
from eulernet._learn import Trainable, check_shared, checked, plan_learned
from eulernet._maps import absorbing, check_scalable, refusal, scale_parameters
from eulernet._observe import OBSERVED, Seen, observe
from eulernet._report import ROOT, Step, Steps
from eulernet._rewrite import (
    FUNCTION,
    Span,
    Target,
    Targets,
    Unsupported,
    digest,
    free_function,
    rebuild,
    rewrite,
)
from eulernet._select import HLike, Selector, names_given, select, values
from eulernet._trace import undisturbed

# What makes a patched class: for each place its targets, its step's number in the module, and its form.
Plan = tuple[tuple[Targets, int, bool, bool], ...]
# The entries of a patched module's __dict__.
_FACTORS, _STEPS = "_euler", "_euler_steps"
Model = TypeVar("Model", bound=nn.Module)
_Factor = _factor.StepFactor | _factor.LearnedFactor


class Patched:
    """The first base of each patched class."""

    _euler_original: ClassVar[type[nn.Module]]
    _euler_plan: ClassVar[Plan]
    _euler_places: ClassVar[tuple[tuple[int, bool, int], ...]]  # the step's number, skip is left, sign
    _euler: list[_factor.StepFactor | _factor.LearnedFactor]
    _euler_steps: list[Step]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A patched class is not announced to the registries of its original's bases."""

    def _euler_step(self, left: Any, right: Any, place: int, alpha: float = 1) -> Any:
        slot, skip_is_left, sign = self._euler_places[place]
        h = self._euler[slot].of(self)
        if _fuse.Later in (type(left), type(right)):
            return _fuse.step(None, left, right, h, skip_is_left, sign * alpha)
        return _factor.step(left, right, h, skip_is_left, sign * alpha)

    def _euler_step_(self, left: Any, right: Any, place: int, alpha: float = 1) -> Any:
        slot, skip_is_left, sign = self._euler_places[place]
        h = self._euler[slot].of(self)
        if _fuse.Later in (type(left), type(right)):
            return _fuse.step(None, left, right, h, skip_is_left, sign * alpha, in_place=True)
        return _factor.step_in_place(left, right, h, skip_is_left, sign * alpha)

    def _euler_tail(self, then: Any, left: Any, right: Any, place: int) -> Any:
        slot, skip_is_left, sign = self._euler_places[place]
        return _fuse.step(then, left, right, self._euler[slot].of(self), skip_is_left, sign)

    def _euler_tail_(self, then: Any, left: Any, right: Any, place: int) -> Any:
        slot, skip_is_left, sign = self._euler_places[place]
        return _fuse.step(then, left, right, self._euler[slot].of(self), skip_is_left, sign, in_place=True)

    def _euler_ahead(self, norm: str, left: Any, right: Any, place: int) -> tuple[Any, _fuse.Ahead | None]:
        slot, skip_is_left, sign = self._euler_places[place]
        h = self._euler[slot].of(self)
        return _fuse.ahead(getattr(self, norm, None), left, right, h, skip_is_left, sign)

    def _euler_normed(self, norm: Any, state: Any, known: _fuse.Ahead | None) -> Any:
        return _fuse.normed(norm, state, known)

    def _euler_later(self, module: Any, branch: Any, place: int) -> Any:
        return _fuse.later(module, branch, self._euler[self._euler_places[place][0]])

    def _euler_times(self, left: Any, right: Any, gamma_first: bool, place: int) -> Any:
        return _fuse.times(left, right, gamma_first, self._euler[self._euler_places[place][0]])

    def _euler_now(self, value: Any) -> Any:
        return _fuse.now(value)

    def _euler_scale(self, branch: Any, place: int) -> Any:
        return _factor.scale(branch, self._euler[self._euler_places[place][0]].of(self))

    def extra_repr(self) -> str:
        shown = ", ".join(str(factor.at(self)) for factor in self._euler)
        h = f"h=({shown})" if len(self._euler) > 1 else f"h={shown}" if shown else ""
        return ", ".join(part for part in (super().extra_repr(), h) if part)  # type: ignore[misc]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        for factor in self._euler:
            factor.follow(fn)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        function, args, *rest = reduced
        if function is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise EulernetError(
                f"{type(self).__name__} pickles itself in a way of its own, which would lose its step factors; call "
                "eulernet.unpatch(model) first, keep eulernet.steps(model).to_json() beside it, and patch it "
                "again with h=Steps"
            )
        if rest and isinstance(rest[0], dict):  # who observes this module does not observe its copies
            rest[0] = {name: value for name, value in rest[0].items() if name not in OBSERVED}
        return (_restore, (self._euler_original, self._euler_plan, *args[1:]), *rest)

    def __prepare_scriptable__(self) -> Any:
        raise EulernetError(
            f"torch.jit.script compiles the source of {type(self).__name__}, which does not hold its step factors. Use "
            "torch.export, torch.compile or torch.jit.trace, or fold h into the weights first: eulernet.fold(model)."
        )


def _restore(original: type[nn.Module], plan: Plan, *args: Any) -> Any:
    cls = patched_class(original, plan)
    return cls.__new__(cls, *args)


# ---- the class

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
    methods: dict[type, dict[str, Any]] = {}
    for target, edits in tree.items():
        owner = _owner(original, target)
        namespace = methods.setdefault(owner, {})
        value = namespace.get(target.name) or vars(owner)[target.name]
        change = partial(_rewrite, target=target, edits=edits, functions=functions)
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
    function: types.FunctionType, target: Target, edits: dict[Span, Any], functions: dict[str, types.FunctionType]
) -> types.FunctionType:
    if digest(function) != target.digest:
        raise EulernetError(
            f"{function.__module__}.{function.__qualname__} is not the version that was patched: its source has "
            "changed. "
            "Install the version of the library with which the model was patched, or build the model anew, load its "
            "state_dict, and patch it with h=Steps.from_json(...)."
        )
    spans: dict[Span, tuple[str, int]] = {}
    for span, edit in edits.items():
        if isinstance(edit, int):
            spans[span] = ("step", edit)
            continue
        ((callee, inner),) = edit.items()
        free = free_function(callee.name)
        if free is None:
            raise EulernetError(f"{callee.name}, which makes the addition of a patched step, does not exist any more")
        number = len(functions)
        functions[f"{FUNCTION}{number}"] = free  # keeps the number while the inner ones get theirs
        functions[f"{FUNCTION}{number}"] = _rewrite(free, callee, inner, functions)
        spans[span] = ("call", number)
    return rewrite(function, spans, free=target.owner is None)


def _owner(cls: type, target: Target) -> type:
    for owner in cls.__mro__:
        if (owner.__module__, owner.__qualname__) == target.owner and target.name in vars(owner):
            return owner
    raise EulernetError(
        f"{cls.__module__}.{cls.__qualname__} has no {target.name} of {target.owner}: another version of it"
    )


# ---- modules


@dataclass(frozen=True)
class _Change:
    """What happens to one module: its new class, its steps, and their h."""

    module: nn.Module
    cls: type[nn.Module]
    steps: list[Step]
    hs: list[float]
    found: list[Found]

    def apply(self, module: nn.Module) -> None:
        like = next((p for p in (*module.parameters(), *module.buffers()) if p.is_floating_point()), None)
        module.__dict__[_FACTORS] = [_factor.StepFactor(h, like) for h in self.hs]
        module.__dict__[_STEPS] = self.steps
        module.__class__ = self.cls


def restore_class(module: nn.Module) -> None:
    """Make a patched module what it was."""
    if isinstance(module, Patched):
        for factor in module._euler:
            factor.leave(module)
        module.__class__ = module._euler_original  # type: ignore[assignment]
        del module.__dict__[_FACTORS], module.__dict__[_STEPS]


def slots(model: nn.Module) -> Iterator[tuple[Patched, int, Step]]:
    """The steps of a patched model, as they are named now and with their h: each with its module and number there."""
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, Patched):
            for slot, (step, factor) in enumerate(zip(module._euler_steps, module._euler, strict=True)):
                suffix = "".join(step.name.partition(":")[1:])
                yield module, slot, replace(step, name=(name or ROOT) + suffix, h=factor.at(module).value)


def by_module(model: nn.Module) -> dict[Patched, list[Step]]:
    """The modules that hold steps, each with its steps, in the order of their factors."""
    held: dict[Patched, list[Step]] = {}
    for module, _, step in slots(model):
        held.setdefault(module, []).append(step)
    return held


def factors_now(model: nn.Module, result: Search) -> dict[int, float]:
    """The h of each patched step, by its index among those that were found in the original."""
    found = {f.step.name: f for f in result.found}
    factors = {}
    for module, slot, step in slots(model):
        patched = {targets for targets, number, *_ in module._euler_plan if number == slot}
        if step.name not in found or patched != {spot.site.targets for spot in found[step.name].spots}:
            raise EulernetError(
                f"{step.name} ({type(module).__name__}) is patched, but these example inputs do not lead to the same "
                "additions; pass the example_inputs with which the model was patched"
            )
        assert step.h is not None
        factors[found[step.name].step.index] = step.h
    return factors


def release(model: nn.Module, folded: set[tuple[int, int]]) -> None:
    """Take steps, each a module's id and a number there, out of a patched model; the others stay as they are."""
    for module in reversed(list(model.modules())):
        if isinstance(module, Patched):
            kept = [slot for slot in range(len(module._euler)) if (id(module), slot) not in folded]
            around = not module._euler and any(isinstance(m, Patched) for m in module.modules() if m is not module)
            if not kept and not around:
                restore_class(module)
            elif len(kept) < len(module._euler):
                plan = tuple(
                    (t, kept.index(slot), left, sub) for t, slot, left, sub in module._euler_plan if slot in kept
                )
                for slot, factor in enumerate(module._euler):
                    if slot not in kept:
                        factor.leave(module)
                module.__dict__[_FACTORS] = [module._euler[slot] for slot in kept]
                module.__dict__[_STEPS] = [module._euler_steps[slot] for slot in kept]
                module.__class__ = patched_class(module._euler_original, plan)  # type: ignore[assignment]


def _changes(found: Sequence[Found], hs: dict[int, float], model: nn.Module) -> list[_Change]:
    changes = []
    for module in {id(f.module): f.module for f in found}.values():
        mine = [f for f in found if f.module is module]
        plan = [(s.site.targets, slot, s.skip_is_left, s.subtracts) for slot, f in enumerate(mine) for s in f.spots]
        cls = patched_class(_original_class(module), tuple(plan))
        changes.append(_Change(module, cls, [f.step for f in mine], [hs[f.step.index] for f in mine], mine))
    layers = {id(c.module) for c in changes if isinstance(c.module, nn.TransformerEncoderLayer)}
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(id(layer) in layers for layer in encoder.layers):
            changes.append(_Change(encoder, patched_class(_original_class(encoder), ()), [], [], []))
    return changes


def _original_class(module: nn.Module) -> type[nn.Module]:
    return module._euler_original if isinstance(module, Patched) else type(module)


def _prove(search: Search, changes: Sequence[_Change]) -> None:
    """Run the patched copies: each step must go through `_euler_step` as often as it was found."""
    for sandbox in {id(run.sandbox): run.sandbox for run in search.runs}.values():
        twins = {id(module): twin for twin, module in sandbox.original.items()}
        counts: Counter[tuple[int, int]] = Counter()
        for change in changes:
            twin = twins[id(change.module)]
            change.apply(twin)
            observe(twin, partial(_count, counts, id(change.module)))
        for run in search.runs:
            if run.sandbox is not sandbox:
                continue
            counts.clear()
            with undisturbed():
                sandbox.run(run.args, run.kwargs, training=run.training)
            for change in changes:
                spots = [(f, s) for f in change.found for s in f.spots]
                for place, (found, spot) in enumerate(spots):
                    passed, expected = counts[id(change.module), place], spot.calls[run.training]
                    if passed != expected:
                        raise EulernetError(
                            f"{found.step.name} ({found.step.module_class}): the addition at {spot.site.file}:"
                            f"{spot.site.line} ran {expected} times, but {passed} times as a step once it was "
                            "rewritten; "
                            "nothing was changed. Leave it out: eulernet.patch(model, ..., "
                            f"exclude={found.step.name!r})"
                        )


def _count(counts: Counter[tuple[int, int]], module: int, seen: Seen, add: Callable[[], Any]) -> Any:
    counts[module, seen.place] += 1
    return add()


# ---- the public functions


def find_steps(model: nn.Module, *, example_inputs: Any = None) -> Steps:
    """The steps that `patch` would change; the model is left as it is.

    Args:
        model: any `torch.nn.Module`.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments that the model takes.
            Shapes, dtypes and devices matter, values do not. Guessed for models of timm, torchvision, Hugging Face and
            Lightning, which say what they take.

    Returns:
        `Steps`, which prints as a table. Its `long`, `unsupported`, `unreached` and `notes` say what was seen besides.

    Raises:
        EulernetError: no example input can be guessed, or the model fails on it.

    Example:
        >>> import torch, eulernet
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> [step.kind for step in eulernet.find_steps(layer, example_inputs=torch.zeros(2, 5, 8))]
        ['identity', 'identity']
    """
    check_model(model, "find_steps")
    with search(model, example_inputs) as result:
        return result.steps


def patch(
    model: Model,
    h: HLike = 0.1,
    *,
    example_inputs: Any = None,
    include: Selector = None,
    exclude: Selector = None,
    preserve: bool | Literal["where possible"] = False,
    trainable: Trainable = False,
) -> Model:
    """Make each residual addition `s + F(s)` of a model a step `s + h * F(s)`, in place.

    Eq. (3) of *Towards Robust ResNet* (Zhang et al., IJCAI 2019). Parameters, buffers, hooks, the `state_dict` and the
    classes that `isinstance` sees stay what they are; with h = 1 the model computes the same bits as before. A patched
    model that is patched again forgets its former steps.

    Args:
        model: any `torch.nn.Module`.
        h: the step factor: a positive number for all steps; a sequence with one number a step; a mapping from patterns
            on step names to numbers (the first match wins, the rest get 1); a function of a `Step`, such as the rules
            in `eulernet.schedules`; "auto", which is `inverse_sqrt()` of them, 1 / sqrt(D); or `Steps`, for example
            those that `Steps.from_json` read: without `include` and `exclude` these steps, and no others, get their h.
        example_inputs: as for `find_steps`.
        include, exclude: which steps: a pattern on names (`"layer1"`, `"blocks.*.attn"`), a module class, a function
            `(step) -> bool`, or a list of these. Long steps are scaled only where `include` names them.
        preserve: for a network that is trained already: divide the last affine maps of each branch by h (batch norm,
            convolution, linear map, LayerScale), in place, so that the model computes what it computed, to rounding,
            until it is trained on. A branch that has no such map, or shares it, is an error; with "where possible" its
            h stays what it was, 1. To undo this call `fold`: `unpatch` would leave the maps divided by h.
        trainable: learn h, beginning at the `h` that is given. True or "step": one h a step; "stage": one for the steps
            whose names are equal up to their last number, such as all of `layer1` in a ResNet or all `blocks` of a ViT;
            "model": one for all. Each is h = exp(log_h), so positive, and log_h a parameter of the block, of shape (1,)
            (FSDP2 takes no scalars) and of the block's dtype: `layer1.0.log_h`, or `blocks.0.log_h_0` and
            `blocks.0.log_h_1` where a block has several steps. Blocks that share an h hold the same parameter, as tied
            weights do (and as with these, FSDP2 refuses to shard them apart, and Hugging Face's `save_pretrained` to
            write them). log_h must have no weight decay, which would pull h to 1. In float16 and bfloat16 it is rounded
            like any parameter. The branch is kept for the gradient of h, and copied where it is the left operand of an
            addition in place. To fix what was learned: `eulernet.patch(model, h=eulernet.steps(model))`.

    Returns:
        The same model.

    Raises:
        EulernetError: no step was found, a value or pattern is wrong, a source cannot be rewritten, or the function
            cannot be preserved. The model is then as it was.

    Warns:
        EulernetWarning: something was seen that is not scaled; the model seems to be trained, and its function is not
            preserved; h is lost to rounding in half precision.

    Example:
        >>> import torch, eulernet
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> layer = eulernet.patch(layer, h=0.1, example_inputs=torch.zeros(2, 5, 8))
        >>> [step.h for step in eulernet.steps(layer)]
        [0.1, 0.1]
        >>> layer = eulernet.patch(layer, h="auto", trainable=True, example_inputs=torch.zeros(2, 5, 8))
        >>> [name for name in layer.state_dict() if "log_h" in name]
        ['log_h_0', 'log_h_1']
    """
    check_model(model, "patch")
    if preserve not in (True, False, "where possible"):
        raise EulernetError(f'preserve={preserve!r} must be True, False or "where possible"')
    sharing = checked(trainable)
    with search(model, example_inputs) as result:
        by_index = {f.step.index: f for f in result.found}
        if not by_index:
            seen = "".join(f"\n  seen and not supported: {line}" for line in result.steps.unsupported)
            raise EulernetError(
                f"no residual step was found in {type(model).__name__}: no addition of a tensor and a function "
                f"of it{' that can be scaled' if seen else ''}.{seen}\n"
                "eulernet.find_steps(model, example_inputs=...) shows what was seen; "
                "eulernet.functional.euler_step(skip, branch, h) writes a step by hand."
            )
        ordered = [by_index[i] for i in sorted(by_index)]
        chosen = select([f.step for f in ordered], [f.module for f in ordered], include, exclude, h)
        for step in chosen:
            if (error := by_index[step.index].error) is not None:
                raise EulernetError(
                    f"{step.name} ({step.module_class}): {error} Or leave it out: "
                    f"eulernet.patch(model, ..., exclude={step.name!r})"
                )
        hs = dict(zip([s.index for s in chosen], values(h, chosen), strict=True))
        scales = _preserving(model, result, hs, preserve) if preserve else {}
        try:
            changes = _changes([by_index[s.index] for s in chosen], hs, model)
        except Unsupported as reason:
            raise EulernetError(f"{type(model).__name__} cannot be patched: {reason}; exclude= that step") from reason
        blocks = [(change.module, change.steps, change.hs) for change in changes]
        learned = [] if sharing is None else plan_learned(model, blocks, sharing)
        _prove(result, changes)
    check_scalable(model, scales)
    doubts = [*(f"not scaled, because not supported: {line}" for line in result.steps.unsupported), *result.steps.notes]
    if not preserve:
        if not isinstance(h, Steps) and any(value != 1 for value in hs.values()):  # Steps restore what was there
            doubts += _doubts.trained(model)
        doubts += _doubts.rounded_away(model, ((c.module, value) for c in changes for value in c.hs))
    if doubts:  # before anything is changed, since whoever calls may have made errors of warnings
        warnings.warn("\n".join(doubts), EulernetWarning, stacklevel=2)
    scale_parameters(scales)
    for module in model.modules():
        restore_class(module)
    for change in changes:
        change.apply(change.module)
    for slot in learned:
        slot.apply()
    return model


def _preserving(
    model: nn.Module, result: Search, hs: dict[int, float], preserve: bool | Literal["where possible"]
) -> dict[nn.Parameter, float]:
    """What the parameters are multiplied by, so that the model with these h computes what it does now.

    Where a step has none, its h in `hs` is set to what it is now, if that is asked.
    """
    now = factors_now(model, result)
    factors = {index: now.get(index, 1.0) / hs.get(index, 1.0) for index in (*now, *hs)}
    scales, refused = absorbing(model, result, factors)
    if refused and (preserve is True or not refused.keys() <= hs.keys()):
        raise refusal(
            result,
            refused,
            'Leave these at h = 1, and give h to the others: eulernet.patch(model, h, preserve="where possible"). '
            "Or begin at h = 1 with all, eulernet.patch(model, h=1.0), and move h while the model trains on "
            "(eulernet.set_h).",
        )
    hs.update({index: now.get(index, 1.0) for index in refused})
    return scales


def steps(model: nn.Module) -> Steps:
    """The steps of a patched model, each with its h.

    Raises:
        EulernetError: the model is not patched.

    Example:
        >>> import torch, eulernet
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> layer = eulernet.patch(layer, h=[0.1, 0.2], example_inputs=torch.zeros(2, 5, 8))
        >>> [(step.name, step.depth, step.h) for step in eulernet.steps(layer)]
        [('<root>:0', 2, 0.1), ('<root>:1', 2, 0.2)]
    """
    return Steps([step for _, step, _ in bound(model, "steps")])


def set_h(model: Model, h: HLike) -> Model:
    """Give the steps of a patched model new step factors; `h` as for `patch`. Compiled graphs are not compiled again.

    Raises:
        EulernetError: the model is not patched, or a value is wrong; then nothing is changed.

    Warns:
        EulernetWarning: h is lost to rounding in half precision.

    Example:
        >>> import torch, eulernet
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> layer = eulernet.patch(layer, h=0.1, example_inputs=torch.zeros(2, 5, 8))
        >>> [step.h for step in eulernet.steps(eulernet.set_h(layer, {"<root>:0": 0.5, "*": 0.25}))]
        [0.5, 0.25]
    """
    planned = _planned(model, h)
    for doubt in _doubts.rounded_away(model, [(module, value) for module, _, value in planned]):
        warnings.warn(doubt, EulernetWarning, stacklevel=2)
    for _, factor, value in planned:
        factor.set(value)
    return model


def assign(model: nn.Module, h: HLike) -> None:
    """`set_h` without its warnings."""
    for _, factor, value in _planned(model, h):
        factor.set(value)


def _planned(model: nn.Module, h: HLike) -> list[tuple[nn.Module, _Factor, float]]:
    """For each step of a patched model its module, its factor and the new value, after all checks."""
    held = bound(model, "set_h")
    steps = [step for _, step, _ in held]
    names_given(h, steps)
    hs = values(h, steps)
    check_shared([(step, factor, value) for (_, step, factor), value in zip(held, hs, strict=True)])
    return [(module, factor, value) for (module, _, factor), value in zip(held, hs, strict=True)]


def unpatch(model: Model) -> Model:
    """Make a patched model what it was; nothing of eulernet is left on it.

    Raises:
        EulernetError: the model is sharded by FSDP, which has changed its classes on top of the patch.

    Example:
        >>> import torch, eulernet
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> layer = eulernet.patch(layer, h=0.1, example_inputs=torch.zeros(2, 5, 8))
        >>> type(eulernet.unpatch(layer)) is torch.nn.TransformerEncoderLayer
        True
    """
    check_module(model, "unpatch")
    for module in model.modules():
        if _sharding(module):
            raise EulernetError(
                f"{type(module).__name__} is sharded by FSDP, whose classes are built on the patched ones. To "
                "have h = 1 "
                "call eulernet.set_h(model, 1.0); to be rid of the patch, load the state_dict into a model "
                "that is not patched."
            )
    for module in model.modules():
        restore_class(module)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether any module of the model holds a step of eulernet's.

    Example:
        >>> import torch, eulernet
        >>> eulernet.is_patched(torch.nn.Linear(2, 2))
        False
    """
    check_module(model, "is_patched")
    return any(isinstance(module, Patched) for module in model.modules())


def check_module(model: object, caller: str) -> None:
    if not isinstance(model, nn.Module):
        raise EulernetError(f"eulernet.{caller} takes a torch.nn.Module, not {type(model).__name__}")


def bound(model: nn.Module, caller: str) -> list[tuple[Any, Step, _Factor]]:
    """The steps of a patched model, each with its module and its factor, in the order of execution."""
    check_module(model, caller)
    held = [(module, step, module._euler[slot].at(module)) for module, slot, step in slots(model)]
    if not held:
        raise EulernetError(
            f"{type(model).__name__} is not patched; call eulernet.patch(model, h=0.1) first "
            "(eulernet.find_steps(model) shows what that would change)"
        )
    return sorted(held, key=lambda one: one[1].index)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that leave its modules as they are."""
    wrappers = {"OptimizedModule", "DistributedDataParallel", "DataParallel"}
    while any(cls.__name__ in wrappers for cls in type(model).__mro__):
        model = getattr(model, "_orig_mod", None) or model.module  # type: ignore[assignment]
    return model


def _sharding(module: nn.Module) -> bool:
    return any(cls.__name__ in ("FSDPModule", "FullyShardedDataParallel") for cls in type(module).__mro__)


def check_model(model: nn.Module, caller: str) -> None:
    check_module(model, caller)
    name = type(model).__name__
    if unwrapped(model) is not model:
        inner, again = ("_orig_mod", "torch.compile") if name == "OptimizedModule" else ("module", name)
        advice = (
            f"Patch the model itself, then wrap it: model = {again}(eulernet.patch(wrapped.{inner}, h=0.1))"
            if caller == "patch"
            else f"Look at the model itself: eulernet.{caller}(wrapped.{inner})"
        )
        raise EulernetError(f"{name} wraps the model. {advice}")
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise EulernetError(
                f"{path or ROOT} is a scripted or traced module ({type(module).__name__}), whose code is "
                "compiled. Patch the "
                "Python model it was made from, then use torch.jit.trace or torch.export."
            )
        if _sharding(module):
            raise EulernetError(
                f"{path or ROOT} is sharded by FSDP. Patch before sharding: eulernet.{caller}(model), then "
                "fully_shard(model)."
            )
