"""Triton's interpreter, which runs the kernels on a CPU, with the NumPy of today.

Triton 3.4 to 3.6 (of torch 2.8 to 2.11) takes a loop's bound from an array of one element by `int(array)`. NumPy calls
that deprecated from 1.25 on, which is an error in these tests, and refuses it in its latest releases. Triton 3.8 takes
the element out of the array first, and so does this.
"""

from typing import Any


def mend() -> None:
    """Bounds of loops are taken out of their arrays; to be called before the first kernel runs."""
    try:
        from triton.runtime import interpreter
    except ImportError:  # torch for the CPU alone comes without Triton on some systems
        return
    original = interpreter._patch_lang_tensor

    def mended(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = mended
