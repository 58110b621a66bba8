"""A reference for h that does not rewrite: the branch operands of chosen additions are scaled while the model runs.

The additions are recognised by where they stand in the source and by the module whose method they stand in. That is all
that it shares with the library: no function, class or instance of the model changes.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eulernet import Step

_IN_PLACE = frozenset({"add_", "__iadd__", "sub_", "__isub__"})
_OUT_OF_PLACE = frozenset({"add", "__add__", "__radd__", "sub", "subtract", "__sub__"})
_Place = tuple[str, int, int, int, int]  # file, first line, last line, first column, last column


@contextlib.contextmanager
def reference(model: nn.Module, steps: Iterable[Step], h: float | Sequence[float]) -> Iterator[nn.Module]:
    """Within it `model`, unchanged, computes s + h * f in each of `steps`; h is a number or one value a step.

    In-place additions stay in place, so gradients are not for this reference where the branch is the left operand.
    """
    steps = list(steps)
    values = [float(h)] * len(steps) if isinstance(h, int | float) else [float(value) for value in h]
    scaled: dict[tuple[str, _Place], deque[tuple[str, float]]] = defaultdict(deque)
    for step, value in zip(steps, values, strict=True):
        name = re.sub(r":\d+$", "", step.name)
        for p in step.places:
            place = (p.file, p.line, p.end_line, p.column, p.end_column)
            scaled[name, place].append((p.skip, value))
    with _Scale({id(module): name or "<root>" for name, module in model.named_modules()}, scaled):
        yield model


class _Scale(TorchFunctionMode):
    def __init__(self, names: dict[int, str], scaled: dict[tuple[str, _Place], deque[tuple[str, float]]]) -> None:
        super().__init__()
        self.names = names
        self.scaled = scaled
        self.files = {place[0] for _, place in scaled}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if (name in _IN_PLACE or name in _OUT_OF_PLACE) and len(args) > 1:
            found = self._lookup(sys._getframe(1))
            if found is not None:
                left, right, *rest = args
                skip, h = found
                if skip == "left":
                    right = right * h
                elif name in _IN_PLACE:
                    left.mul_(h)
                else:
                    left = left * h
                return func(left, right, *rest, **kwargs)
        return func(*args, **kwargs)

    def _lookup(self, frame: FrameType | None) -> tuple[str, float] | None:
        """The skip's side and h of the step that this addition is: the innermost frame's, up to a method."""
        while frame is not None:
            if frame.f_code.co_filename in self.files:
                place = _place(frame.f_code, frame.f_lasti)
                found = self._of(self._module(frame), place)
                if found:
                    found.rotate(-1)  # steps that share a function's addition take turns
                    return found[-1]
            if isinstance(_first_argument(frame), nn.Module):
                return None
            frame = frame.f_back
        return None

    def _of(self, module: str, place: _Place) -> deque[tuple[str, float]]:
        """The steps of a module at a place: its own, or those that a loop there makes, named by the layers below it."""
        if (module, place) not in self.scaled:
            inside = "" if module == "<root>" else f"{module}."
            layers = [found for (name, at), found in self.scaled.items() if at == place and name.startswith(inside)]
            self.scaled[module, place] = deque(entry for found in layers for entry in found)
        return self.scaled[module, place]

    def _module(self, frame: FrameType | None) -> str:
        """The name of the module whose method runs in this frame, or in the nearest one around it."""
        while frame is not None:
            name = self.names.get(id(_first_argument(frame)))
            if name is not None:
                return name
            frame = frame.f_back
        return ""


def _first_argument(frame: FrameType) -> Any:
    code = frame.f_code
    if code.co_argcount == 0:
        return None
    value = frame.f_locals.get(code.co_varnames[0])
    return value if isinstance(value, nn.Module) else None


def _place(code: CodeType, instruction: int) -> _Place:
    line, end_line, column, end_column = _positions(code)[instruction // 2]
    return code.co_filename, line or 0, end_line or 0, column or 0, end_column or 0


@cache  # code objects are equal where they stand at the same line of two files, so the file is not for this cache
def _positions(code: CodeType) -> list[tuple[int | None, int | None, int | None, int | None]]:
    return list(code.co_positions())


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of an output: of tuples, lists, dicts and the attributes of other objects (caches), in order."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, dict):
            children = list(value.values())
        elif isinstance(value, list | tuple):
            children = list(value)
        else:
            children = list(vars(value).values()) if hasattr(value, "__dict__") and not callable(value) else []
        for child in children:
            visit(child)

    visit(tree)
    return found
