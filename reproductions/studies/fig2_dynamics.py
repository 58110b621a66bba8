"""Fig. 2: weights and gradients of layer 2 over the iterations, how far features move, how bumpy late gradients are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from reproductions.data.batches import load
from reproductions.evidence.claims import NOT_RUN, SEEDS, Results, Row, compare, describe, judge, network
from reproductions.evidence.statistics import Estimate
from reproductions.evidence.style import BLUE, BOTH, LOOKS, VERMILLION, finish, ran, subtitled
from reproductions.presets import AUTO, BRIEF, EULER, IMAGES, PLAIN, PRESETS, RATE, START, TEXTS, Part
from reproductions.records import Record, environment
from reproductions.training.loop import feature_steps
from reproductions.training.network import build, layers
from reproductions.trial import Trial

TITLE = "Fig. 2: weights and gradients"
ALSO = tuple(BRIEF)
RESNETS = {"smoke": (20,), "cpu": (56, 110), "small": (110,), "paper": (110, 218), "gpu": (110,), "desk": (20, 110)}
VDCNNS: dict[str, tuple[int, ...]] = {"smoke": (9,), "small": (17,), "paper": (17, 49)}
EARLY: dict[str, tuple[int, ...]] = {"paper": (20, 56, 110, 218)}  # the first thousand iterations alone
# The claims of the paper that the report begins with, each asked of the deepest ResNet that is trained in full.
PRIMARY = {
    "log/layer 2/mean_weight": "Fig. 2: with h = 0.1 the weights of layer 2 are smaller",
    "log/layer 2/largest_gradient": "Fig. 2: with h = 0.1 the gradients of layer 2 do not explode",
    "log/layer last/late_gradient": "Fig. 2: with h = 0.1 late gradients in deep layers are smaller",
    "log/layer last/late_variation": "Fig. 2: with h = 0.1 late gradients in deep layers are less bumpy",
}
PAPER = "51.12 and 105.63 for h = 1, 4.54 and 4.10 for h = 0.1"


def cell(preset: str, depth: int, arm: Part) -> Trial:
    return Trial(**{**IMAGES[preset], **arm, "depth": depth, "log": True})


def early(preset: str, depth: int, arm: Part) -> Trial:
    return Trial(**{**vars(cell(preset, depth, arm)), "epochs": 3, "milestones": ()})


def news(preset: str, depth: int, norm: bool, arm: Part) -> Trial:
    """Some thousand iterations on texts."""
    return Trial(**{**TEXTS[preset], **arm, "depth": depth, "norm": norm, "epochs": 1, "log": True})


def cells(preset: str, arm: Part) -> dict[str, list[Trial]]:
    """What is compared of an arm, by the picture that shows it."""
    return {
        "dynamics": [cell(preset, depth, arm) for depth in RESNETS[preset]],
        "dynamics-early": [early(preset, depth, arm) for depth in EARLY.get(preset, ())],
        "dynamics-texts": [
            news(preset, depth, norm, arm) for depth, norm in product(VDCNNS.get(preset, ()), (True, False))
        ],
    }


def _texts(preset: str) -> list[tuple[int, bool]]:
    """Depths of networks on texts, each with and without BN."""
    return list(product(VDCNNS.get(preset, ()), (True, False)))


def trials(preset: str, seeds: int) -> list[Trial]:
    """The grid: the first thousand iterations, with all controls; and trainings in full, those of the depth study."""
    grid = [
        Trial(**{**vars(early(preset, depth, arm)), "seed": seed})
        for depth, arm, seed in product(EARLY.get(preset, ()), (PLAIN, EULER, AUTO, START, RATE), range(seeds))
    ]
    for seed, depth, arm in product(range(seeds), RESNETS[preset], (PLAIN, EULER)):
        grid.append(Trial(**{**vars(cell(preset, depth, arm)), "seed": seed}))
    for seed, depth, arm, norm in product(
        range(seeds), VDCNNS.get(preset, ()), (PLAIN, {"h": 0.3}, EULER), (True, False)
    ):
        grid.append(Trial(**{**vars(news(preset, depth, norm, arm)), "seed": seed}))
    return grid


def claims(results: Results, preset: str) -> list[Row]:
    rows = start_claims(results) if results.of("dynamics-init") else []
    last = cell(preset, RESNETS[preset][-1], EULER)
    sides = ([one for some in cells(preset, arm).values() for one in some] for arm in (PLAIN, EULER))
    for pair in zip(*sides, strict=True):
        model, depth = pair[0].model, pair[0].depth
        deepest = depth - 1 if model == "resnet" else depth  # a ResNet's last layer is a linear map
        paper = f" (the paper at 218: {PAPER})" if model == "resnet" else ""
        for claim, name in (
            (f"the averaged weight norm of layer 2 is smaller{paper}", "log/layer 2/mean_weight"),
            ("the gradients of layer 2 do not explode (largest norm)", "log/layer 2/largest_gradient"),
            (f"late gradients in deep layers are smaller (layer {deepest})", f"log/layer {deepest}/late_gradient"),
            (
                f"late gradients in deep layers are smaller (layer {deepest // 2})",
                f"log/layer {deepest // 2}/late_gradient",
            ),
            (
                f"late gradients in deep layers are less bumpy (layer {deepest}, coefficient of variation)",
                f"log/layer {deepest}/late_variation",
            ),
            ("features move less from block to block", "feature_steps"),
        ):
            claim = f"{model} {depth}: with h = 0.1 {claim}"
            shown = PRIMARY.get(name.replace(str(deepest), "last"), "") if pair[1] == last else ""
            rows.append(compare(results, claim, [pair], name, higher=False, form="{:+.3g}", primary=shown))
        claim = (
            f"{model} {depth}: with h = 1 the weights of layer 2 reach a plateau in the first tenth of the iterations"
        )
        rows.append(_plateau(results, claim, pair[0]))
    return rows


def _plateau(results: Results, claim: str, one: Trial) -> Row:
    """Whether the norm has gone more than half of its way after a tenth of the iterations."""
    shares = []
    for key in _keys(one):
        log = results.records.get(key, {}).get("result", {}).get("log", {})
        weights = log.get("layer 2", {}).get("weight", [])
        if len(weights) > 1 and None not in weights:
            early = np.interp(log["iterations"][-1] / 10, log["iterations"], weights)
            shares.append(float((early - weights[0]) / (weights[-1] - weights[0])))
    if not shares:
        return Row(claim, describe([one], 0), "", NOT_RUN)
    found = Estimate.of([share - 0.5 for share in shares])
    return judge(claim, describe([one], len(shares)), found, f"{np.mean(shares):.2f} of the way; beyond the half")


# ---- the start alone
DEPTHS = (20, 56, 110, 218)


def at_start(
    data_root: Path, device: torch.device, seeds: int, show: Callable[[str, float], None] = lambda label, share: None
) -> list[Record]:
    """Norms of the gradients of layer 2 and of the last layers, and feature steps, at real depths before training."""
    records = []
    cases = list(product(range(seeds), DEPTHS, (PLAIN, EULER)))
    for number, (seed, depth, arm) in enumerate(cases):
        started = time.perf_counter()
        scale = {**IMAGES["cpu"], **arm, "depth": depth, "seed": seed}
        trial = Trial(**scale)
        source = load(trial, data_root, device)
        network = build(trial).to(device)
        inputs, labels = source.batch(source.draw(seed, 0)[: trial.batch_size].to(device))
        network.train()
        torch.autograd.backward(nn.functional.cross_entropy(network(inputs), labels))
        numbered = layers(network)
        weights = {n: numbered[n - 1].weight for n in (2, depth // 2, depth - 1)}
        norms = {str(n): weight.grad.norm().item() for n, weight in weights.items() if weight.grad is not None}
        records.append(
            {
                "study": "dynamics-init",
                "config": {
                    "depth": depth,
                    "h": trial.h,
                    "seed": seed,
                    "size": trial.size,
                    "batch_size": trial.batch_size,
                },
                "data": dict(source.data),
                "result": {"gradients": norms, "feature_steps": feature_steps(network, source)},
                "seconds": time.perf_counter() - started,
                "environment": environment(device),
            }
        )
        show("gradients at the start", (number + 1) / len(cases))
    return records


def start_claims(results: Results) -> list[Row]:
    """Before training."""
    records = results.of("dynamics-init")
    claim = "The gradient of layer 2 explodes with depth for h = 1, not for h = 0.1"
    if not records:
        return [Row(claim, "", "", NOT_RUN)]
    norms: dict[tuple[float, int], list[float]] = {}
    for record in records:
        key = record["config"]["h"], record["config"]["depth"]
        norms.setdefault(key, []).append(record["result"]["gradients"]["2"])
    depths = sorted({depth for _, depth in norms})
    shown = [" / ".join(f"{np.median(norms[h, depth]):.3g}" for depth in depths) for h in (1.0, 0.1)]
    seeds = len(norms[1.0, depths[0]])
    gaps = [b - a for a, b in zip(norms[1.0, depths[-1]], norms[0.1, depths[-1]], strict=True)]
    run = f"ResNet-{' / '.join(map(str, depths))}, before training; a batch of 64 images of 16 x 16, {seeds} seeds"
    before = f"norm {shown[0]} with h = 1, {shown[1]} with h = 0.1; at {depths[-1]}"
    return [judge(claim, run, Estimate.of(gaps), before, higher=False)]


def figures(results: Results) -> Iterator[tuple[str, Figure]]:
    if records := results.of("dynamics-init"):
        yield "start", _start(records)
    for preset in (*PRESETS, *ALSO):
        for name, some in cells(preset, EULER).items():
            figure = _dynamics(results, some)
            if figure is not None:
                yield f"{name}-{preset}", figure


def _start(records: Sequence[Record]) -> Figure:
    """The gradient of layer 2 before training, over depth."""
    figure, axes = plt.subplots(figsize=(5.4, 3.6))
    for h, color, marker in ((1.0, VERMILLION, "o"), (0.1, BLUE, "s")):
        own = [record for record in records if record["config"]["h"] == h]
        depths = sorted({record["config"]["depth"] for record in own})
        values = [[r["result"]["gradients"]["2"] for r in own if r["config"]["depth"] == depth] for depth in depths]
        axes.plot(depths, [np.median(v) for v in values], color=color, marker=marker, label=f"h = {h:g}")
        for depth, some in zip(depths, values, strict=True):
            axes.scatter([depth] * len(some), some, s=10, color=color, alpha=0.4, linewidths=0)
    axes.set(xscale="log", yscale="log", xlabel="depth (layers)", ylabel="gradient of layer 2, norm")
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()
    axes.set_title("Before training", loc="left")
    axes.legend()
    config, seeds = records[0]["config"], len({record["config"]["seed"] for record in records})
    size = f"{config['size']} x {config['size']}"
    figure.tight_layout()
    return subtitled(
        figure, f"ResNets, a batch of {config['batch_size']} images of {size} pixels, {seeds} seeds (dots)"
    )


def _dynamics(results: Results, cells: Sequence[Trial]) -> Figure | None:
    cells = [cell for cell in cells if results.has([cell])]
    if not cells:
        return None
    figure, grid = plt.subplots(2, len(cells), figsize=(4.6 * len(cells), 6.0), squeeze=False, sharex="col")
    for column, cell in enumerate(cells):
        for label in BOTH:
            arm, (color, _, _) = LOOKS[label]
            for key in _keys(Trial(**{**vars(cell), **arm})):
                result = results.records.get(key, {}).get("result", {})
                log, failed = result.get("log"), result.get("failed", False)
                if log:
                    at = np.array(log["iterations"]) + 1
                    for row, name in enumerate(("weight", "gradient")):
                        values = [np.nan if v is None else v for v in log["layer 2"][name]]
                        words = f"{label}, {'failed' if failed else 'trained'}"
                        style = {"color": color, "alpha": 0.8, "linewidth": 1.1, "linestyle": ":" if failed else "-"}
                        grid[row, column].plot(at, values, label=words, **style)
        grid[0, column].set_title(network(cell), loc="left")
        grid[0, column].set_ylabel("weights of layer 2, norm")
        grid[1, column].set(ylabel="gradients of layer 2, norm", xlabel="iteration (a line is a training)")
        grid[0, column].set(xscale="log", ylim=(0, None))
        grid[1, column].set(xscale="log", yscale="log")
    both = [Trial(**{**vars(cell), **LOOKS[label][0]}) for cell in cells for label in BOTH]
    return finish(figure, list(grid.flat), ran(results, both))


def _keys(cell: Trial) -> list[str]:
    return [Trial(**{**vars(cell), "seed": seed}).key for seed in SEEDS]
