"""Eq. 6 and Propositions 1 and 2: what was measured beside its bound, over depth and h.

All on the blocks of the first stage, whose shortcuts are the identity as in the paper, at random initial values. BN has
the statistics of the batch and is then kept as it is, so that it is the affine map that the paper takes it for.

With W_n the product of the spectral norms of a branch's two maps (convolution and BN together):

- Eq. 6: ||dL/dx_n|| <= (1 + h W_n) ||dL/dx_{n+1}||;
- Proposition 1: ||dL/dx_0|| <= (sqrt(d) + h W)^D ||dL/dx_D||, with W the largest W_n. The sqrt(d) is the Frobenius norm
  of the identity where its spectral norm 1 would do; both bounds are given;
- Proposition 2: e_D <= e_0 + h D W, with W the largest change of a branch's output.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import eulernet
from reproductions.data.batches import load
from reproductions.evidence.claims import HOLDS, NOT_RUN, REFUTED, SUPPORTED, VIOLATED, Results, Row, judge
from reproductions.evidence.statistics import Estimate
from reproductions.evidence.style import BLUE, GREEN, ORANGE, VERMILLION, finish
from reproductions.models import CifarResNet, ConvBlock
from reproductions.presets import IMAGES
from reproductions.records import Record, environment
from reproductions.training.network import build
from reproductions.trial import Trial

TITLE = "Eq. 6, Propositions 1 and 2"
DEPTHS = {"smoke": (20,), "cpu": (20, 56, 110), "small": (20, 56, 110, 218), "paper": (20, 56, 110, 218)}
H = (1.0, 0.3, 0.1, 0.01)
BEST = {20: (0.1, 2.0), 110: (0.05, 0.2), 218: (0.05, 0.2)}  # the paper's best h, "near" read as within a factor of 2
# The claims of the paper that the report begins with.
PRIMARY = {1: "Proposition 1 bounds the growth of the gradient", 2: "Proposition 2 bounds the growth of noise"}
SAMPLES = 32
NOISE = 0.01  # relative to the state that it is added to
ROUNDING = 1e-3  # relative: of fp32 sums, and of norms found by iteration


def run(
    preset: str,
    seeds: int,
    data_root: Path,
    device: torch.device,
    show: Callable[[str, float], None] = lambda label, share: None,
) -> list[Record]:
    records = []
    cases = list(product(range(seeds), DEPTHS[preset], H))
    for number, (seed, depth, h) in enumerate(cases):
        started = time.perf_counter()
        trial = Trial(**{**IMAGES["cpu" if preset == "smoke" else preset], "depth": depth, "h": h, "seed": seed})
        source = load(trial, data_root, device)
        network = build(trial).to(device)
        assert isinstance(network, CifarResNet)
        inputs, labels = source.batch(source.draw(seed, 0)[:SAMPLES].to(device))
        calibrated = {}
        if h == H[0]:
            calibrated = {"calibrated_h": calibrate(network, inputs, labels)}
        result = calibrated | measure(network, inputs, labels, h, torch.Generator().manual_seed(seed))
        records.append(
            {
                "study": "bounds",
                "config": {"preset": preset, "depth": depth, "h": h, "seed": seed, "size": trial.size or 32},
                "data": dict(source.data),
                "result": result,
                "seconds": time.perf_counter() - started,
                "environment": environment(device),
            }
        )
        show("bounds", (number + 1) / len(cases))
    return records


def calibrate(network: CifarResNet, inputs: Tensor, labels: Tensor) -> float | None:
    """The h at which gradients grow twofold over all steps; None where they do at no h."""
    try:
        return eulernet.calibrate(network, (inputs, labels), nn.functional.cross_entropy)
    except eulernet.EulernetError:
        return None


def measure(
    network: CifarResNet, inputs: Tensor, labels: Tensor, h: float, generator: torch.Generator
) -> dict[str, Any]:
    """Measured quantities and their bounds, at the first stage of a patched network."""
    set_statistics(network, inputs)
    blocks = [block for block in network.stages[0].modules() if isinstance(block, ConvBlock)]
    states = [network.bn(network.conv(inputs)).relu()]
    for block in blocks:
        states.append(block(states[-1]))
    rest = network.stages[1:](states[-1]).mean(dim=(2, 3))
    loss = nn.functional.cross_entropy(network.head(rest), labels)
    gradients = [gradient.norm().item() for gradient in torch.autograd.grad(loss, states)]
    with torch.no_grad():
        norms = [branch_norm(block, states[0].shape[1:], generator) for block in blocks]
        gains = [gradients[n] / gradients[n + 1] for n in range(len(blocks))]
        bounds = [1 + h * norm for norm in norms]
        noise = torch.randn(states[0].shape, generator=generator).to(inputs.device)
        noise *= (
            NOISE * states[0].flatten(1).norm(dim=1).view(-1, 1, 1, 1) / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        )
        x, changes = states[0] + noise, []
        for block, clean in zip(blocks, states, strict=False):
            changes.append((block.branch(x) - block.branch(clean)).flatten(1).norm(dim=1))
            x = block(x)
        before = noise.flatten(1).norm(dim=1)
        after = (x - states[-1]).flatten(1).norm(dim=1)
        bound = before + h * len(blocks) * torch.stack(changes).amax(dim=0)
    dimension = states[0][0].numel()
    return {
        "blocks": len(blocks),
        "branch_norm": max(norms),
        "gains": gains,
        "gain_bounds": bounds,
        "growth": gradients[0] / gradients[-1],
        "log10_growth_bound": sum(map(math.log10, bounds)),
        "log10_printed_bound": len(blocks) * math.log10(math.sqrt(dimension) + h * max(norms)),
        "noise": (after / before).median().item(),
        "noise_bound": (bound / before).median().item(),
        "noise_holds": bool((after <= bound * (1 + ROUNDING)).all()),
    }


@torch.no_grad()
def set_statistics(network: nn.Module, inputs: Tensor) -> None:
    """Give BN the statistics of a batch, and put the network into evaluation mode."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    network.train()(inputs)
    network.eval()


