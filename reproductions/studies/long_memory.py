"""Beyond the paper: recurrent cells that go h of the way, on the adding problem; `eulernet.nn.Recurrent`.

The paper's first future work. The adding problem (Hochreiter and Schmidhuber 1997) is the standard test of long memory:
of a sequence of uniform numbers two are marked, one in each half, and their sum is asked for at the end. The error is
the mean squared one, divided by the variance of the sum, 1/6: guessing the mean has 1.

Written before any of it was run: each arm is judged at the learning rate with its smallest median validation error, on
test sequences that took no part in that choice, paired by seed. A training fails when its error is not finite or above
0.95. An arm of which half failed is at chance, as in all studies; this study's code had left that rule out, and it was
put in when the results were there (two rows of the tanh cell lost a "supported"). The sceptic's controls have h = 1:
its own best rate; and a start at which the cell moves as slowly as with h = 0.1 (GRU: the bias of the update gate,
Tallec and Ollivier, arXiv:1804.11188; tanh cell: U -> (1 - h) I + h U and W -> h W, which is what the cell with h = 0.1
is where tanh is linear). A pilot of 300 iterations, on other seeds, set the sizes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from eulernet.nn import Recurrent
from reproductions.evidence.claims import AT_CHANCE, NOT_RUN, Results, Row, judge, judge_failures
from reproductions.evidence.statistics import Estimate
from reproductions.evidence.style import BLUE, GREEN, GREY, ORANGE, VERMILLION, finish
from reproductions.records import Record, environment

TITLE = "Beyond the paper: recurrent cells that go h of the way"
CELLS = {"tanh": "tanh cell", "gru": "GRU"}
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
SLOW = 0.1  # the h that the controls start like
FAILED = 0.95
VARIANCE = 1 / 6


@dataclass(frozen=True)
class Arm:
    """One of the things compared: a cell, its h, and whether with h = 1 it starts as slow as with h = 0.1."""

    cell: str
    h: float = 1.0
    slow_start: bool = False

    def __str__(self) -> str:
        return f"h = {self.h:g}{', slow start' if self.slow_start else ''}"


@dataclass(frozen=True)
class Protocol:
    """What is the same in all trainings, which are by Adam on fresh sequences in each iteration."""

    length: int = 100
    hidden: int = 32
    batch_size: int = 32
    iterations: int = 600
    clip: float = 1.0
    sequences: int = 1000  # for validation, and as many for the test


PROTOCOLS = {"smoke": Protocol(length=10, hidden=8, iterations=3, sequences=20), "cpu": Protocol()}
ARMS = tuple(
    Arm(cell, h, slow) for cell in CELLS for h, slow in ((1.0, False), (0.1, False), (0.01, False), (1.0, True))
)
LOOKS = dict(
    zip((str(arm) for arm in ARMS[:4]), ((VERMILLION, "o"), (BLUE, "s"), (GREEN, "D"), (ORANGE, "^")), strict=True)
)


# ---- the networks, those of one arm at once
class Cells(nn.Module):
    """Cells of torch side by side, `nn.RNNCell` or `nn.GRUCell`; inputs and states are (cells, batch, width)."""

    weight_ih: nn.Parameter
    weight_hh: nn.Parameter
    bias_ih: nn.Parameter
    bias_hh: nn.Parameter

    def __init__(self, cells: Sequence[nn.RNNCell | nn.GRUCell]) -> None:
        super().__init__()
        self.hidden_size = cells[0].hidden_size
        self.gated = isinstance(cells[0], nn.GRUCell)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            stacked = torch.stack([getattr(cell, name).detach() for cell in cells])
            ready = stacked.mT.contiguous() if "weight" in name else stacked[:, None]
            self.register_parameter(name, nn.Parameter(ready))

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        given = torch.baddbmm(self.bias_ih, x, self.weight_ih)
        held = torch.baddbmm(self.bias_hh, state, self.weight_hh)
        if not self.gated:
            return torch.tanh(given + held)
        width = 2 * self.hidden_size
        reset, update = torch.sigmoid(given[..., :width] + held[..., :width]).chunk(2, -1)
        new = torch.tanh(given[..., width:] + reset * held[..., width:])
        return new + update * (state - new)


class Adders(nn.Module):
    """What reads sequences of shape (time, networks, batch, 2) and gives a number each, (networks, batch)."""

    def __init__(self, arm: Arm, hidden: int, seeds: Sequence[int]) -> None:
        super().__init__()
        made = [start(arm, hidden, seed) for seed in seeds]
        self.layer = Recurrent(Cells([cell for cell, _ in made]), arm.h, sequence=True)
        self.weight = nn.Parameter(torch.stack([head.weight.detach().mT for _, head in made]))
        self.bias = nn.Parameter(torch.stack([head.bias.detach() for _, head in made])[:, None])

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.layer(x)
        return torch.baddbmm(self.bias, state, self.weight).squeeze(-1)


def start(arm: Arm, hidden: int, seed: int) -> tuple[nn.RNNCell | nn.GRUCell, nn.Linear]:
    """A cell and the map that reads its last state, as they are before training: the same for all arms of a seed."""
    torch.manual_seed(seed)
    cell = (nn.GRUCell if arm.cell == "gru" else nn.RNNCell)(2, hidden)
    head = nn.Linear(hidden, 1)
    if arm.slow_start:
        with torch.no_grad():
            if isinstance(cell, nn.GRUCell):  # it goes 1 - sigmoid(bias) of the way: half of it by torch's start
                cell.bias_hh[hidden : 2 * hidden] += math.log((1 - SLOW / 2) / (SLOW / 2))
            else:
                cell.weight_hh.mul_(SLOW).add_((1 - SLOW) * torch.eye(hidden))
                for other in (cell.weight_ih, cell.bias_ih, cell.bias_hh):
                    other.mul_(SLOW)
    return cell, head


def sequences(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers and marks, of shape (time, count, 2), and the sums of the two that are marked."""
    numbers = torch.rand(length, count, generator=generator)
    half = length // 2
    first = torch.randint(half, (count,), generator=generator)
    second = torch.randint(half, length, (count,), generator=generator)
    marks = torch.zeros(length, count)
    marks[first, torch.arange(count)] = 1
    marks[second, torch.arange(count)] = 1
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(0)


