"""A network that is patched, copied, saved and exported; ways to copy one."""

import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn

import eulernet
from tests.traps.base import Block
from tests.traps.calls import BranchBegunByTheCaller, FreeFunction
from tests.traps.classes import Decorated, Extended


class Net(nn.Module):
    """Steps of several kinds: a plain one, a decorated one, one reached by ``super()``, and one in a free function."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = Block()
        self.decorated = Decorated()
        self.extended = Extended()
        self.free = FreeFunction.Part()
        self.dense = BranchBegunByTheCaller.Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.free(self.extended(self.decorated(self.plain(x)))))


NAMES = ["plain", "decorated", "extended", "free", "dense.attention_output", "dense.output"]

FACTORS = [0.25, 0.5, 0.75, 1.25, 1.5, 1.75]


def factors(model: nn.Module) -> list[float | None]:
    return [step.h for step in eulernet.steps(model)]


def by_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_save(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)
