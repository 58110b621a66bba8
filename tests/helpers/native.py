"""Networks written with the layers of `eulernet.nn`, and the blocks that these stand for, written by hand."""

import torch
from torch import Tensor, nn

from eulernet.nn import EulerStep, H, Recurrent, Residual


def branch(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride, 1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
        nn.Conv2d(after, after, 3, 1, 1, bias=False),
        nn.BatchNorm2d(after),
    )


class Written(nn.Module):
    """A block that is no layer of eulernet's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Mixed(nn.Module):
    """All layers that take images, and one block of its own: four steps."""

    def __init__(self, h: H = 0.1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.first = Residual(branch(8, 8), h, activation=nn.ReLU())
        self.second = Residual(branch(8, 16, 2), h, "auto", nn.ReLU(), layer_scale=0.5)
        self.own = Written(16)
        self.body, self.step = nn.Conv2d(16, 16, 1), EulerStep(h)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(self.second(self.first(self.stem(x))))
        return self.step(x, self.body(x)).mean((2, 3))


class PlainResidual(nn.Module):
    """What a `Residual` stands for, in operations of torch, with the modules of one."""

    def __init__(self, of: Residual, h: float) -> None:
        super().__init__()
        self.of, self.h = of, h

    def forward(self, x: Tensor) -> Tensor:
        f = self.of.drop_path(self.of.layer_scale(self.of.branch(x)))
        skip = x if self.of.shortcut is None else self.of.shortcut(x)
        return self.of.activation(skip + (f if self.h == 1 else self.h * f))


class OwnCell(nn.Module):
    def __init__(self, width: int, says: bool = True) -> None:
        super().__init__()
        self.map = nn.Linear(2 * width, width)
        if says:
            self.hidden_size = width

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return torch.tanh(self.map(torch.cat([x, state], -1)))


class Classifier(nn.Module):
    """A recurrent network over sequences."""

    def __init__(self, cell: nn.Module, h: H = 0.1) -> None:
        super().__init__()
        self.recurrent, self.head = Recurrent(cell, h, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.recurrent(x)
        return self.head(outputs[:, -1])
