"""Fig. 4: a residual network without normalisation on noisy two-moon points, with h = 1 and with h = 0.1.

What the paper does not say (width, depth, noise, optimiser) is chosen in `Protocol`, and the learning rate is swept.
All trainings with one h run at once, stacked by `torch.func.vmap`: the networks are that small.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import eulernet
from reproductions.data import two_moons
from reproductions.models import ResidualMLP
from reproductions.records import Record, environment, mean_interval

NETWORKS = "networks.pt"
LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
PICTURED_SEED = 0


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


PRESETS = {
    "smoke": Protocol(steps=10, hidden=8, train_points=64, test_points=100, epochs=8, batch_size=32),
    "small": Protocol(),
}


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


PLAIN, EULER = Arm(), Arm(h=0.1)
ARMS = (PLAIN, EULER, Arm(initial=0.1), Arm(rate=0.01))


@dataclass(frozen=True)
class Trial:
    """One training: data, initial values and the order of the points follow from the seed."""

    arm: Arm
    learning_rate: float
    seed: int


def trials(seeds: int) -> list[Trial]:
    """All trainings of the study."""
    return [Trial(*choice) for choice in product(ARMS, LEARNING_RATES, range(seeds))]


def run(
    protocol: Protocol, seeds: int, progress: Callable[[str, float], None] = lambda label, share: None
) -> tuple[list[Record], dict[str, Any]]:
    """All trainings, and the networks of the picture.

    Args:
        protocol: what is the same in all trainings.
        seeds: how many trainings an arm and learning rate get.
        progress: called with what is being trained and the share of it that is done.

    Returns:
        The records, one a training, and by the arm's name the pictured networks: for h = 1 and for h = 0.1 that of seed
        0 at the arm's best learning rate.
    """
    records: dict[Trial, Record] = {}
    pictures: dict[Trial, Tensor] = {}
    for h, together in groupby(sorted(trials(seeds), key=lambda trial: -trial.arm.h), key=lambda trial: trial.arm.h):
        group = list(together)
        started = time.perf_counter()
        results, parameters = train(group, protocol, lambda share, h=h: progress(f"h = {h:g}", share))  # type: ignore[misc]
        seconds = (time.perf_counter() - started) / len(group)
        for index, (trial, result) in enumerate(zip(group, results, strict=True)):
            config = {**asdict(trial.arm), "learning_rate": trial.learning_rate, "seed": trial.seed, **asdict(protocol)}
            records[trial] = {
                "study": "two-moon",
                "config": config,
                "result": result,
                "seconds": seconds,
                "environment": environment(),
            }
            if trial.arm in (PLAIN, EULER) and trial.seed == PICTURED_SEED:
                pictures[trial] = parameters_to_vector(value[index] for value in parameters.values())
    ordered = [records[trial] for trial in trials(seeds)]
    pictured = {}
    for arm in (PLAIN, EULER):
        trial = Trial(arm, best_learning_rate(select(ordered, arm)), PICTURED_SEED)
        pictured[str(arm)] = {"config": records[trial]["config"], "parameters": pictures[trial]}
    return ordered, pictured


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


# ---- what came out
def select(records: Sequence[Record], arm: Arm, learning_rate: float | None = None) -> list[Record]:
    """The records of an arm, at all learning rates or at one."""
    return [
        record
        for record in records
        if Arm(*(record["config"][name] for name in ("h", "initial", "rate"))) == arm
        and learning_rate in (None, record["config"]["learning_rate"])
    ]


def best_learning_rate(records: Sequence[Record]) -> float:
    """The learning rate with the highest median validation accuracy; the test points have no part in it."""
    rates: list[float] = sorted({record["config"]["learning_rate"] for record in records})
    return max(rates, key=lambda rate: float(np.median(values(records, "validation_accuracy", rate))))


def values(
    records: Sequence[Record], name: str, learning_rate: float | None = None, trained: bool = False
) -> list[float]:
    """One number of each record, at one learning rate, of the trainings that did not fail if `trained`."""
    return [
        math.nan if record["result"][name] is None else record["result"][name]
        for record in records
        if learning_rate in (None, record["config"]["learning_rate"]) and not (trained and record["result"]["failed"])
    ]


def statements(records: Sequence[Record]) -> list[str | Table]:
    """What was measured."""
    rates = sorted({record["config"]["learning_rate"] for record in records})
    number = len(select(records, PLAIN, rates[0]))
    failures = _table(f"Failed trainings of {number}, by learning rate", [f"{rate:g}" for rate in rates])
    for arm in ARMS:
        failures.add_row(str(arm), *(str(sum(values(select(records, arm), "failed", rate))) for rate in rates))

    names = ("test_accuracy", "noise_amplification", "relative_noise_amplification")
    best = {arm: select(records, arm, best_learning_rate(select(records, arm))) for arm in ARMS}
    summary = _table(
        "At the learning rate with the best median validation accuracy: median, quartiles",
        ["learning\nrate", "test\naccuracy", "noise\namplification", "relative noise\namplification"],
    )
    for arm, own in best.items():
        spreads = [_spread(values(own, name, trained="noise" in name)) for name in names]
        summary.add_row(str(arm), f"{own[0]['config']['learning_rate']:g}", *spreads)
    differences = [f"  {name.replace('_', ' ')}: {_difference(best[PLAIN], best[EULER], name)}" for name in names]
    heading = f"\n{EULER} minus {PLAIN}, each at that rate, paired by seed: mean (95 % interval)"
    return [failures, summary, heading, *differences]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(
        title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1)
    )
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _difference(plain: Sequence[Record], euler: Sequence[Record], name: str) -> str:
    """Whether the second is higher, over the seeds for which neither training failed."""
    pairs = [
        (a["result"][name], b["result"][name])
        for a, b in zip(plain, euler, strict=True)
        if not a["result"]["failed"] and not b["result"]["failed"]
    ]
    if len(pairs) < 2:
        return "fewer than two seeds to compare"
    mean, low, high = mean_interval([b - a for a, b in pairs])
    found = "higher" if low > 0 else "lower" if high < 0 else "no difference shown"
    return f"{mean:+.3g} ({low:+.3g} to {high:+.3g}), {found}"


def _spread(numbers: Sequence[float]) -> str:
    """Median and quartiles."""
    if not numbers:
        return "not measured"
    low, middle, high = np.quantile(numbers, [0.25, 0.5, 0.75])
    return f"{middle:.3g}\n{low:.3g}-{high:.3g}"


# ---- the picture's networks
def save_networks(folder: Path, networks: dict[str, Any]) -> Path:
    torch.save(networks, folder / NETWORKS)
    return folder / NETWORKS


def load_networks(folder: Path) -> dict[str, tuple[ResidualMLP, dict[str, Any]]]:
    """The pictured networks by the name of their arm, each with its configuration."""
    networks = {}
    for name, saved in torch.load(folder / NETWORKS, weights_only=True).items():
        config = saved["config"]
        protocol = Protocol(**{field: config[field] for field in asdict(Protocol())})
        network = build(Arm(h=config["h"]), protocol)
        vector_to_parameters(saved["parameters"], network.parameters())
        networks[name] = network, config
    return networks