def branch_norm(block: ConvBlock, shape: Sequence[int], generator: torch.Generator) -> float:
    """An upper bound of the Lipschitz constant of a branch: the product of the spectral norms of its two maps."""
    return math.prod(
        spectral_norm(convolution, norm, shape, generator)
        for convolution, norm in ((block.conv1, block.bn1), (block.conv2, block.bn2))
    )


def spectral_norm(
    convolution: nn.Conv1d | nn.Conv2d,
    norm: nn.Module,
    shape: Sequence[int],
    generator: torch.Generator,
    iterations: int = 60,
) -> float:
    """The spectral norm of a convolution, stride 1, and the BN after it, on images of a shape: by power iteration."""
    weight = convolution.weight
    if isinstance(norm, nn.BatchNorm2d):
        assert norm.running_var is not None
        weight = weight * (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)
    x = torch.randn(1, *shape, generator=generator).to(weight.device)
    y = x
    for _ in range(iterations):
        y = nn.functional.conv2d(x / x.norm().clamp_min(1e-30), weight, padding=1)
        x = nn.functional.conv_transpose2d(y, weight, padding=1)
    return float(y.norm())


def claims(results: Results, preset: str) -> list[Row]:
    """What is said of the bounds: an inequality is refuted by one number that breaks it."""
    own = [record for record in results.of("bounds") if record["config"]["preset"] == preset]
    if not own:
        claims = {"Eq. 6 holds": "", "Proposition 1 holds": PRIMARY[1], "Proposition 2 holds": PRIMARY[2]}
        return [Row(claim, "", "", NOT_RUN, primary=primary) for claim, primary in claims.items()]
    seeds = {record["config"]["seed"] for record in own}
    depths = sorted({record["config"]["depth"] for record in own})
    run = f"ResNet-{', '.join(map(str, depths))}, first stage, at the start; h = {', '.join(f'{h:g}' for h in H)}; "
    run += f"{len(seeds)} seeds"
    found = [record["result"] for record in own]

    def holds(broken: bool) -> str:
        return VIOLATED if broken else HOLDS

    tight = [g / b for r in found for g, b in zip(r["gains"], r["gain_bounds"], strict=True)]
    loose = [r["log10_growth_bound"] - math.log10(r["growth"]) for r in found]
    printed = [r["log10_printed_bound"] - math.log10(r["growth"]) for r in found]
    noise = [r["noise_bound"] / r["noise"] for r in found]
    rows = [
        Row(
            "Eq. 6: no gradient grows by more than 1 + h W_n in a block",
            run,
            f"measured gain / bound: median {np.median(tight):.2f}, largest {max(tight):.2f}",
            holds(max(tight) > 1 + ROUNDING),
        ),
        Row(
            "Proposition 1: the gradient's growth over all blocks is within its bound",
            run,
            f"bound / measured: 10^{np.median(loose):.1f} at the median with 1 + h W_n, 10^{np.median(printed):.0f} as "
            "printed, with sqrt(d) + h W",
            holds(min(printed) < 0),
            primary=PRIMARY[1],
        ),
        Row(
            "Proposition 2: the noise after all blocks is within e + h D W",
            run,
            f"bound / measured: median {np.median(noise):.2f}, largest {max(noise):.2f}",
            holds(not all(r["noise_holds"] for r in found)),
            primary=PRIMARY[2],
        ),
    ]
    chosen = {depth: [r["result"]["calibrated_h"] or math.nan for r in own if _is(r, depth, H[0])] for depth in depths}
    inside = [BEST[depth][0] <= h <= BEST[depth][1] for depth in depths if depth in BEST for h in chosen[depth]]
    rows.append(
        Row(
            "`eulernet.calibrate`, before training, lands where the paper's grid found the best h: 0.1 to 2 at depth "
            "20, near 0.1 (0.05 to 0.2) at 110 and 218",
            run,
            "; ".join(f"depth {depth}: h = {', '.join(f'{h:.3f}' for h in found)}" for depth, found in chosen.items()),
            SUPPORTED if all(inside) else REFUTED,
        )
    )
    for quantity, what in (("growth", "The gradient grows more"), ("noise", "Noise is amplified more")):
        if len(depths) > 1:
            ends = [[r["result"][quantity] for r in own if _is(r, depth, 1.0)] for depth in (depths[0], depths[-1])]
            claim = f"{what} over depth {depths[-1]} than over depth {depths[0]}, with h = 1"
            rows.append(_more(claim, f"the first stage; {len(ends[0])} seeds", *ends))
    for quantity, what in (("growth", "The gradient grows less"), ("noise", "Noise is amplified less")):
        for depth in depths:
            pair = [{r["config"]["seed"]: r["result"][quantity] for r in own if _is(r, depth, h)} for h in (1.0, 0.1)]
            gaps = [pair[1][seed] - pair[0][seed] for seed in sorted(pair[0].keys() & pair[1].keys())]
            medians = " -> ".join(f"{np.median(list(side.values())):.3g}" for side in pair)
            claim = f"{what} with h = 0.1 than with h = 1, depth {depth}"
            run_at = f"the {(depth - 2) // 6} blocks of the first stage, at the start; {len(gaps)} seeds"
            rows.append(judge(claim, run_at, Estimate.of(gaps), medians, higher=False))
    return rows


