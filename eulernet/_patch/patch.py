"""Patch a model: give each block that holds a step a subclass of its class, with the additions rewritten.

Only `block.__class__` changes, and one entry of `block.__dict__` that holds h. The subclass is cached: all blocks of
one class with the same steps share it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from eulernet._checks import brief, check_model, check_module, each_of, is_sharded
from eulernet._commit import LOCK, commit
from eulernet._errors import EulernetError, EulernetWarning
from eulernet._find.absorb import absorbing, check_scalable, refusal, scale_parameters
from eulernet._find.apart import apart
from eulernet._find.search import FoundStep, Search
from eulernet._patch.cautions import (
    depth_twice,
    kept_at_one,
    not_reached,
    not_supported,
    rounded_away,
    stored,
    trained,
    when_set,
)
from eulernet._patch.prove import not_as_found, search
from eulernet._patch.saved import read_steps, saves_itself
from eulernet._patch.select import HLike, Selector, leave_out, names_given, select, values, which
from eulernet._patch.subclass import patched_class
from eulernet._run.factor import LearnedFactor, StepFactor
from eulernet._run.learned import Slot, check_shared, checked, plan_learned
from eulernet._run.patched import (
    Become,
    Factor,
    Patched,
    bound,
    check_names,
    original,
    original_class,
    places_of,
    slots,
)
from eulernet._source import Targets, Unsupported
from eulernet._step import Steps

Model = TypeVar("Model", bound=nn.Module)


def find_steps(model: nn.Module, *, example_inputs: Any = None) -> Steps:
    """The steps that `patch` would change; the model is left as it is.

    Args:
        model: any `torch.nn.Module`.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments that the model takes.
            Shapes, dtypes and devices matter, values do not. Guessed for models of timm, torchvision, Hugging Face and
            Lightning, which say what they take.

    Returns:
        `Steps`, which prints as a table. Its `long`, `gated`, `unsupported`, `unreached` and `notes` say what was
        seen besides.

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
    preserve: bool | Literal["where_possible"] = False,
    trainable: bool | Literal["step", "stage", "model"] = False,
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
            Likewise the steps that a checkpoint of a patched model holds: a folder (`Path`), a file, a state dict.
        example_inputs: as for `find_steps`.
        include, exclude: which steps: a pattern on names (`"layer1"`, `"blocks.*.attn"`), a module class, a function
            `(step) -> bool`, or a list of these. Long steps and gated updates are scaled only where `include` names
            them.
        preserve: for a network that is trained already: divide the last affine maps of each branch by h (batch norm,
            convolution, linear map, LayerScale), in place, so that the model computes what it computed, to rounding,
            until it is trained on. A branch that has no such map, or shares it, is an error; with "where_possible" its
            h stays what it was, 1. To undo this call `fold`: `unpatch` would leave the maps divided by h.
        trainable: learn h, beginning at the `h` that is given. True or "step": one h a step; "stage": one for the steps
            whose names are equal up to their last number, such as all of `layer1` in a ResNet or all `blocks` of a ViT;
            "model": one for all. Each is h = exp(log_h), so positive, and log_h a parameter of the block, of shape (1,)
            (FSDP2 takes no scalars) and of the block's dtype: `layer1.0.log_h_bias`, or `blocks.0.log_h_0_bias` and
            `blocks.0.log_h_1_bias` where a block has several steps; where one line of a loop adds for all layers, of
            the module with the loop: `log_h_layers_0_bias`. Blocks that share an h hold the same parameter, as tied
            weights do (and as with these, FSDP2 refuses to shard them apart). log_h must have no weight decay, which
            would pull h to 1; who decays by names or dimensions, as Hugging Face's Trainer and timm, leaves it out. In
            float16 and bfloat16 it is rounded like any parameter. The branch is kept for the gradient of h, and copied
            where it is the left operand of an addition in place. To fix what was learned: `eulernet.patch(model,
            h=eulernet.steps(model))`.

    Returns:
        The same model.

    Raises:
        EulernetError: no step was found, a value or pattern is wrong, the source of a step that `include` names (or of
            all) cannot be rewritten, or the function cannot be preserved. The model is then as it was. After any other
            error, an interrupt included, it is as it was or as it was to be, and the same call can be made again.

    Warns:
        EulernetWarning: something was seen that is not scaled; the model seems to be trained, and its function is not
            preserved; h falls with depth, and so do the initial values of the branches; h is lost to rounding in half
            precision.

    Example:
        >>> import torch, eulernet
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> layer = eulernet.patch(layer, h=0.1, example_inputs=torch.zeros(2, 5, 8))
        >>> [step.h for step in eulernet.steps(layer)]
        [0.1, 0.1]
        >>> layer = eulernet.patch(layer, h="auto", trainable=True, example_inputs=torch.zeros(2, 5, 8))
        >>> [name for name in layer.state_dict() if "log_h" in name]
        ['log_h_0_bias', 'log_h_1_bias']
    """
    check_model(model, "patch")
    if not (isinstance(preserve, bool) or (isinstance(preserve, str) and preserve == "where_possible")):
        raise EulernetError(
            f'preserve must be True, False or "where_possible", not {brief(preserve)}; for example preserve=True'
        )
    sharing = checked(trainable)
    h = read_steps(h, model)
    with search(model, example_inputs) as result:
        by_index = {f.step.index: f for f in result.found}
        if not by_index:
            seen = "".join(f"\n  seen and not supported: {line}" for line in result.steps.unsupported)
            seen += "".join(f"\n  note: {line}" for line in result.steps.notes)
            reasons = ", ".join(result.steps.reasons())
            others = f"\n  sums that are no steps: {reasons}" if reasons else ""
            raise EulernetError(
                f"no residual step was found in {type(model).__name__}: no addition of a tensor and a function "
                f"of it{' that can be scaled' if result.steps.unsupported else ''}.{seen}{others}\n"
                "eulernet.find_steps(model, example_inputs=...) shows what was seen; "
                "eulernet.functional.euler_step(skip, branch, h) writes a step by hand."
            )
        ordered = [by_index[i] for i in sorted(by_index)]
        found, modules = [f.step for f in ordered], [f.module for f in ordered]
        chosen = select(found, modules, include, exclude, h)
        decided = {s.index for s in which(found, modules, exclude, "exclude")} if exclude is not None else set()
        hs = dict(zip([s.index for s in chosen], values(h, chosen), strict=True))
        refused = {i: str(error) for i in hs if (error := by_index[i].error) is not None}
        wrong = dict(refused)
        while True:  # what cannot be scaled is left out, until the rest is proven
            leave_out([by_index[i].step for i in wrong], refused, hs, include)
            scales = _preserving(model, result, hs, preserve) if preserve else {}
            try:
                changes = _changes([by_index[i] for i in hs], hs, model, result.found)
            except Unsupported as reason:
                raise EulernetError(
                    f"{type(model).__name__} cannot be patched: {reason}; exclude= that step"
                ) from reason
            blocks = [(change.module, [f.step for f in change.found], change.hs) for change in changes]
            learned = [] if sharing is None else plan_learned(model, blocks, sharing)
            wrong = apart(lambda: not_as_found(result, changes, learned))  # noqa: B023 (called at once)
            if not wrong:
                break
            refused |= wrong
        main = result.main - decided - hs.keys() - refused.keys()
        twice = [] if preserve else list(depth_twice(model, result, h))
    check_scalable(model, scales)
    cautions = [
        *kept_at_one([step for step in found if step.index in main]),
        *not_supported(result.steps.unsupported),
        *(f"not scaled: {(s := by_index[i].step).name} ({s.module_class}): {why}" for i, why in refused.items()),
        *not_reached(model, result),
        *result.steps.notes,
        *twice,
        *stored(model, {by_index[i].step.name: value for i, value in hs.items()}),
    ]
    if not preserve:
        if not isinstance(h, Steps) and any(value != 1 for value in hs.values()):  # Steps restore what was there
            cautions += trained(model)
        cautions += rounded_away(model, ((f.module, hs[f.step.index]) for c in changes for f in c.found))
    if cautions:  # before anything is changed, since whoever calls may have made errors of warnings
        warnings.warn("\n".join(cautions), EulernetWarning, stacklevel=2)
    taken = {change.module for change in changes}
    commit(
        [
            *scale_parameters(scales),
            *(original(m) for m in model.modules() if isinstance(m, Patched) and m not in taken),
            *(
                change.of(lambda module: module, [slot for slot in learned if slot.module is change.module])
                for change in changes
            ),
        ]
    )
    return model


def _preserving(
    model: nn.Module, result: Search, hs: dict[int, float], preserve: bool | Literal["where_possible"]
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
            'Leave these at h = 1, and give h to the others: eulernet.patch(model, h, preserve="where_possible"). '
            "Or begin at h = 1 with all, eulernet.patch(model, h=1.0), and move h while the model trains on "
            "(eulernet.set_h).",
        )
    hs.update({index: now.get(index, 1.0) for index in refused})
    return scales


def factors_now(model: nn.Module, result: Search) -> dict[int, float]:
    """The h of each patched step, by its index among those that were found in the original."""
    found = {f.step.name: f for f in result.found}
    factors = {}
    for module, slot, step in slots(model):
        patched = {module._euler_plan[place][0] for place in places_of(module, slot)}
        if step.name not in found or patched != {site.location.targets for site in found[step.name].sites}:
            raise EulernetError(
                f"{step.name} ({type(module).__name__}) is patched, but these example inputs do not lead to the same "
                "additions; pass the example_inputs with which the model was patched"
            )
        assert step.h is not None
        factors[found[step.name].step.index] = step.h
    return factors


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


Models = TypeVar("Models", bound=nn.Module | Sequence[nn.Module])


def set_h(model: Models, h: HLike) -> Models:
    """Give the steps of a patched model new step factors; `h` as for `patch`. Compiled graphs are not compiled again.

    A copy of a model, such as the average of its weights, has an h of its own: `set_h([model, average], 0.1)`.

    Another thread may run the model meanwhile: each step takes the old h or the new one, and one of several additions
    (parallel branches, a loop) takes the same in all of them. The steps of one forward pass may differ in which of the
    two they take. A compiled graph reads h where it adds, and so do additions of one step that stand in several
    functions: set h between the forward passes there.

    Raises:
        EulernetError: the model is not patched, or a value is wrong; then nothing is changed.

    Warns:
        EulernetWarning: h is lost to rounding in half precision; a graph of torch.fx or of CUDA was made from the
            model, which keeps the h of before.

    Example:
        >>> import torch, eulernet
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> layer = eulernet.patch(layer, h=0.1, example_inputs=torch.zeros(2, 5, 8))
        >>> [step.h for step in eulernet.steps(eulernet.set_h(layer, {"<root>:0": 0.5, "*": 0.25}))]
        [0.5, 0.25]
    """
    models = each_of(model, "set_h")
    with LOCK:  # another thread may unpatch the model
        planned = [(one, *plan) for one in models for plan in _planned(one, h)]
        for one in models:
            for caution in when_set(
                one, [(module, factor, value) for of, module, factor, value in planned if of is one]
            ):
                warnings.warn(caution, EulernetWarning, stacklevel=2)
        commit([change for _, _, factor, value in planned for change in factor.set(value)])
    return model


def assign(model: nn.Module, h: HLike) -> None:
    """`set_h` without its warnings."""
    with LOCK:
        commit([change for _, factor, value in _planned(model, h) for change in factor.set(value)])


def _planned(model: nn.Module, h: HLike) -> list[tuple[nn.Module, Factor, float]]:
    """For each step of a patched model its module, its factor and the new value, after all checks."""
    held = bound(model, "set_h")
    steps = [step for _, step, _ in held]
    h = read_steps(h, model)
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
        if is_sharded(module):
            raise EulernetError(
                f"{type(module).__name__} is sharded by FSDP, whose classes are built on the patched ones. To have h = "
                "1 call eulernet.set_h(model, 1.0); to be rid of the patch, load the state_dict into a model that is "
                "not patched."
            )
    commit([original(module) for module in model.modules() if isinstance(module, Patched)])
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether any module of the model holds a step of eulernet's.

    Example:
        >>> import torch, eulernet
        >>> eulernet.is_patched(torch.nn.Linear(2, 2))
        False
    """
    check_module(model, "is_patched")
    return any(isinstance(module, Patched) and module._euler for module in model.modules())


