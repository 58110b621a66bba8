"""How tests build, run and compare the traps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.traps import TRAPS, Trap

every_trap = pytest.mark.parametrize("cls", TRAPS, ids=lambda cls: cls.__name__)
both_modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def build(cls: type[Trap], dtype: torch.dtype = torch.float32, training: bool = False) -> tuple[Trap, tuple[Any, ...]]:
    """The model with random parameters (many start at zero, which would hide everything) and its input."""
    torch.manual_seed(0)
    model = cls()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    inputs = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, model.inputs())
    return model.to(dtype).train(training), inputs


def run(model: nn.Module, inputs: tuple[Any, ...], forward: Any = None, **kwargs: Any) -> tuple[list[Any], list[Any]]:
    """Outputs, and gradients of the parameters and of the inputs, under one seed; the last is what is drawn next."""
    torch.manual_seed(1)
    inputs = tree_map_only(
        Tensor, lambda x: x.detach().clone().requires_grad_() if x.is_floating_point() else x, inputs
    )
    outputs = tree_leaves((forward or model)(*inputs, **kwargs))
    model.zero_grad()
    sum((y.float() * torch.linspace(0.5, 1, y.numel()).view_as(y)).sum() for y in outputs).backward()
    gradients = [x.grad for x in (*inputs, *model.parameters())]
    return outputs, [*gradients, torch.rand(3, dtype=torch.float64)]


def assert_identical(actual: list[Any], expected: list[Any]) -> None:
    for x, y in zip(actual, expected, strict=True):
        if y is None:
            assert x is None
        else:
            assert torch.equal(x, y) and x.dtype == y.dtype and x.stride() == y.stride()
