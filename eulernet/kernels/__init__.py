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

# Below this many elements the launch of a Triton kernel costs more than it saves. Not measured yet: a guess.
MIN_ELEMENTS = 1 << 17
_MODES = ("auto", "torch", "triton")
_mode = "auto"


class mode:
    """Choose by hand what computes the steps: from here on, or within a `with` block.

    Args:
        name: `"auto"`: the kernels in eager mode on a GPU for tensors of some size, ATen elsewhere; `"torch"`: ATen;
            `"triton"`: the kernels at any size, and on the CPU under Triton's interpreter. Where a kernel can't compute
            what is asked (shapes that broadcast, transposed operands, `torch.compile`, `torch.func`), ATen does.

    Raises:
        EulernetError: another name; or `"triton"` where Triton is not installed.

    Example:
        >>> import torch, eulernet
        >>> with eulernet.kernels.mode("torch"):
        ...     eulernet.functional.euler_step(torch.ones(2), torch.ones(2), 0.5)
        tensor([1.5000, 1.5000])
    """

    def __init__(self, name: str) -> None:
        global _mode
        if name not in _MODES:
            raise EulernetError(f"mode({name!r}) is not known; use one of {', '.join(map(repr, _MODES))}")
        if name == "triton" and not _triton():
            raise EulernetError('Triton is not installed: pip install triton, or leave eulernet.kernels.mode("auto")')
        self._before = _mode
        _mode = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _mode
        _mode = self._before


@cache
def _triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _works() -> bool:
    """Whether Triton is there and finds what it needs on a GPU: a C compiler, with which it builds its launchers."""
    if not _triton():
        return False
    from triton.runtime import driver

    try:
        driver.active.get_current_device()
    except Exception as error:
        warnings.warn(
            f"Triton does not run here, so that eulernet computes with ATen, which is slower: {error}. Mend that, or "
            'call eulernet.kernels.mode("torch"), which does not ask for it',
            EulernetWarning,
            stacklevel=2,
        )
        return False
    return True


def chosen(skip: Any, branch: Any, worth: bool = True) -> bool:
    """Whether a kernel is to compute a step of these operands. `worth`: it does more than one kernel of ATen's."""
    if torch.compiler.is_compiling() or _mode == "torch":
        return False
    if not (plain(skip) and plain(branch)):
        return False
    if _mode == "auto":
        if not (worth and skip.is_cuda and skip.numel() >= MIN_ELEMENTS and _works()):
            return False
    elif skip.device.type not in ("cuda", "cpu"):
        return False  # on the meta device there is nothing to compute
    elif skip.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise EulernetError(
            "Triton runs on the CPU only under its interpreter: set TRITON_INTERPRET=1 before Python starts, or "
            'call eulernet.kernels.mode("auto")'
        )
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def plain(tensor: Any) -> bool:
    """A tensor whose memory holds its elements: none of a subclass, which would have to be asked first."""
    known = type(tensor) is Tensor or type(tensor) is nn.Parameter
    return known and tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_neg())
