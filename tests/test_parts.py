"""Which part of a tensor a view is, compared with what the view holds."""

from typing import Any

import pytest
import torch

from eulernet._find.parts import apart, part_of, same_part

SHAPE = (4, 7)
X = torch.arange(28).view(SHAPE)
# Of each the operation, and its arguments behind the tensor.
VIEWS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("narrow", (1, 2, 3), {}),
    ("narrow", (-2, 1, 2), {}),
    ("select", (0, -1), {}),
    ("select", (1, 3), {}),
    ("chunk", (3,), {"dim": 1}),
    ("chunk", (2, 0), {}),
    ("split", (3, 1), {}),
    ("split", ([2, 5],), {"dim": -1}),
    ("unbind", (1,), {}),
]


@pytest.mark.parametrize(("op", "args", "kwargs"), VIEWS)
def test_the_index_gives_the_view(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    views = getattr(X, op)(*args, **kwargs)
    for output, view in enumerate(views if isinstance(views, tuple) else (views,)):
        assert torch.equal(X[part_of(op, [0, *args], kwargs, output, SHAPE)], view)


def test_two_parts_are_apart_where_they_share_no_element() -> None:
    indices = [
        (slice(0, 2),),
        (..., slice(0, 3)),
        (..., slice(3, None)),
        (3,),
        (slice(None, None, 2), 1),
        (slice(1, 2), 1),
    ]
    for one in indices:
        for other in indices:
            assert apart(one, other, SHAPE) == (not set(X[one].flatten().tolist()) & set(X[other].flatten().tolist()))
    assert not apart(torch.tensor([0]), (slice(0, 2),), SHAPE) and not apart(None, (3,), SHAPE)


def test_parts_are_the_same_in_any_spelling() -> None:
    assert same_part((slice(None), slice(0, 3)), (..., slice(None, 3)), SHAPE)
    assert not same_part((slice(None), slice(0, 3)), (slice(0, 3),), SHAPE) and not same_part(None, None, SHAPE)