@dataclass(frozen=True)
class _Change:
    """What happens to one module: its new class, its steps, their h, and who made the branches of which of them."""

    module: nn.Module
    cls: type[nn.Module]
    found: list[FoundStep]
    hs: list[float]
    places: dict[Targets, int] = field(default_factory=dict)
    keys: dict[nn.Module, dict[int, int | None]] = field(default_factory=dict)  # place -> step, None: not chosen
    norms: dict[int, nn.Module] = field(default_factory=dict)  # place -> what the next block calls with its state

    def of(self, twin: Callable[[nn.Module], nn.Module], learned: Sequence[Slot] = ()) -> Become:
        """The change, of the module or of its `twin` in a copy, with these parameters for its h."""
        factors: list[Factor] = [StepFactor(h, _like(twin(f.module))) for f, h in zip(self.found, self.hs, strict=True)]
        for slot in learned:
            factors[slot.number] = LearnedFactor(slot.name)
        parameters = {slot.name: slot.parameter for slot in learned}
        keys = {twin(key): at for key, at in self.keys.items()}
        norms = {place: twin(norm) for place, norm in self.norms.items()}
        return Become(twin(self.module), self.cls, factors, [f.step for f in self.found], parameters, keys, norms)


def _like(module: nn.Module) -> Tensor | None:
    return next((p for p in (*module.parameters(), *module.buffers()) if p.is_floating_point()), None)


