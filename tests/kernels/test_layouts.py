"""How the kernels walk over the memory of their operands."""

from typing import Any

import pytest

pytest.importorskip("triton")
from eulernet.kernels import _layout

# The interpreter of Triton 3.6 makes numbers of arrays with one element. NumPy warns of it, and refuses it from 2.4 on.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


# ---------------------------------------------------------------------------------------------------------------- walks


@pytest.mark.parametrize(
    ("shape", "stride", "small", "sizes", "axes"),
    [
        ((4, 5, 8), (40, 8, 1), (-1, -1), (1, 1, 160), (-1, -1)),
        ((4, 5, 8), (40, 8, 1), (2, -1), (1, 20, 8), (2, -1)),
        ((4, 5, 8), (40, 8, 1), (2, 0), (4, 5, 8), (2, 0)),
        ((4, 6, 3, 5), (90, 15, 5, 1), (1, -1), (4, 6, 15), (1, -1)),
        ((4, 6, 3, 5), (90, 1, 30, 6), (1, 0), (4, 15, 6), (2, 0)),
        ((4, 4, 8), (40, 8, 1), (-1, -1), (1, 4, 32), (-1, -1)),
        ((1, 6, 3, 5), (90, 15, 5, 1), (1, -2), (1, 6, 15), (1, -2)),
    ],
)
def test_operands_are_walked_over_along_their_memory(
    shape: Any, stride: Any, small: Any, sizes: Any, axes: Any
) -> None:
    way = _layout.layout(shape, (stride, stride), small)
    assert way is not None
    assert ((way.outer, way.middle, way.inner), way.axes) == (sizes, axes)


def test_what_has_no_common_walk_has_none() -> None:
    assert _layout.layout((4, 8), ((8, 1), (1, 4)), (-1, -1)) is None  # one operand is transposed
    assert _layout.layout((4, 8), ((16, 2), (16, 2)), (-1, -1)) is None  # gaps
    assert _layout.layout((4, 8), ((8, 1), (8, 1)), (-3, -1)) is None  # scale has several dimensions


@pytest.mark.parametrize("rows", [1, 3, 4096])
@pytest.mark.parametrize("inner", [1, 7, 64, 96, 768, 3136, 2**20, 2**31 + 1])
def test_tiles_fit_rows_and_columns(rows: int, inner: int) -> None:
    height, width = _layout.tile(rows, inner)
    assert height & (height - 1) == 0 and width & (width - 1) == 0 and height * width <= _layout.TILE
    assert height >= min(rows, _layout.TILE // width) // 2 + 1 or height * width == _layout.TILE
