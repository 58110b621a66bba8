"""Triton kernels of `eulernet.functional`, and who uses them: eager mode on a GPU, where the tensors are large enough.

Nothing here imports Triton until a kernel is to run.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from eulernet._errors import EulernetError, EulernetWarning

__all__ = ["mode"]

# Below this many bytes of a state the launch of a Triton kernel costs more than it saves. Not measured yet: a guess.
MIN_BYTES = 1 << 19
_MODES = ("auto", "torch", "triton")
_KEY = "eulernet.kernels.mode"
_STRIDED = torch.strided


class mode:
    """Choose by hand what computes the steps of this thread: from here on, or within a `with` block.

    Args:
        name: `"auto"`: the kernels in eager mode on a GPU for tensors of some size, ATen elsewhere; `"torch"`: ATen;
            `"triton"`: the kernels at any size, and on the CPU under Triton's interpreter. Where a kernel can't compute
            what is asked (shapes that broadcast, transposed operands, `torch.compile`, `torch.func`), ATen does.

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

    def __init__(self, name: str) -> None:
        if name not in _MODES:
            raise EulernetError(f"mode({name!r}) is not known; use one of {', '.join(map(repr, _MODES))}")
        if name == "triton" and not _triton():
            raise EulernetError('Triton is not installed: pip install triton, or leave eulernet.kernels.mode("auto")')
        self._before = current()
        torch._C._stash_obj_in_tls(_KEY, name)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        torch._C._stash_obj_in_tls(_KEY, self._before)


def current() -> str:
    """The mode of this thread. Not a context variable, since autograd's threads inherit what is kept here only."""
    return torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else "auto"


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
    """A kernel did not compile, or did not start: raise where the kernels were asked for, else leave them alone."""
    global _broken
    if current() == "triton":
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


def chosen(skip: Any, branch: Any, worth: bool = True) -> bool:
    """Whether a kernel is to compute a step of these operands. `worth`: it does more than one kernel of ATen's."""
    if torch.compiler.is_compiling():
        return False
    mode = current()
    if mode == "torch" or not (plain(skip) and plain(branch)):
        return False
    if mode == "auto":
        if not (worth and skip.is_cuda and not _broken and skip.nbytes >= MIN_BYTES and _works(skip.get_device())):
            return False
    elif skip.device.type not in ("cuda", "cpu"):
        return False  # on the meta device there is nothing to compute
    elif skip.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
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


def first_order(*gradients: Any) -> bool:
    """Whether a kernel may compute with these gradients: nobody is to differentiate what it makes of them."""
    if torch.is_grad_enabled() or transformed():
        return False
    # One that `is_grads_batched` batches looks like any other, but has no memory.
    return all(g is None or (plain(g) and torch._C._has_storage(g)) for g in gradients)


def plain(tensor: Any) -> bool:
    """A tensor whose memory holds its elements: none of a subclass, which would have to be asked first."""
    kind = type(tensor)
    known = kind is Tensor or kind is nn.Parameter
    return known and tensor.layout is _STRIDED and not (tensor.is_nested or tensor.is_neg())