def train(
    arm: Arm,
    choices: Sequence[tuple[float, int]],
    protocol: Protocol,
    show: Callable[[float], None] = lambda share: None,
) -> list[dict[str, Any]]:
    """Train networks of an arm at once, each with a learning rate and a seed; returns what came out."""
    network = Adders(arm, protocol.hidden, [seed for _, seed in choices])
    parameters = list(network.parameters())
    rates = torch.tensor([rate for rate, _ in choices])[:, None, None]
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    seeds = sorted({seed for _, seed in choices})
    of = torch.tensor([seeds.index(seed) for _, seed in choices])
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        each = [sequences(count, protocol.length, generator) for generator in generators]
        return torch.stack([x for x, _ in each], 1)[:, of], torch.stack([y for _, y in each])[of]

    validation, test = drawn(protocol.sequences), drawn(protocol.sequences)
    curve = []
    every = max(1, protocol.iterations // 6)
    for iteration in range(1, protocol.iterations + 1):
        x, y = drawn(protocol.batch_size)
        loss = (network(x) - y).square().mean(1)
        gradients = torch.autograd.grad(loss.sum(), parameters)
        norms = torch.stack([g.square().sum((1, 2)) for g in gradients]).sum(0).sqrt()
        scale = (protocol.clip / norms).clamp(max=1)[:, None, None]
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                g = g * scale
                m.lerp_(g, 0.1)
                v.lerp_(g.square(), 0.001)
                size = (v / (1 - 0.999**iteration)).sqrt() + 1e-8
                p.sub_(rates * m / (1 - 0.9**iteration) / size)
        if iteration % every == 0:
            curve.append(error(network, *validation))
        show(iteration / protocol.iterations)
    tested = error(network, *test)
    return [
        {
            "failed": not tested[number].item() <= FAILED,
            "validation_error": curve[-1][number].item(),
            "test_error": tested[number].item(),
            "curve": [at[number].item() for at in curve],
        }
        for number in range(len(choices))
    ]


@torch.no_grad()
def error(network: Adders, x: Tensor, y: Tensor) -> Tensor:
    """Of each network, the mean squared error, divided by the variance of what is asked for."""
    found: Tensor = network(x)
    return (found - y).square().mean(1) / VARIANCE


def run(
    preset: str,
    seeds: int,
    data_root: Path,
    device: torch.device,
    show: Callable[[str, float], None] = lambda label, share: None,
) -> list[Record]:
    """All trainings, on the CPU; the data are made, and `data_root` is not read."""
    torch.set_num_threads(1)
    return [record for arm in ARMS for record in records_of(arm, preset, seeds, show)]


def records_of(arm: Arm, preset: str, seeds: int, show: Callable[[str, float], None]) -> list[Record]:
    """The trainings of one arm, at each learning rate and with each seed."""
    protocol = PROTOCOLS.get(preset, PROTOCOLS["cpu"])
    choices = list(product(LEARNING_RATES, range(seeds)))
    started = time.perf_counter()
    results = train(arm, choices, protocol, lambda share: show(f"{CELLS[arm.cell]}, {arm}", share))
    seconds = (time.perf_counter() - started) / len(choices)
    return [
        {
            "study": "memory",
            "config": {"preset": preset, **asdict(arm), "learning_rate": rate, "seed": seed, **asdict(protocol)},
            "result": result,
            "seconds": seconds,
            "environment": environment(),
        }
        for (rate, seed), result in zip(choices, results, strict=True)
    ]


# ---- what came out
def errors(records: Sequence[Record], arm: Arm, name: str) -> dict[float, dict[int, float]]:
    """One number of the trainings of an arm, by learning rate and seed; what is not finite is infinite."""
    found: dict[float, dict[int, float]] = {}
    for record in records:
        config, value = record["config"], record["result"][name]
        if Arm(config["cell"], config["h"], config["slow_start"]) == arm:
            found.setdefault(config["learning_rate"], {})[config["seed"]] = math.inf if value is None else value
    return found


def at_its_best(records: Sequence[Record], arm: Arm) -> tuple[float, dict[int, float]]:
    """The learning rate with the smallest median validation error, and the test errors there, by seed."""
    chosen = errors(records, arm, "validation_error")
    rate = min(chosen, key=lambda rate: float(np.median(list(chosen[rate].values()))))
    return rate, errors(records, arm, "test_error")[rate]


def claims(results: Results, preset: str) -> list[Row]:
    records = [record for record in results.of("memory") if record["config"]["preset"] == preset]
    rows = []
    for cell, words in CELLS.items():
        plain, tenth, hundredth, slow = (arm for arm in ARMS if arm.cell == cell)
        pairs = ((plain, tenth, "h = 1"), (plain, hundredth, "h = 1"), (slow, tenth, "h = 1 from a slow start"))
        rows += [_compare(records, words, *pair) for pair in pairs]
        claim = f"{words}: over all learning rates, trainings with h = 0.1 fail less often than with h = 1"
        failed = [[v for of in errors(records, arm, "failed").values() for v in of.values()] for arm in (plain, tenth)]
        first, second = ((int(sum(side)), len(side)) for side in failed)
        run = _run(records, words) if records else ""
        rows.append(judge_failures(claim, run, first, second) if records else Row(claim, "", "", NOT_RUN))
    return rows


def _compare(records: Sequence[Record], words: str, first: Arm, second: Arm, other: str) -> Row:
    claim = f"{words}: with {second} the error is smaller than with {other}, each at its best learning rate"
    if not records:
        return Row(claim, "", "", NOT_RUN)
    (before, a), (after, b) = (at_its_best(records, arm) for arm in (first, second))
    gaps = [min(b[seed], 10.0) - min(a[seed], 10.0) for seed in sorted(a.keys() & b.keys())]
    run = f"{_run(records, words)}, at learning rates {before:g} and {after:g}"
    medians = " -> ".join(f"{np.median(list(side.values())):.3g}" for side in (a, b))
    row = judge(claim, run, Estimate.of(gaps), medians, higher=False)
    edge = {before, after} & {max(errors(records, second, "failed"))}
    row = replace(row, outcome=f"{row.outcome}{'; the best rate is the largest that was run' if edge else ''}")
    failed = [errors(records, arm, "failed")[rate].values() for arm, rate in ((first, before), (second, after))]
    return replace(row, verdict=AT_CHANCE, p=None) if any(2 * sum(side) >= len(side) for side in failed) else row


def _run(records: Sequence[Record], words: str) -> str:
    config = records[0]["config"]
    seeds = len({record["config"]["seed"] for record in records})
    return (
        f"{words} of {config['hidden']} units, adding problem of length {config['length']}, {config['iterations']} "
        f"iterations of {config['batch_size']}, {seeds} seeds"
    )


def figures(results: Results) -> Iterator[tuple[str, Figure]]:
    if records := results.of("memory"):
        yield "memory", _figure(records)


def _figure(records: Sequence[Record]) -> Figure:
    """The test error over the learning rate: medians, and each training as a dot; a panel a cell."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.8), sharey=True)
    for axes, (cell, words) in zip(panels, CELLS.items(), strict=True):
        for arm in (arm for arm in ARMS if arm.cell == cell):
            _draw(axes, errors(records, arm, "test_error"), str(arm))
        axes.axhline(1.0, color=GREY, linewidth=0.9, linestyle="--", zorder=0, label="guessing the mean")
        axes.set(xscale="log", yscale="log", xlabel="learning rate")
        axes.set_xticks(LEARNING_RATES, [f"{rate:g}" for rate in LEARNING_RATES])
        axes.xaxis.minorticks_off()
        axes.set_title(words, loc="left")
    panels[0].set_ylabel("squared error / variance")
    config = records[0]["config"]
    seeds = len({record["config"]["seed"] for record in records})
    run = f"The adding problem, length {config['length']}, {config['iterations']} iterations, {seeds} seeds; "
    return finish(figure, list(panels), f"{run}medians, and each training as a dot")


def _draw(axes: Axes, found: dict[float, dict[int, float]], label: str) -> None:
    color, marker = LOOKS[label]
    sides = {rate: [min(value, 10.0) for value in of.values()] for rate, of in sorted(found.items())}
    axes.plot(list(sides), [np.median(v) for v in sides.values()], color=color, marker=marker, label=label)
    for rate, values in sides.items():
        axes.scatter([rate] * len(values), values, s=10, color=color, alpha=0.4, linewidths=0)