def _more(claim: str, run: str, few: Sequence[float], many: Sequence[float]) -> Row:
    """Whether the second is more: different networks, so that seeds do not pair them."""
    return judge(claim, run, Estimate.of_difference(few, many), f"{np.median(few):.3g} -> {np.median(many):.3g}")


def _is(record: Record, depth: int, h: float) -> bool:
    return bool(record["config"]["depth"] == depth and record["config"]["h"] == h)


def figures(results: Results) -> Iterator[tuple[str, Figure]]:
    if records := results.of("bounds"):
        yield "bounds", _figure(records)


def _figure(records: Sequence[Record]) -> Figure:
    """Measured growth of gradients and of noise over the first stage (lines), and the bounds (dotted)."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.8))
    for h, color, marker in zip((1.0, 0.3, 0.1, 0.01), (VERMILLION, ORANGE, BLUE, GREEN), "o^sD", strict=True):
        own = [record for record in records if record["config"]["h"] == h]
        blocks = sorted({record["result"]["blocks"] for record in own})

        def medians(name: str, own: Sequence[Record] = own, blocks: Sequence[int] = blocks) -> list[float]:
            return [float(np.median([r["result"][name] for r in own if r["result"]["blocks"] == n])) for n in blocks]

        growth_bounds = [10**exponent for exponent in medians("log10_growth_bound")]
        pairs = ((medians("growth"), growth_bounds), (medians("noise"), medians("noise_bound")))
        for axes, (measured, bound) in zip(panels, pairs, strict=True):
            axes.plot(blocks, measured, color=color, marker=marker, label=f"h = {h:g}, measured")
            hollow = {"marker": marker, "markerfacecolor": "white", "linestyle": ":"}
            axes.plot(blocks, bound, color=color, label=f"h = {h:g}, bound", **hollow)
            axes.set(xscale="log", yscale="log", xlabel="blocks of the first stage", ylabel="after all blocks / before")
            axes.set_xticks(blocks, [str(n) for n in blocks])
            axes.minorticks_off()
    panels[0].set_title("Gradient, and Proposition 1 (hollow, dotted)", loc="left")
    panels[1].set_title("Noise, and Proposition 2 (hollow, dotted)", loc="left")
    seeds, size = len({r["config"]["seed"] for r in records}), records[0]["config"]["size"]
    run = f"ResNets before training, {SAMPLES} images of {size} x {size} pixels; medians of {seeds} seeds"
    return finish(figure, list(panels), run)
