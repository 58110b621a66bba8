"""Small networks on noisy two-moon points: those with one h are trained at once, stacked by `torch.func.vmap`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import eulernet
from reproductions.data.two_moons import two_moons
from reproductions.models import ResidualMLP


@dataclass(frozen=True)
class Protocol:
    """What is the same in all trainings.

    `noise` is the standard deviation of the noise on each coordinate of all points; `probe_noise` that of the further
    noise whose amplification is measured.
    """

    steps: int = 50
    hidden: int = 16
    train_points: int = 256
    test_points: int = 1000
    noise: float = 0.25
    probe_noise: float = 0.05
    epochs: int = 80
    batch_size: int = 64
    momentum: float = 0.9


@dataclass(frozen=True)
class Arm:
    """One of the things compared.

    Under SGD without weight decay a network with step factor h trains exactly as one with h = 1 whose branches' last
    maps start at h times their values and learn with h^2 times the learning rate. The controls have one of these each.

    Attributes:
        h: the step factor, given by `eulernet.patch`; 1 is the module as it was written.
        initial: factor on the initial weights and biases of each block's second map.
        rate: factor on the learning rate of each block's second map.
    """

    h: float = 1.0
    initial: float = 1.0
    rate: float = 1.0

    def __str__(self) -> str:
        if self.initial != 1:
            return f"h = {self.h:g}, initial value x {self.initial:g}"
        if self.rate != 1:
            return f"h = {self.h:g}, learning rate x {self.rate:g}"
        return f"h = {self.h:g}"


@dataclass(frozen=True)
class Trial:
    """One training: data, initial values and the order of the points follow from the seed."""

    arm: Arm
    learning_rate: float
    seed: int


# ---- one group of trainings
def build(arm: Arm, protocol: Protocol, seed: int = 0) -> ResidualMLP:
    """The network of an arm as it is before training."""
    torch.manual_seed(seed)
    network = ResidualMLP(protocol.steps, protocol.hidden)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if _is_second(name):
                parameter.mul_(arm.initial)
    if arm.h != 1:
        eulernet.patch(network, h=arm.h, example_inputs=torch.zeros(2, 2))
    return network


def _is_second(name: str) -> bool:
    return ".second." in name


def train(
    group: Sequence[Trial], protocol: Protocol, progress: Callable[[float], None] = lambda share: None
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Train networks with one h at once, by SGD with momentum, each on data of its own.

    Args:
        group: the trainings; their arms have the same h.
        protocol: what is the same in all of them.
        progress: called with the share that is done.

    Returns:
        The results, one a training, and the trained parameters, stacked in the first dimension.
    """
    networks = {key: build(*key) for key in {(trial.arm, protocol, trial.seed) for trial in group}}
    network = next(iter(networks.values()))
    stacked, _ = stack_module_state([networks[trial.arm, protocol, trial.seed] for trial in group])
    parameters = {name: value.detach().requires_grad_() for name, value in stacked.items()}

    def forward(values: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = functional_call(network, values, (x,))
        return output

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return vmap(lambda values, x, y: nn.functional.cross_entropy(forward(values, x), y))(parameters, x, y)

    # Seeds have data, a training has its copy of them.
    seeds = sorted({trial.seed for trial in group})
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    of_trial = torch.tensor([seeds.index(trial.seed) for trial in group])
    sets = [_stack([two_moons(points, protocol.noise, g) for g in generators]) for points in _sizes(protocol)]
    (train_x, train_y), validation, test = [(x[of_trial], y[of_trial]) for x, y in sets]

    rates = {
        name: torch.tensor([t.learning_rate * (t.arm.rate if _is_second(name) else 1.0) for t in group])
        for name in parameters
    }
    velocity = {name: torch.zeros_like(value) for name, value in parameters.items()}
    curve = []
    for epoch in range(protocol.epochs):
        order = torch.stack([torch.randperm(protocol.train_points, generator=g) for g in generators])[of_trial]
        total = torch.zeros(len(group))
        for batch in torch.split(order, protocol.batch_size, dim=1):
            loss = losses(train_x.gather(1, batch[..., None].expand(-1, -1, 2)), train_y.gather(1, batch))
            gradients = torch.autograd.grad(loss.sum(), list(parameters.values()))
            total += loss.detach() * batch.shape[1] / protocol.train_points
            with torch.no_grad():
                for (name, value), gradient in zip(parameters.items(), gradients, strict=True):
                    velocity[name].mul_(protocol.momentum).add_(gradient)
                    value.sub_(velocity[name] * rates[name].view(-1, *[1] * (value.dim() - 1)))
        curve.append(total)
        progress((epoch + 1) / protocol.epochs)

    with torch.no_grad():
        measured = {
            "train_loss": losses(train_x, train_y),
            "validation_accuracy": _accuracy(vmap(forward)(parameters, validation[0]), validation[1]),
            "test_accuracy": _accuracy(vmap(forward)(parameters, test[0]), test[1]),
            "feature_step": _feature_step(network, parameters, test[0]),
            "weight": _weight(parameters),
            **_amplification(network, parameters, test[0], protocol.probe_noise, generators, of_trial),
        }
    every = max(1, protocol.epochs // 10)
    shown = torch.stack(curve[every - 1 :: every], dim=1).tolist()
    results = []
    for index in range(len(group)):
        result = {name: values[index].item() for name, values in measured.items()}
        results.append({"failed": failed(result["train_loss"]), **result, "train_loss_curve": shown[index]})
    return results, {name: value.detach() for name, value in parameters.items()}


def failed(train_loss: float) -> bool:
    """Whether a training has failed: its final loss is not finite, or hardly below that of guessing."""
    return not train_loss <= 0.95 * math.log(2)


def _sizes(protocol: Protocol) -> tuple[int, int, int]:
    return protocol.train_points, protocol.test_points, protocol.test_points


def _stack(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in parts]), torch.stack([y for _, y in parts])


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=-1) == labels).double().mean(dim=-1)


