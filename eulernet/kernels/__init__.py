"""Triton kernels of `eulernet.functional`, and who uses them: eager mode on a GPU, where it pays.

Nothing here imports Triton until a kernel is to run.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import warnings
from functools import cache
from subprocess import SubprocessError
from types import TracebackType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from eulernet._checks import brief
from eulernet._errors import EulernetError, EulernetWarning

__all__ = ["mode"]


class Pays(NamedTuple):
    """From how many MiB of a state on a kernel pays in eager mode: the host's time that it adds is what it saves."""

    without: float  # gradients
    backward: float  # with them

    def of(self, state: Tensor) -> bool:
        """Whether it is so large."""
        least = self.backward if state.requires_grad and torch.is_grad_enabled() else self.without
        return state.nbytes >= least * 2**20


# What an H200 said: `python -m benchmarks.gpu -k thresholds`, in benchmarks/results/gpu.json.
ACTIVATION, LAYER_SCALE, BATCH_NORM = Pays(4, 64), Pays(8, 32), Pays(16, 16)
LAYER_NORM, RMS_NORM = Pays(32, 64), Pays(64, 64)
# An RMSNorm that is written out is eight launches in eager mode. At 16 MiB Llama was measured, and it paid.
WRITTEN_OUT = Pays(1, 16)

Mode = Literal["auto", "torch", "triton"]
_KEY = "eulernet.kernels.mode"
_STRIDED = torch.strided
_has_storage = torch._C._has_storage
_TENSORS = (Tensor, nn.Parameter)


class mode:
    """Choose by hand what computes the steps of this thread: from here on, or within a `with` block.

    Args:
        name: `"auto"`: the kernels in eager mode on a GPU for states so large that they save more of its time than
            they cost of the host's (a few MiB without gradients, 64 and more with them), ATen elsewhere; `"torch"`:
            ATen; `"triton"`: the kernels at any size, and on the CPU under Triton's interpreter. Where a kernel can't
            compute what is asked (shapes that broadcast, transposed operands, `torch.compile`, `torch.func`), ATen
            does.

    Another thread has a mode of its own; the threads in which PyTorch runs a backward pass, and checkpointing the
    forward again, have that of the thread that called it.

    Raises:
        EulernetError: another name; or `"triton"` where Triton is not installed.

    Example:
        >>> import torch, eulernet
        >>> with eulernet.kernels.mode("torch"):
        ...     eulernet.functional.euler_step(torch.ones(2), torch.ones(2), 0.5)
        tensor([1.5000, 1.5000])
    """

    def __init__(self, name: Mode) -> None:
        if not (isinstance(name, str) and name in get_args(Mode)):
            raise EulernetError(f"mode({brief(name)}) is not known; use one of {', '.join(map(repr, get_args(Mode)))}")
        if name == "triton" and not _triton():
            raise EulernetError('Triton is not installed: pip install triton, or leave eulernet.kernels.mode("auto")')
        self._before = current()
        _set(name)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _set(self._before)


_asked = False  # whether any thread has asked for another mode than "auto"


def _set(name: Mode) -> None:
    global _asked
    _asked |= name != "auto"
    # torch 2.8 to 2.11 gives back a reference here that it has not taken, until Python frees what all others hold.
    # Where torch takes its own, a name is held once more than needed.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(name))
    torch._C._stash_obj_in_tls(_KEY, name)


def current() -> Mode:
    """The mode of this thread. Not a context variable, since autograd's threads inherit what is kept here only."""
    mode: Mode = torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else "auto"
    return mode


@cache
def _triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _works(device: int) -> bool:
    """Whether Triton can serve this GPU, and finds a C compiler, with which some versions build their launchers."""
    if not _triton():
        return False
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (7, 0):
        _warn(f"Triton serves GPUs of compute capability 7.0 and more, and GPU {device} has {capability}")
        return False
    from triton.runtime import driver

    try:
        driver.active.get_current_device()
    except Exception as error:
        _warn(f"Triton does not run here: {error}")
        return False
    return True


_broken = False  # a kernel did not compile; it is not tried again


def failed(error: Exception) -> None:
    """A kernel did not start: raise what is a bug, and where the kernels were asked for; else leave them alone."""
    global _broken
    from triton import TritonError

    # Triton's own errors, and those of the compilers that it calls; no subclass, of which one is want of memory.
    made = isinstance(error, TritonError | OSError | SubprocessError) or type(error) is RuntimeError
    if not made or current() == "triton":
        raise error
    if not _broken:
        _broken = True
        _warn(f"Triton could not compile a kernel: {error!r}")


def _warn(what: str) -> None:
    warnings.warn(
        f'{what}. So eulernet computes with ATen, which is slower. Mend that, or call eulernet.kernels.mode("torch"), '
        "which does not ask for Triton",
        EulernetWarning,
        stacklevel=2,
    )


def possible(state: Any, pays: Pays | None) -> Mode | None:
    """The mode in which a kernel may be chosen for a state, None for most: in a compiled graph, off the GPU, and where
    the state is smaller than what pays. It is asked first, of each operation that may be one, and costs almost nothing.
    """
    if torch.compiler.is_compiling() or type(state) not in _TENSORS:
        return None
    if _asked and (mode := current()) != "auto":
        return mode if mode == "triton" else None
    return "auto" if pays is not None and state.is_cuda and pays.of(state) else None


def chosen(skip: Any, branch: Any, pays: Pays | None) -> bool:
    """Whether a kernel is to compute a step of these operands. None pays: one kernel of ATen's does the same."""
    mode = possible(skip, pays)
    if mode is None or not (plain(skip) and plain(branch)):
        return False
    if mode == "auto":
        assert pays is not None
        if _broken:
            return False
        if branch.requires_grad and torch.is_grad_enabled() and skip.nbytes < pays.backward * 2**20:
            return False
        if not _works(skip.get_device()):
            return False
    elif not skip.is_cuda:
        if not skip.is_cpu:
            return False  # on the meta device there is nothing to compute
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise EulernetError(
                "Triton runs on the CPU only under its interpreter: set TRITON_INTERPRET=1 before Python starts, or "
                'call eulernet.kernels.mode("auto")'
            )
    return not transformed()


def transformed() -> bool:
    """Whether something watches each operation: `torch.func`, a dispatch mode, a tracer, forward mode."""
    return bool(
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def first_order(first: Tensor | None, second: Tensor | None = None) -> bool:
    """Whether a kernel may compute with these gradients: nobody is to differentiate what it makes of them."""
    if torch.is_grad_enabled() or transformed():
        return False
    return (first is None or plain(first)) and (second is None or plain(second))


def plain(tensor: Any) -> bool:
    """A tensor whose memory holds its elements: none of a subclass, which would have to be asked first.

    One that `torch.func` or `is_grads_batched` made looks like any other, but has no memory.
    """
    known = type(tensor) in _TENSORS and tensor.layout is _STRIDED and not (tensor.is_nested or tensor.is_neg())
    return known and _has_storage(tensor)
