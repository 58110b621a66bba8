"""The end of a sum over many rows, of which each program of a backward has made a part."""

from __future__ import annotations

import torch

from eulernet.kernels import _device
from eulernet.kernels._launch import Launch
from eulernet.kernels._layout import cdiv, power_of_two

# Elements and columns of a tile. Fewer columns are more programs; 16 are two of the sectors that memory is read in.
ELEMENTS, COLUMNS, WARPS = 4096, 16, 8


def sums(parts: int, columns: int, blocks: int, gradients: int, device: torch.device) -> Launch:
    """The one kernel that makes so many gradients of `columns` elements of parts of shape (parts, columns, blocks).

    Its tensors are the parts for scale, weight and bias, then these gradients; that of scale it multiplies by h.
    """
    width = min(COLUMNS, power_of_two(columns))
    tail = (parts, columns, blocks, min(ELEMENTS // width, power_of_two(parts * blocks)), width)
    return Launch(_device.sum_parts, gradients * cdiv(columns, width), device, tail, WARPS)