def _feature_step(network: ResidualMLP, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """`||x_{n+1} - x_n|| / ||x_n||`, the mean over blocks and points."""

    def moved(values: dict[str, Tensor], x: Tensor) -> Tensor:
        ratios = []
        for number, block in enumerate(network.blocks):
            start = f"blocks.{number}."
            own = {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}
            after: Tensor = functional_call(block, own, (x,))
            ratios.append(((after - x).norm(dim=-1) / x.norm(dim=-1)).mean())
            x = after
        return torch.stack(ratios).mean()

    return vmap(moved)(parameters, x)


def _weight(parameters: dict[str, Tensor]) -> Tensor:
    """The norm of the weights of all blocks together."""
    weights = [value for name, value in parameters.items() if name.startswith("blocks.") and name.endswith("weight")]
    return torch.stack([weight.flatten(1).square().sum(dim=1) for weight in weights]).sum(dim=0).sqrt()


def _amplification(
    network: ResidualMLP,
    parameters: dict[str, Tensor],
    x: Tensor,
    noise: float,
    generators: Sequence[torch.Generator],
    of_trial: Tensor,
) -> dict[str, Tensor]:
    """How much farther apart the last features of clean and noisy points are than the points: the median over points.

    The relative one is divided by how much the features as a whole have spread (root mean squared distance to their
    mean): noise that grows just as the features do blurs nothing.
    """
    e = noise * torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])[of_trial]

    def features(values: dict[str, Tensor], x: Tensor) -> Tensor:
        blocks = {name.removeprefix("blocks."): value for name, value in values.items() if name.startswith("blocks.")}
        output: Tensor = functional_call(network.blocks, blocks, (x,))
        return output

    def spread(points: Tensor) -> Tensor:
        return (points - points.mean(dim=1, keepdim=True)).square().sum(dim=-1).mean(dim=1).sqrt()

    clean, noisy = vmap(features)(parameters, x), vmap(features)(parameters, x + e)
    amplification = ((noisy - clean).norm(dim=-1) / e.norm(dim=-1)).median(dim=1).values
    return {
        "noise_amplification": amplification,
        "relative_noise_amplification": amplification * spread(x) / spread(clean),
    }
