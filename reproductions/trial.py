"""One training of a study: its configuration, and the network and optimiser that it makes."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

import eulernet
from reproductions.models import VDCNN, CifarResNet, ConvBlock

Network = CifarResNet | VDCNN
CLASSES = {"cifar10": 10, "ag-news": 4}
RULES: dict[str, Any] = {"auto": "auto", "1/D": eulernet.schedules.inverse()}
CALIBRATE = "calibrate"


@dataclass(frozen=True)
class Trial:
    """The configuration of one training. The defaults are the paper's for CIFAR-10.

    Attributes:
        data: the data set, `cifar10` or `ag-news`.
        model: `resnet`, `vdcnn` (the authors' variant) or `vdcnn-original`.
        depth: of the network.
        norm: whether it has batch normalisation.
        h: the step factor that `eulernet.patch` gives it: a number, `auto`, `1/D`, or `calibrate` for what
            `eulernet.calibrate` makes of the first batch.
        initial: factor on the initial values of the last affine map of each branch.
        rate: factor on the learning rate of these maps.
        optimizer: `sgd` with momentum 0.9, `adam`, `rmsprop` or `adagrad`.
        learning_rate: at the start; divided by 10 after the share of the epochs that each of `milestones` names.
        weight_decay: on all parameters.
        warmup: iterations over which the learning rate grows from 0.
        clip: largest norm of all gradients together; 0 for any.
        batch_size: samples an iteration; the last of an epoch may have fewer.
        epochs: how often each training sample is seen.
        train: use the first so many training samples; 0 for all.
        test: use the first so many test samples; 0 for all.
        held_out: keep the last so many of the training samples for validation.
        size: side of the images, letters of the texts; 0 for all (32 and 1,024).
        classes: train and test on this part of the classes, from the first to before the last; `()` for all.
        start: the trial whose trained network (of the same seed) this one begins with, patched with `preserve=True`.
        noise: what the training data are corrupted with (`mosaic`, `gaussian`, `letters`, `labels`), drawn once.
        level: how much of it.
        probes: corruptions of the test inputs under which the trained network is tested as well.
        precision: `fp32`, `tf32` (fp32 with TF32 convolutions where there are any) or `bf16` (the branches alone).
        log: whether weight and gradient norms are recorded.
        seed: of the initial values, of the order of the samples, and of all other randomness.
    """

    data: str = "cifar10"
    model: str = "resnet"
    depth: int = 20
    norm: bool = True
    h: float | str = 1.0
    initial: float = 1.0
    rate: float = 1.0
    optimizer: Literal["sgd", "adam", "rmsprop", "adagrad"] = "sgd"
    learning_rate: float = 0.1
    milestones: tuple[float, ...] = (0.5, 0.75)
    weight_decay: float = 0.0
    warmup: int = 0
    clip: float = 0.0
    batch_size: int = 128
    epochs: int = 80
    train: int = 0
    test: int = 0
    held_out: int = 0
    size: int = 0
    classes: tuple[int, ...] = ()
    start: Trial | None = None
    noise: str = ""
    level: float = 0.0
    probes: tuple[tuple[str, float], ...] = ()
    precision: str = "tf32"
    log: bool = False
    seed: int = 0

    @property
    def key(self) -> str:
        """The hash of the configuration; what is as it is by default has no part in it.

        Example:
            >>> Trial().key == Trial(depth=20).key, Trial().key == Trial(depth=56).key
            (True, False)
        """
        config = asdict(self)
        changed = {f.name: config[f.name] for f in fields(self) if getattr(self, f.name) != f.default}
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def base(self) -> Trial | None:
        """The trial whose trained network this one begins with."""
        return replace(self.start, seed=self.seed) if self.start else None

    @property
    def class_count(self) -> int:
        return self.classes[1] - self.classes[0] if self.classes else CLASSES[self.data]

    def config(self) -> dict[str, Any]:
        """As a record has it."""
        config: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return config


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
