"""What `patch` warns of: what is left at h = 1, a trained network, depth counted twice, h that is rounded away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from eulernet._find.search import Search
from eulernet._find.starts import counted_twice, empty, relative_starts
from eulernet._plot import together
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
        long = [step for step in kept if step.kind == kind]
        if not long:
            continue
        names = ", ".join(step.name for step in long[:5]) + (f" and {len(long) - 5} more" if len(long) > 5 else "")
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


def trained(model: nn.Module) -> Iterator[str]:
    """That the model has been trained, which another h would undo; nothing where no sign of it is seen.

    timm and torchvision do not keep whether weights were loaded; there the counters of batch norm tell.
    """
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked") and buffer.device.type != "meta" and (seen := int(buffer)) > 0:
            layer = name.rpartition(".")[0] or "its batch norm"
            yield _trained(model, f"{layer} has seen {seen} batch{'es' if seen > 1 else ''}")
            return
    for module in model.modules():
        source = getattr(module, "name_or_path", None)  # Hugging Face: what from_pretrained was called with
        if hasattr(module, "config") and isinstance(source, str) and source:
            yield _trained(model, f"its configuration names {source!r} as where it was loaded from")
            return


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
