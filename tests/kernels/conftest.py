"""What each test of a kernel runs under."""

from collections.abc import Iterator

import pytest
import torch

from eulernet import kernels
from tests.helpers.kernels import DEVICE


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What a kernel is to write into holds NaN before."""
    with kernels.mode("auto"):
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(3, device=DEVICE).isnan().all() and torch.ones(1).new_empty(3).isnan().all()
            yield
        finally:
            torch.use_deterministic_algorithms(False)