def _changes(
    found: Sequence[FoundStep], hs: dict[int, float], model: nn.Module, everything: Sequence[FoundStep]
) -> list[_Change]:
    changes = []
    for module in {id(f.host): f.host for f in found}.values():
        mine = [f for f in found if f.host is module]
        plan: dict[Targets, Any] = {}
        for slot, f in enumerate(mine):
            for s in f.sites:
                own = slot if f.module is module else None
                plan.setdefault(s.location.targets, (s.location.targets, own, s.skip_is_left, s.subtracts))
        places = {targets: place for place, targets in enumerate(plan)}
        slots = {f.step.index: slot for slot, f in enumerate(mine)}
        keys: dict[nn.Module, dict[int, int | None]] = {}
        for f in everything:
            for s in f.sites if f.host is module and f.module is not module else ():
                if s.location.targets in places:
                    keys.setdefault(f.module, {})[places[s.location.targets]] = slots.get(f.step.index)
        check_names(module, mine[0].step, mine[0].step.name)
        keyed = [f for f in everything if f.host is module and f.module in keys]
        for f in keyed:
            check_names(f.module, f.step, [other.step.name for other in keyed])
        cls = patched_class(original_class(module), tuple(plan.values()))
        changes.append(_Change(module, cls, mine, [hs[f.step.index] for f in mine], places, keys))
    taken = {(c.module, targets[-1][1].given) for c in changes for targets in c.places}
    for change in changes:
        for s in (s for f in change.found for s in f.sites):
            if s.next_norm is not None and s.next_norm in taken:
                block, name = s.next_norm
                change.norms[change.places[s.location.targets]] = getattr(block, name)
    layers = {id(c.module) for c in changes if isinstance(c.module, nn.TransformerEncoderLayer)}
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(id(layer) in layers for layer in encoder.layers):
            changes.append(_Change(encoder, patched_class(original_class(encoder), ()), [], []))
    patched = {change.module for change in changes}
    for saver in model.modules():  # which writes the steps beside the weights
        if saves_itself(type(saver)) and saver not in patched and not patched.isdisjoint(saver.modules()):
            changes.append(_Change(saver, patched_class(original_class(saver), ()), [], []))
    return changes
