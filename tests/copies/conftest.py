"""A network before and after it was patched, and its input."""

import copy

import pytest
import torch
from torch import Tensor

import eulernet
from tests.helpers.copied import FACTORS, NAMES, Net
from tests.traps.base import DIM


@pytest.fixture
def original() -> Net:
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, DIM)


@pytest.fixture
def model(original: Net, x: Tensor) -> Net:
    model = eulernet.patch(copy.deepcopy(original), FACTORS, example_inputs=x)
    assert [step.name for step in eulernet.steps(model)] == NAMES
    return model
