"""How small branches start: zero at first, as with timm's zero-initialised norms and small LayerScales, or smaller with
depth, as GPT-2's output projections, by 1 / sqrt(D). What falls with depth there and again in h is counted twice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor, nn

from eulernet._find.absorb import absorbing
from eulernet._find.branches import branch_parameters
from eulernet._find.search import Search

TINY = 1e-3  # branches that start below this share are as good as zero at first
_DEEP = 8  # with fewer steps 1 / sqrt(D) is within what conventions of initial values differ by
_NEAR = 1.25  # times 1 / sqrt(D)
_MOST = 0.9  # of the branches


def relative_starts(model: nn.Module, search: Search) -> dict[int, float]:
    """For steps, by index, how large the last affine maps of the branch are: relative to its other maps, in root mean
    square; to 1, where these are scales alone (batch norm, LayerScale). What cannot be told is left out."""
    if any(p.is_meta for p in model.parameters()):
        return {}
    holders = branch_parameters(search)
    last, _ = absorbing(model, search, {f.step.index: 2.0 for f in search.found})
    starts = {}
    for index in set(holders.values()):
        mine = [p for p, holder in holders.items() if holder == index]
        maps = [_size(p) for p in mine if _is_map(p) and p not in last]
        ends = [_size(p) for p in mine if _is_map(p) and p in last]
        scales = [_size(p) for p in mine if p in last]
        if ends and maps and median(maps) > 0:
            starts[index] = max(ends) / median(maps)
        elif scales and not ends:
            starts[index] = max(scales)
    return starts


def _is_map(parameter: Tensor) -> bool:
    return sum(n > 1 for n in parameter.shape) > 1


def _size(parameter: Tensor) -> float:
    dtype = torch.float32 if parameter.dtype in (torch.float16, torch.bfloat16) else None
    return float(torch.linalg.vector_norm(parameter.detach(), dtype=dtype)) / math.sqrt(parameter.numel())


def counted_twice(search: Search, starts: Mapping[int, float], rule: str) -> str:
    """That the initial values of the branches fall with depth, as the rule does, and what to call; "" where not."""
    steps = {f.step.index: f.step for f in search.found if f.step.index in starts and f.step.depth >= _DEEP}
    small = {i: s for i, s in steps.items() if TINY < starts[i] <= _NEAR / math.sqrt(s.depth)}
    if not small or len(small) < _MOST * len(steps):
        return ""
    size, depth = median(starts[i] for i in small), max(s.depth for s in small.values())
    by_root = all(starts[i] * math.sqrt(s.depth) * _NEAR >= 1 for i, s in small.items())
    about, h = (f", which is 1 / sqrt(D) for D = {depth}", '"auto"') if by_root else ("", f"{size:.2g}")
    return (
        f"the output maps of {len(small)} of {len(steps)} branches start {size:.2g} times as large as the other maps "
        f"there{about}: depth is in the initial values already, and a rule of depth for h counts it again. To "
        f"have it in h alone, move it there first: eulernet.patch(model, h={h}, preserve=True), then "
        f"eulernet.set_h(model, {rule})"
    )


def empty(search: Search, starts: Mapping[int, float]) -> str:
    """That branches are zero at the start, or nearly, which a small h does again; "" where not."""
    zero = [i for i, size in starts.items() if size <= TINY]
    if not zero:
        return ""
    name = next(f.step.name for f in search.found if f.step.index == zero[0])
    return (
        f"{len(zero)} of {len(starts)} branches are zero at the start, or nearly ({name}): they grow with training, at "
        "any depth, and h lowers their learning rate on top. Have one of the two: h = 1, eulernet.unpatch(model), or "
        "other initial values (timm: zero_init_last=False; LayerScale: init_values=1)"
    )
