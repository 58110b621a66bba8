"""What a fused step costs on the host: microseconds of a call on tensors so small that nothing else counts.

`lines` are single lines of code as people write them and the step that replaces them; `blocks` are the tails of
residual blocks, with everything but the tail taken out, as they are and patched. The kernels are asked for at any size.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eulernet
from benchmarks.timing import Interleaved, Run, cpu_seconds
from eulernet import kernels
from eulernet.functional import euler_step, euler_step_bn, euler_step_norm

H = 0.1
Row = dict[str, Any]


class Pair(NamedTuple):
    """The same with and without eulernet, as functions of the tensors."""

    eager: Callable[..., Any]
    fused: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    training: bool = True


def lines() -> dict[str, Pair]:
    """An image of 8 channels, a sequence of 64; the first two tensors are the state and the branch."""
    x, y = (torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last) for _ in range(2))
    s, f = (torch.randn(2, 4, 64) for _ in range(2))
    weight, bias, gamma, h = torch.rand(64), torch.rand(64), torch.rand(64), torch.tensor(H)
    statistics = tuple(torch.rand(8) for _ in range(4))

    def layer_norm(s: Tensor, f: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        state = s + f
        return state, F.layer_norm(state, (64,), w, b)

    def rms_norm(s: Tensor, f: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        state = s + f
        return state, F.rms_norm(state, (64,), w, 1e-6)

    return {
        "x + f": Pair(lambda s, f: s + f, lambda s, f: euler_step(s, f, H), (s, f)),
        "relu(x + f)": Pair(lambda x, y: F.relu(x + y), lambda x, y: euler_step(x, y, H, activation="relu"), (x, y)),
        "x + gamma * f": Pair(
            lambda s, f, g: s + g * f, lambda s, f, g: euler_step(s, f, H, layer_scale=g), (s, f, gamma)
        ),
        "x + h * f, h learned": Pair(lambda s, f, h: s + h * f, euler_step, (s, f, h)),
        "layer_norm(x + f)": Pair(layer_norm, lambda s, f, w, b: euler_step_norm(s, f, H, w, b), (s, f, weight, bias)),
        "rms_norm(x + f)": Pair(
            rms_norm, lambda s, f, w: euler_step_norm(s, f, H, w, None, 1e-6, "rms_norm"), (s, f, weight)
        ),
        "relu(x + batch_norm(f))": Pair(
            lambda x, y, *n: F.relu(x + F.batch_norm(y, *n)),
            lambda x, y, *n: euler_step_bn(x, y, H, *n, activation="relu"),
            (x, y, *statistics),
            training=False,
        ),
    }


class ResNetTail(nn.Module):
    """The end of timm's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.bn, self.act = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.f(x)
        x = self.bn(x)
        x += shortcut
        x = self.act(x)
        return x


class ViTBlock(nn.Module):
    """Both residual branches of a pre-norm transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.f = nn.LayerNorm(64), nn.Linear(64, 64)
        self.norm2, self.g = nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(self.norm1(x))
        x = x + self.g(self.norm2(x))
        return x


def blocks() -> dict[str, tuple[nn.Module, nn.Module, Tensor]]:
    """The block as it is, the patched one, and an input."""
    image = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    found: dict[str, tuple[nn.Module, nn.Module, Tensor]] = {}
    originals: dict[str, tuple[nn.Module, Tensor]] = {
        "ResNet tail": (ResNetTail(), image),
        "ViT block": (ViTBlock(), torch.randn(2, 4, 64)),
    }
    for name, (block, x) in originals.items():
        patched = eulernet.patch(copy.deepcopy(block), h=H, example_inputs=x)
        for each in (block, patched):
            for f in each._modules.keys() & {"f", "g"}:
                setattr(each, f, nn.Identity())
        found[name] = (block, patched, x)
    return found


def _pairs(device: str) -> Iterator[tuple[str, dict[str, Pair]]]:
    """What is measured of each line and block: the name of the case, and the pair for each direction."""
    for name, pair in lines().items():
        plain = tuple(t.to(device) for t in pair.tensors)
        cases = {"forward": pair._replace(tensors=plain)}
        if pair.training:
            cases["forward + backward"] = pair._replace(tensors=tuple(t.clone().requires_grad_() for t in plain))
        yield name, cases
    for name, (block, patched, x) in blocks().items():
        block, patched, x = block.to(device), patched.to(device), x.to(device)
        for what, training in (("forward", False), ("forward + backward", True)):
            eager = copy.deepcopy(block).train(training)
            fused = copy.deepcopy(patched).train(training)
            tensors = (x.clone().requires_grad_(training),)
            yield name, {what: Pair(lambda x, m=eager: m(x.clone()), lambda x, m=fused: m(x.clone()), tensors)}


def _both(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Run:
    first = function(*tensors)
    seeds = [torch.ones_like(out) for out in (first if isinstance(first, tuple) else (first,))]

    def run() -> object:
        outs = function(*tensors)
        return torch.autograd.grad(outs if isinstance(outs, tuple) else (outs,), tensors, seeds)

    return run


def _forward(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Run:
    def run() -> object:
        with torch.no_grad():
            return function(*tensors)

    return run


def measure(device: str = "cpu", calls: int = 500, rounds: int = 9) -> Iterator[Row]:
    """Microseconds on the host of each line and block, eager's and eulernet's, in turn."""
    clock = cpu_seconds

    def seconds(run: Run) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return clock(lambda: [run() for _ in range(calls)]) / calls

    if device == "cuda":
        clock = _wall_seconds
    for name, cases in _pairs(device):
        for what, pair in cases.items():
            make = _forward if what == "forward" else _both
            with kernels.mode("triton"):
                runs = {"eager": make(pair.eager, pair.tensors), "fused": make(pair.fused, pair.tensors)}
                race = Interleaved(runs, seconds)
                race.warm_up(2, least=1)
                for _ in range(rounds):
                    race.round()
            eager, fused = race.median("eager") * 1e6, race.median("fused") * 1e6
            yield {
                "table": "host", "name": name, "what": what, "eager us": eager, "fused us": fused,
                "more us": fused - eager,
            }  # fmt: skip


def _wall_seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure_without_gpu(calls: int = 500, rounds: int = 9) -> list[Row]:
    """The same under the driver that launches nothing: in a process of its own, for it stays."""
    from benchmarks import fake_gpu

    torch.set_num_threads(1)
    fake_gpu.install()
    rows = list(measure("cpu", calls, rounds))
    if not fake_gpu.launches:
        raise RuntimeError("no kernel was launched: eulernet computed with ATen, and nothing was measured")
    return rows
