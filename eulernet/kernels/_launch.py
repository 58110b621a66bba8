"""Starting a kernel: the first time through Triton, which compiles it, then what was compiled, directly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eulernet import kernels
from eulernet.kernels._layout import ALIGNED


class Unavailable(Exception):
    """A kernel that Triton cannot make for this GPU."""


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply` without what it does for `torch.func`, which `kernels.chosen` has seen to be absent."""
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


class Launch:
    """A kernel with all its arguments but the tensors and h, which are of the same kinds each time.

    Triton looks at each argument of each launch, to find which of its compiled kernels takes them. Here all but the
    alignment of the tensors is known, so that the one for aligned tensors is kept and started by itself. Others, and
    what the interpreter runs, go through Triton. Hooks of Triton's profiler see only these.
    """

    __slots__ = ("index", "kernel", "programs", "start", "stream", "tail", "warps")

    def __init__(self, kernel: Any, programs: int, device: torch.device, tail: tuple[Any, ...], warps: int = 4) -> None:
        self.kernel, self.programs, self.tail, self.warps = kernel, programs, tail, warps
        self.index = device.index if device.type == "cuda" else None
        self.start: Any = None
        self.stream: Any = None

    def __call__(self, tensors: tuple[Tensor | None, ...], h: float) -> None:
        index = self.index
        if index is not None and index != torch._C._cuda_getDevice():
            with torch.cuda.device(index):
                return self(tensors, h)
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        bits = 0
        for pointer in pointers:
            if pointer is not None:
                bits |= pointer
        if bits % ALIGNED:
            self._through_triton(tensors, h)
        elif self.start is None:
            self._keep(self._through_triton(tensors, h))
        else:
            run, function, metadata = self.start
            stream = self.stream(index or 0)
            run(self.programs, 1, 1, stream, function, metadata, None, None, None, *pointers, h, *self.tail)
        return None

    def _through_triton(self, tensors: tuple[Tensor | None, ...], h: float) -> Any:
        try:
            return self.kernel[(self.programs,)](*tensors, h, *self.tail, num_warps=self.warps)
        except Exception as error:
            kernels.failed(error)
            raise Unavailable from error

    def _keep(self, compiled: Any) -> None:
        """What Triton's own launch calls, of the versions that are known to call it so; in the interpreter nothing."""
        if compiled is None or not _known():
            return
        from triton.runtime import driver

        self.stream = driver.active.get_current_stream
        self.start = compiled.run, compiled.function, compiled.packed_metadata


def _known() -> bool:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return (3, 3) <= (int(major), int(minor)) <= (3, 8)
