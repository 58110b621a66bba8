"""Networks whose h is learned."""

import torch
from torch import Tensor, nn

import eulernet
from eulernet import Step
from tests.traps.base import DIM, Block

X = torch.linspace(-1, 1, 2 * DIM).view(2, DIM)


def log_h(step: Step, keyed: bool = False) -> str:
    """The name of the parameter of a step, by the rule that the docstring of `patch` gives."""
    module, _, number = step.name.partition(":")
    if keyed:
        return "_".join(("log_h", *module.split("."), *([number] if number else []), "bias"))
    name = f"log_h_{number}_bias" if number else "log_h_bias"
    return name if module == "<root>" else f"{module}.{name}"


class Two(nn.Module):
    """A block of two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + self.b(x)


class Net(nn.Module):
    """Two stages of two blocks, and a block beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer2 = nn.Sequential(Two(), Two())
        self.last = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer2(self.layer1(x)))


NAMES = [
    *("layer1.0.log_h_bias", "layer1.1.log_h_bias", "layer2.0.log_h_0_bias", "layer2.0.log_h_1_bias"),
    *("layer2.1.log_h_0_bias", "layer2.1.log_h_1_bias", "last.log_h_bias"),
]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def factors(model: nn.Module) -> list[float | None]:
    return [step.h for step in eulernet.steps(model)]


def logs(model: nn.Module) -> list[str]:
    return [name for name in model.state_dict() if "log_h" in name]
