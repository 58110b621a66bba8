"""The Python frames that make an operation, and those that call a module."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import nn


@dataclass(slots=True)
class Frame:
    """A Python frame of an addition: its code, its instruction, and the module that is its first argument, if any."""

    code: CodeType
    lasti: int
    module: nn.Module | None


# Where a run is traced, and where it is begun.
_RECORDING = tuple(str(Path(__file__).with_name(name)) for name in ("trace.py", "sandbox.py"))
_MODULE_CALL = nn.Module.__call__.__code__.co_filename
_PLUMBING = tuple(
    torch.__path__[0] + name
    for name in (
        "/overrides.py",
        "/_ops.py",
        "/_library/",
        "/_compile.py",
        "/utils/_python_dispatch.py",
        "/_dynamo/",
        "/_tensor.py",
    )
)


def frames_of(frame: Any) -> Iterator[Frame]:
    """The frames from an operation up to the `forward` of the module that is being called, if it is not scripted."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _MODULE_CALL:
            if not isinstance(frame.f_locals.get("self"), torch.jit.ScriptModule):
                return
        elif not code.co_filename.startswith(_PLUMBING) and code.co_filename not in _RECORDING:
            first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            yield Frame(code, frame.f_lasti, first if isinstance(first, nn.Module) else None)
        frame = frame.f_back


def frames_calling(frame: Any) -> Iterator[Frame]:
    """The frames that lead to a module's call, from a hook of its own."""
    while frame is not None and frame.f_code.co_filename in (_MODULE_CALL, *_RECORDING):
        frame = frame.f_back
    return frames_of(frame)


def codes_of(frame: Any) -> Iterator[CodeType]:
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def forwards(cls: type[torch.autograd.Function] = torch.autograd.Function) -> dict[CodeType, str]:
    """The forwards of all kinds of `torch.autograd.Function` but torch's own, whose backwards run modules again."""
    found: dict[CodeType, str] = {}
    for kind in cls.__subclasses__():
        code = getattr(inspect.unwrap(kind.forward), "__code__", None)
        if code is not None and not kind.__module__.startswith("torch."):
            found[code] = kind.__qualname__
        found.update(forwards(kind))
    return found
