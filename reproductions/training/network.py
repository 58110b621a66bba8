"""The network of a trial, its optimiser and its learning rate."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import eulernet
from reproductions.models import VDCNN, CifarResNet, ConvBlock
from reproductions.trial import RULES, Trial

Network = CifarResNet | VDCNN


def build(trial: Trial, start: dict[str, Tensor] | None = None) -> Network:
    """The patched network of a trial, as it is before training.

    Args:
        trial: its configuration.
        start: the trained parameters and buffers to begin with, where `trial.start` names a trial.
    """
    torch.manual_seed(trial.seed)
    network = _plain(trial.model, trial.depth, trial.norm, trial.class_count)
    if start is not None:
        network.load_state_dict(start)
    with torch.no_grad():
        for parameter in last_parameters(network):
            parameter.mul_(trial.initial)
    h: Any = RULES.get(trial.h, 1.0) if isinstance(trial.h, str) else trial.h
    if start is not None:
        return eulernet.patch(network, h=h, example_inputs=example(network), preserve=True)
    patched = copy.deepcopy(_patched(trial.model, trial.depth, trial.norm, trial.class_count))
    patched.load_state_dict(network.state_dict())
    eulernet.set_h(patched, h)
    return patched


def _plain(model: str, depth: int, norm: bool, classes: int) -> Network:
    if model == "resnet":
        return CifarResNet(depth, norm, classes)
    return VDCNN(depth, norm, classes, original=model == "vdcnn-original")


@lru_cache(maxsize=8)
def _patched(model: str, depth: int, norm: bool, classes: int) -> Network:
    """A patched network to copy: to trace one of 218 layers takes seconds, in which a GPU would wait."""
    with torch.random.fork_rng(devices=[]):  # the trial's random numbers stay its own
        network = _plain(model, depth, norm, classes)
    return eulernet.patch(network, h=1.0, example_inputs=example(network))


def example(network: Network) -> Tensor:
    """An input, small, to trace the network with, on its device."""
    device = next(network.parameters()).device
    if isinstance(network, CifarResNet):
        return torch.zeros(2, 3, 16, 16, device=device)
    return torch.zeros(2, 128, dtype=torch.int64, device=device)


def last_parameters(network: Network) -> Iterator[nn.Parameter]:
    """The parameters of the last affine map of each branch: BN, or the last convolution where there is none."""
    for block in network.modules():
        if isinstance(block, ConvBlock):
            yield from (block.conv2 if isinstance(block.bn2, nn.Identity) else block.bn2).parameters()


def layers(network: Network) -> list[nn.Conv1d | nn.Conv2d]:
    """The convolutions in their order, numbered from 1 as in the paper; not those of shortcuts."""
    named = network.named_modules()
    return [m for name, m in named if isinstance(m, nn.Conv1d | nn.Conv2d) and "shortcut" not in name]


def make_optimizer(trial: Trial, network: Network, device: torch.device) -> torch.optim.Optimizer:
    """The optimiser; on a CUDA device its learning rates are tensors, so that a captured graph can be told new ones.

    Adagrad has no such form: it cannot be captured.
    """
    parts: list[dict[str, Any]] = [{"params": list(network.parameters()), "lr": 1.0}]
    if trial.rate != 1:
        parts = eulernet.param_groups(network, lr=1.0, h=trial.rate**0.5, example_inputs=example(network))
    tensors = device.type == "cuda" and trial.optimizer != "adagrad"
    groups = []
    for part in parts:
        rate = trial.learning_rate * part["lr"]
        lr = torch.tensor(rate, device=device) if tensors else rate
        groups.append({"params": part["params"], "lr": lr, "rate": part["lr"]})
    if trial.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=trial.weight_decay, fused=tensors or None)
    if trial.optimizer == "adam":
        return torch.optim.Adam(groups, weight_decay=trial.weight_decay, capturable=tensors)
    if trial.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, weight_decay=trial.weight_decay, capturable=tensors)
    return torch.optim.Adagrad(groups, weight_decay=trial.weight_decay)


def learning_rate(trial: Trial, epoch: int, iteration: int) -> float:
    """The learning rate in an iteration; both are counted from 0, the iteration over all epochs.

    Example:
        >>> [round(learning_rate(Trial(warmup=10), *at), 4) for at in ((0, 0), (0, 9), (39, 20), (40, 30), (60, 40))]
        [0.01, 0.1, 0.1, 0.01, 0.001]
    """
    passed = sum(epoch >= milestone * trial.epochs for milestone in trial.milestones)
    warm = min(1.0, (iteration + 1) / trial.warmup) if trial.warmup else 1.0
    return float(trial.learning_rate * warm / 10**passed)
