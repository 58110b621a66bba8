"""Fig. 2: weights and gradients of layer 2 over the iterations, how far features move, how bumpy late gradients are."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import nn

from reproductions.claims import Results, Row, compare
from reproductions.records import Record, environment
from reproductions.scales import AUTO, EULER, IMAGES, PLAIN, RATE, START, TEXTS, Part
from reproductions.sources import load
from reproductions.train import feature_steps
from reproductions.trial import Trial, build, layers

RESNETS = {"smoke": (20,), "cpu": (56, 110), "small": (110,), "paper": (110, 218)}
VDCNNS: dict[str, tuple[int, ...]] = {"smoke": (9,), "cpu": (), "small": (17,), "paper": (17, 49)}
EARLY = {"smoke": (), "cpu": (), "small": (), "paper": (20, 56, 110, 218)}  # the first thousand iterations alone
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
        "dynamics-early": [early(preset, depth, arm) for depth in EARLY[preset]],
        "dynamics-texts": [news(preset, depth, norm, arm) for depth, norm in product(VDCNNS[preset], (True, False))],
    }


def trials(preset: str, seeds: int) -> list[Trial]:
    """The grid: the first thousand iterations, with all controls; and trainings in full, those of the depth study."""
    grid = [
        Trial(**{**vars(early(preset, depth, arm)), "seed": seed})
        for depth, arm, seed in product(EARLY[preset], (PLAIN, EULER, AUTO, START, RATE), range(seeds))
    ]
    for seed, depth, arm in product(range(seeds), RESNETS[preset], (PLAIN, EULER)):
        grid.append(Trial(**{**vars(cell(preset, depth, arm)), "seed": seed}))
    for seed, depth, arm, norm in product(range(seeds), VDCNNS[preset], (PLAIN, {"h": 0.3}, EULER), (True, False)):
        grid.append(Trial(**{**vars(news(preset, depth, norm, arm)), "seed": seed}))
    return grid


def claims(results: Results, preset: str) -> list[Row]:
    rows = []
    sides = ([one for some in cells(preset, arm).values() for one in some] for arm in (PLAIN, EULER))
    for pair in zip(*sides, strict=True):
        model, depth = pair[0].model, pair[0].depth
        deepest = depth - 1 if model == "resnet" else depth  # a ResNet's last layer is a linear map
        paper = f" (the paper at 218: {PAPER})" if model == "resnet" else ""
        for claim, name in (
            (f"the averaged weight norm of layer 2 is smaller{paper}", "log/layer 2/mean_weight"),
            ("the gradients of layer 2 do not explode (largest norm)", "log/layer 2/largest_gradient"),
            (
                "late gradients of the deepest convolution are less bumpy (coefficient of variation)",
                f"log/layer {deepest}/late_variation",
            ),
            ("features move less from block to block", "feature_steps"),
        ):
            claim = f"{model} {depth}: with h = 0.1 {claim}"
            rows.append(compare(results, claim, [pair], name, higher=False, form="{:+.3g}"))
    return rows


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
                "result": {"gradients": norms, "feature_steps": feature_steps(network, source)},
                "seconds": time.perf_counter() - started,
                "environment": environment(device),
            }
        )
        show("gradients at the start", (number + 1) / len(cases))
    return records
