"""What `patch` warns of: what is left at h = 1, a trained network, depth counted twice, h that is rounded away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from eulernet._find.search import Search
from eulernet._find.starts import counted_twice, empty, relative_starts
from eulernet._patch.saved import saved_in
from eulernet._plot import together
from eulernet._run.patched import original_class
from eulernet._step import Step
from eulernet.schedules import FALLING, transfer

_HALF = (torch.float16, torch.bfloat16)
_LEAST = 8  # times the dtype's epsilon: below it a branch as large as the state is rounded to a few bits
_LEFT_ALONE = {
    "long": "long steps, whose branches run through other steps, so that the factors would multiply",
    "gated": "gated updates, which say themselves how far they go",
}


def kept_at_one(kept: Sequence[Step]) -> Iterator[str]:
    """That the main stream, from the model's input to its output, keeps sums at h = 1."""
    for kind, what in _LEFT_ALONE.items():
        these = [step.name for step in kept if step.kind == kind]
        if not these:
            continue
        names = ", ".join(these[:5]) + (f" and {len(these) - 5} more" if len(these) > 5 else "")
        yield (
            f"the stream from the model's input to its output keeps h = 1 at {names}: {what}. To scale them as well: "
            'eulernet.patch(model, h, include="*")'
        )


def not_supported(lines: Iterable[str]) -> Iterator[str]:
    """The sums that cannot be scaled, those of one place in the source together, and what can be done."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        name, _, place_and_reason = line.partition(" (")
        groups.setdefault(place_and_reason, []).append(name)
    for place_and_reason, names in groups.items():
        yield f"not scaled, because not supported: {together(names)} ({place_and_reason}"
    if groups:
        yield "To scale these as well, write eulernet.functional.euler_step(skip, branch, h) in the model's source"


def not_reached(model: nn.Module, search: Search) -> Iterator[str]:
    """That the example inputs never reached modules of a class that holds steps in others."""
    hosts = {original_class(found.host) for found in search.found}
    unreached = tuple(f"{name}." for name in search.steps.unreached)
    names = [
        name
        for name, module in model.named_modules()
        if f"{name}.".startswith(unreached) and original_class(module) in hosts
    ]
    if names:
        yield (
            f"{together(names)}: the example inputs never reached these modules, and others of their class hold steps. "
            "Where they run after all, h is 1. To scale them as well, lead an example through them: "
            "eulernet.patch(model, h, example_inputs=...)"
        )


def trained(model: nn.Module) -> Iterator[str]:
    """That the model has been trained, which another h would undo; nothing where no sign of it is seen.

    timm and torchvision do not keep whether weights were loaded; there the counters of batch norm tell.
    """
    if saved_in(model) is not None:
        return  # and at an h that is known, see `stored`
    for name, buffer in model.named_buffers():
        if not name.endswith("num_batches_tracked") or buffer.device.type == "meta":
            continue
        with _disable_current_modes():  # one of the caller's may have no values
            seen = int(buffer)
        if seen > 0:
            layer = name.rpartition(".")[0] or "its batch norm"
            yield _trained(model, f"{layer} has seen {seen} batch{'es' if seen > 1 else ''}")
            return
    for module in model.modules():
        source = getattr(module, "name_or_path", None)  # Hugging Face: what from_pretrained was called with
        if hasattr(module, "config") and isinstance(source, str) and source:
            yield _trained(model, f"its configuration names {source!r} as where it was loaded from")
            return


def stored(model: nn.Module, hs: Mapping[str, float]) -> Iterator[str]:
    """That the weights were saved at another h, as their folder says, or that what saves adapters would not save h."""
    yield from _adapters(model)
    if (found := saved_in(model)) is not None:
        folder, saved = found
        before = {step.name: step.h for step in saved}
        differing = [name for name in {**before, **hs} if before.get(name) != hs.get(name)]
        if differing:
            name = differing[0]
            shown = [f"h = {h:g}" if h is not None else "no step" for h in (before.get(name), hs.get(name))]
            yield (
                f"{type(model).__name__} was loaded from {folder!r}, where its weights were saved at other steps: "
                f"{name} had {shown[0]}, and gets {shown[1]}. To have those of the weights: eulernet.patch(model, "
                f"h=Path({folder!r}))"
            )


def when_set(model: nn.Module, planned: Sequence[tuple[Any, Any, float]]) -> Iterator[str]:
    """What `set_h` warns of; each of `planned` is a module, the factor of a step there, and its new value."""
    yield from rounded_away(model, [(module, value) for module, _, value in planned])
    if moved := [factor for _, factor, value in planned if factor.value != value]:
        yield from baked(model, moved)


def baked(model: nn.Module, moved: Iterable[object]) -> Iterator[str]:
    """That graphs were made which hold the h of before as a number, and share the weights: those of torch.fx, of CUDA.

    `moved` are the factors that get another value.
    """
    again = "and share its weights. Make them again now, or set h first, eulernet.set_h(model, 0.1), then make them"
    if any(getattr(factor, "traced", False) for factor in moved):
        yield (
            f"graphs of torch.fx were made from {type(model).__name__} (a feature extractor, a quantized model), which "
            f"keep the h of before {again}. What torch.compile and torch.export made follows by itself"
        )
    if any("make_graphed_callables" in getattr(f, "__qualname__", "") for f in _own_forwards(model)):
        yield f"graphs of CUDA were captured from {type(model).__name__}, which keep the h of before {again}"


def _own_forwards(model: nn.Module) -> Iterator[object]:
    return (module.__dict__["forward"] for module in model.modules() if "forward" in module.__dict__)


def _adapters(model: nn.Module) -> Iterator[str]:
    """That the adapters of PEFT in the model are saved by what is around it, and without h."""
    around = _is_of(model, "peft") or getattr(model, "_hf_peft_config_loaded", False)
    if not around and any(_is_of(module, "peft.tuners") for module in model.modules()):
        yield (
            f"{type(model).__name__} holds adapters of PEFT, and what saves them is around it and would not save h. "
            "Patch that: eulernet.patch(peft_model, h=0.1); or save the steps beside the adapter: "
            "eulernet.steps(model).save(FOLDER)"
        )


def _is_of(module: nn.Module, package: str) -> bool:
    return any(f"{cls.__module__}.".startswith(f"{package}.") for cls in type(module).__mro__)


def _trained(model: nn.Module, sign: str) -> str:
    return (
        f"{type(model).__name__} seems to be trained ({sign}), with h = 1 presumably: with any other h it is not the "
        "function that was learned, and as good as untrained. Either keep its function, eulernet.patch(model, h, "
        "preserve=True), or begin where it is, eulernet.patch(model, h=1.0), and move h while it trains on "
        "(eulernet.set_h)."
    )


def depth_twice(model: nn.Module, search: Search, h: Any) -> Iterator[str]:
    """That a rule of depth meets branches whose initial values fall with depth, or are zero, themselves."""
    if h == "auto" if isinstance(h, str) else isinstance(h, FALLING):
        starts = relative_starts(model, search)
        rule = '"auto"' if isinstance(h, str) else f"eulernet.schedules.{h!r}"
        if said := counted_twice(search, starts, rule):
            yield said
        if isinstance(h, transfer) and (said := empty(search, starts)):
            yield said


def rounded_away(model: nn.Module, steps: Iterable[tuple[Any, float]]) -> Iterator[str]:
    """That the increments of some steps, each a module and its h, are lost in a state of half precision.

    The state is taken to have the dtype of the module's parameters, or of the model's where the module has none.
    """
    lost = []
    default = _dtype(model, torch.float32)
    for module, h in steps:
        dtype = _dtype(module, default)
        if dtype in _HALF and h < _LEAST * torch.finfo(dtype).eps:
            lost.append((h, dtype))
    if lost:
        h, dtype = min(lost, key=lambda pair: pair[0])
        least = _LEAST * torch.finfo(dtype).eps
        yield (
            f"{len(lost)} step{'s have' if len(lost) > 1 else ' has'} an h down to {h:.2g} in "
            f"{str(dtype).removeprefix('torch.')}, whose rounding loses much of so small an increment when it is "
            f"added to the state. Keep h above {least:.2g}, or the model in float32."
        )


def _dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), default)
