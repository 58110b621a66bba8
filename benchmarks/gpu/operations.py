"""Each fused operation beside eager PyTorch, torch.compile, what others have, and clone(), in the same rounds.

Bytes are counted: each operand read once, each result written once. So the rate of an operation over that of clone() is
the share of memory's speed that it reaches, and what it could still gain.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.clock import DeviceClock, rotating
from benchmarks.gpu.results import Row
from benchmarks.gpu.sizes import Sizes
from benchmarks.timing import Interleaved, Run
from eulernet import kernels
from eulernet.functional import euler_step, euler_step_bn, euler_step_norm

Function = Callable[..., Any]
H = 0.1


@dataclass(frozen=True)
class Operation:
    """A fused operation and the same in eager PyTorch.

    Args:
        fused, eager: functions of (skip, branch, *small).
        small: the number of small operands, each of C elements.
        forward, backward: which streams are moved: s, b, o for tensors of skip's, branch's and the result's dtype;
            no backward: it is for inference.
        images: whether the operands are images (N, C, 8, 8) in channels_last, else they are rows of C elements.
        others: by name, what else there is for it.
    """

    fused: Function
    eager: Function
    small: int
    forward: str
    backward: str
    images: bool = False
    others: Callable[[], dict[str, Function]] = dict


def _drop_path(s: Tensor, b: Tensor, g: Tensor) -> Tensor:
    f = g * b
    mask = f.new_empty((f.shape[0],) + (1,) * (f.dim() - 1)).bernoulli_(0.9).div_(0.9)
    return torch.add(s, mask * f, alpha=H)


def _layer_norm(s: Tensor, b: Tensor, w: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.add(s, b, alpha=H)
    return state, F.layer_norm(state, state.shape[-1:], w, c)


def _before_layer_norm(s: Tensor, b: Tensor, g: Tensor, w: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    state = _drop_path(s, b, g)
    return state, F.layer_norm(state, state.shape[-1:], w, c)


def _rms_norm(s: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.add(s, b, alpha=H)
    return state, F.rms_norm(state, state.shape[-1:], w, 1e-6)


def _batch_norm(s: Tensor, b: Tensor, mean: Tensor, var: Tensor, w: Tensor, c: Tensor) -> Tensor:
    return torch.add(s, F.batch_norm(b, mean, var, w, c), alpha=H).relu_()


def hand_written() -> dict[str, Function]:
    """What people write."""
    return {"x + h * f": lambda s, b: s + H * b}


def other_rms_norms() -> dict[str, Function]:
    """The addition with RMSNorm of others, without h, where they are installed."""
    found: dict[str, Function] = {}
    try:
        from liger_kernel.transformers.functional import liger_fused_add_rms_norm

        found["Liger"] = lambda s, b, w: liger_fused_add_rms_norm(b, s, w, 1e-6)[::-1]
    except Exception:  # it is not installed, or does not load here
        pass
    try:
        from fla.modules.norm.layernorm import rms_norm

        found["flash-linear-attention"] = lambda s, b, w: rms_norm(b, w, None, s, prenorm=True, eps=1e-6)[::-1]
    except Exception:  # it is not installed, or does not load here
        pass
    return found


def other_layer_norms() -> dict[str, Function]:
    """The addition with LayerNorm of others, without h, where they are installed."""
    try:
        from fla.modules.norm.layernorm import layer_norm
    except Exception:  # as above
        return {}
    return {"flash-linear-attention": lambda s, b, w, c: layer_norm(b, w, c, s, prenorm=True)[::-1]}


# In order of importance.
OPERATIONS: dict[str, Operation] = {
    "step, ReLU": Operation(
        lambda s, b: euler_step(s, b, H, activation="relu"),
        lambda s, b: torch.add(s, b, alpha=H).relu_(),
        0,
        "sbo",
        "oosb",
        images=True,
    ),
    "step, LayerNorm": Operation(
        lambda s, b, w, c: euler_step_norm(s, b, H, w, c), _layer_norm, 2, "sboo", "ooosb", others=other_layer_norms
    ),
    "step, RMSNorm": Operation(
        lambda s, b, w: euler_step_norm(s, b, H, w, None, 1e-6, "rms_norm"),
        _rms_norm,
        1,
        "sboo",
        "ooosb",
        others=other_rms_norms,
    ),
    "LayerScale, step": Operation(
        lambda s, b, g: euler_step(s, b, H, layer_scale=g),
        lambda s, b, g: torch.add(s, g * b, alpha=H),
        1,
        "sbo",
        "obb",
    ),
    "BatchNorm, step, ReLU (inference)": Operation(
        lambda s, b, mean, var, w, c: euler_step_bn(s, b, H, mean, var, w, c, activation="relu"),
        _batch_norm,
        4,
        "sbo",
        "",
        images=True,
    ),
    "LayerScale, drop path, step, LayerNorm": Operation(
        lambda s, b, g, w, c: euler_step_norm(s, b, H, w, c, layer_scale=g, drop_path=0.1),
        _before_layer_norm,
        3,
        "sboo",
        "ooobsb",
    ),
    "step": Operation(
        lambda s, b: euler_step(s, b, H),
        lambda s, b: torch.add(s, b, alpha=H),
        0,
        "sbo",
        "ob",
        others=hand_written,
    ),
    "step, GELU": Operation(
        lambda s, b: euler_step(s, b, H, activation="gelu"),
        lambda s, b: F.gelu(torch.add(s, b, alpha=H)),
        0,
        "sbo",
        "osbsb",
    ),
    "LayerScale, drop path, step": Operation(
        lambda s, b, g: euler_step(s, b, H, layer_scale=g, drop_path=0.1), _drop_path, 1, "sbo", "obb"
    ),
}
DTYPES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32 + bfloat16": (torch.float32, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
}


@dataclass(frozen=True)
class Case:
    """One operation on operands of one size; `compiled`: beside what takes a while, torch.compile and others."""

    name: str
    dtypes: str
    mebibytes: float  # of a tensor of the result's dtype
    compiled: bool = False

    @property
    def part(self) -> str:
        end = "/compiled" if self.compiled else ""
        return f"operations/{self.name}/{self.dtypes}/{self.mebibytes:g} MiB{end}"


class Buffers:
    """Operands of a case, as many sets as rotate past the cache."""

    def __init__(self, case: Case, sizes: Sizes, sets: int | None = None) -> None:
        operation = OPERATIONS[case.name]
        skip, branch = DTYPES[case.dtypes]
        self.dtype = torch.promote_types(skip, branch)
        self.itemsize = {"s": skip.itemsize, "b": branch.itemsize, "o": self.dtype.itemsize}
        channels = 64 if sizes.device == "cpu" else 1024
        rows = int(case.mebibytes * 2**20 / self.dtype.itemsize / channels)
        shape = (rows // 64, channels, 8, 8) if operation.images else (rows // 64, 64, channels)
        self.elements = math.prod(shape)
        past = math.ceil(sizes.cache / (self.elements * skip.itemsize))  # by clone(), which reads one stream
        self.sets = [
            [self._operand(shape, of, operation.images, sizes) for of in (skip, branch)]
            + [
                torch.rand(channels, device=sizes.device, dtype=self.dtype).requires_grad_()
                for _ in range(operation.small)
            ]
            for _ in range(max(3, past) if sets is None else sets)
        ]

    @staticmethod
    def _operand(shape: tuple[int, ...], dtype: torch.dtype, images: bool, sizes: Sizes) -> Tensor:
        x = torch.randn(shape, device=sizes.device, dtype=dtype)
        return (x.contiguous(memory_format=torch.channels_last) if images else x).requires_grad_()

    def bytes(self, streams: str) -> int:
        return self.elements * sum(self.itemsize[s] for s in streams)


def candidates(case: Case, sizes: Sizes) -> dict[str, Function]:
    """What is compared, by name."""
    operation = OPERATIONS[case.name]

    def fused(*inputs: Tensor) -> object:
        with kernels.mode("triton"):  # the plain step too, which "auto" leaves to torch.add
            return operation.fused(*inputs)

    if not case.compiled:
        return {"fused": fused, "eager": operation.eager}
    torch._dynamo.reset()
    compiled = torch.compile(operation.eager, backend=sizes.backend, dynamic=False)
    return {"fused": fused, "compiled": compiled, **operation.others()}


def warm(case: Case, sizes: Sizes) -> None:
    """Compile all that a case needs, into the caches on the disk."""
    buffers = Buffers(case, sizes, sets=1).sets
    for function in candidates(case, sizes).values():
        _forwards(function, buffers)[0]()
        if OPERATIONS[case.name].backward:
            _backwards(function, buffers)[0]()


def measure(case: Case, sizes: Sizes) -> Iterator[Row]:
    """A row for each direction: gigabytes a second of each candidate, and the share of clone()'s in the same rounds."""
    operation, buffers = OPERATIONS[case.name], Buffers(case, sizes)
    clone = rotating([lambda x=x[0]: x.detach().clone() for x in buffers.sets])  # type: ignore[misc]
    functions = candidates(case, sizes)
    for direction, streams in (("forward", operation.forward), ("backward", operation.backward)):
        if not streams:
            continue
        make = _forwards if direction == "forward" else _backwards
        runs = {"clone": clone}
        for kind, function in functions.items():
            try:
                calls = make(function, buffers.sets)
                calls[0]()
            except Exception:
                if kind == "fused":
                    raise
                traceback.print_exc()  # of another library; ours are measured all the same
                continue
            runs[kind] = rotating(calls)
        race = Interleaved(runs, DeviceClock(sizes.device, sizes.calls))
        race.warm_up(2, least=1)
        for _ in range(sizes.rounds):
            race.round()
        moved = {kind: buffers.bytes(streams) for kind in runs}
        for kind in moved.keys() & {"Liger", "flash-linear-attention"}:
            if direction == "backward":  # without h, branch and skip have one gradient, which is written once
                moved[kind] -= buffers.bytes("b")
        moved["clone"] = buffers.bytes("ss")
        row: Row = {
            "table": "operations", "name": case.name, "dtype": case.dtypes, "MiB": case.mebibytes,
            "direction": direction, "beside": "compiled" if case.compiled else "eager", "bytes": moved["fused"],
        }  # fmt: skip
        row |= {f"{kind} GB/s": bytes / race.median(kind) / 1e9 for kind, bytes in moved.items()}
        for kind in runs.keys() - {"clone"}:
            time = race.ratio(kind, "clone")["median"]
            row[f"{kind} share"] = moved[kind] / moved["clone"] / time
        yield row


def _forwards(function: Function, buffers: Sequence[Sequence[Tensor]]) -> list[Run]:
    def call(inputs: Sequence[Tensor]) -> Run:
        def run() -> object:
            with torch.no_grad():
                return function(*inputs)

        return run

    return [call(inputs) for inputs in buffers]


def _backwards(function: Function, buffers: Sequence[Sequence[Tensor]]) -> list[Run]:
    def call(inputs: Sequence[Tensor]) -> Run:
        out = function(*inputs)
        outs = list(out) if isinstance(out, tuple) else [out]
        seeds = [torch.randn_like(o) for o in outs]
        return lambda: torch.autograd.grad(outs, list(inputs), seeds, retain_graph=True)

    return [call(inputs) for inputs in buffers]
