"""Each kernel in every dtype, forward and backward, against a few lines of float64.

A case fails where the relative error ||result - reference|| / ||reference|| of a result or a gradient is above what its
dtype allows; up to twice that where eager PyTorch, which stands beside it, has two thirds of the error or more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.results import Row
from benchmarks.gpu.sizes import Sizes
from eulernet import kernels
from eulernet.functional import Activation, euler_step, euler_step_bn, euler_step_norm

H, EPS = 0.3, 1e-5
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DTYPES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32 + bfloat16": (torch.float32, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "float32 + float16": (torch.float32, torch.float16),
    "float64": (torch.float64, torch.float64),
}


@dataclass(frozen=True)
class Kernel:
    """What one call computes.

    Args:
        kind: which function of `eulernet.functional`.
        activation: after the step.
        small: the small operands: gamma (LayerScale), mask (drop path, drawn already), h (learned), weight, bias, mean,
            var.
    """

    kind: Literal["step", "layer_norm", "rms_norm", "batch_norm"] = "step"
    activation: Activation | None = None
    small: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join(filter(None, (*self.small, self.kind, self.activation)))


AFFINE = ("weight", "bias")
ROWS = (
    Kernel(),
    Kernel(activation="relu"),
    Kernel(activation="silu"),
    Kernel(activation="gelu"),
    Kernel(small=("h",)),
    Kernel(small=("gamma",)),
    Kernel(small=("gamma", "mask")),
    Kernel(activation="gelu", small=("gamma", "mask", "h")),
    Kernel("layer_norm", small=AFFINE),
    Kernel("rms_norm", small=("weight",)),
    Kernel("layer_norm", small=("gamma", "mask", *AFFINE)),
    Kernel("rms_norm"),
)
IMAGES = (
    Kernel(activation="relu"),
    Kernel(activation="relu", small=("gamma", "mask")),
    Kernel("batch_norm", "relu", ("mean", "var", *AFFINE)),
    Kernel("batch_norm", None, ("mean", "var")),
)
# shape, and whether it is channels_last
ROW_SHAPES = {"rows": ((4, 197, 768), False), "odd rows": ((3, 17, 199), False)}
IMAGE_SHAPES = {
    "channels_last": ((8, 256, 14, 14), True),
    "NCHW": ((8, 64, 32, 32), False),
    "NCHW 7x7": ((8, 512, 7, 7), False),
}
TINY_SHAPES = {
    "rows": ((2, 3, 16), False),
    "odd rows": ((2, 3, 7), False),
    "channels_last": ((2, 8, 3, 3), True),
    "NCHW": ((2, 4, 4, 4), False),
    "NCHW 7x7": ((2, 4, 7, 7), False),
}


@dataclass(frozen=True)
class Case:
    """A kernel on operands of one layout and dtype."""

    kernel: Kernel
    layout: str
    dtypes: str

    @property
    def part(self) -> str:
        return f"correctness/{self.kernel}/{self.layout}/{self.dtypes}"


def cases() -> Iterator[Case]:
    """All, the dtypes and layouts that are used most first."""
    for dtypes in DTYPES:
        for shapes, kinds in ((ROW_SHAPES, ROWS), (IMAGE_SHAPES, IMAGES)):
            for layout, kernel in itertools.product(shapes, kinds):
                yield Case(kernel, layout, dtypes)


def check(case: Case, sizes: Sizes) -> Iterator[Row]:
    """The largest relative error, of what, that of eager PyTorch, and whether it is right."""
    operands = _operands(case, sizes)
    with kernels.mode("triton"):
        ours = _run(case.kernel, operands)
    with kernels.mode("torch"):
        eager = _run(case.kernel, operands)
    exact = _run(case.kernel, {name: t.double() for name, t in operands.items()}, reference=True)
    errors = {name: _error(t, exact[name]) for name, t in ours.items()}
    eagers = {name: _error(t, exact[name]) for name, t in eager.items()}
    bounds = {name: _bound(case.kernel, t, ours["result 0"]) for name, t in ours.items()}
    bounds = {name: max(bound, min(1.5 * eagers[name], 2 * bound)) for name, bound in bounds.items()}
    worst = max(errors, key=lambda name: errors[name] / bounds[name])
    yield {
        "table": "correctness", "name": str(case.kernel), "layout": case.layout, "dtype": case.dtypes,
        "worst": worst, "error": errors[worst], "eager error": eagers[worst], "bound": bounds[worst],
        "right": all(errors[name] <= bounds[name] and t.dtype == eager[name].dtype for name, t in ours.items()),
    }  # fmt: skip


def _bound(kernel: Kernel, x: Tensor, result: Tensor) -> float:
    """What the dtype of a result or a gradient allows.

    The derivative of a smooth activation is taken at the state as it is kept, in the dtype of the result. So a gradient
    that is a sum over n elements has n independent errors of that dtype, though the sum itself is made in float32.
    """
    bound = BOUNDS[x.dtype]
    if kernel.activation in ("silu", "gelu"):
        bound = max(bound, BOUNDS[result.dtype] / math.sqrt(result.numel() / x.numel()))
    return bound


def _error(x: Tensor, exact: Tensor) -> float:
    """Infinite where the result has an element that is no number, or another shape."""
    if x.shape != exact.shape:
        return float("inf")
    error = float((x.double() - exact).norm() / exact.norm())
    return error if error == error else float("inf")


def _operands(case: Case, sizes: Sizes) -> dict[str, Tensor]:
    """Random, away from zero on average, so that no sum of them cancels."""
    shape, channels_last = (TINY_SHAPES if sizes.tiny else ROW_SHAPES | IMAGE_SHAPES)[case.layout]
    skip, branch = DTYPES[case.dtypes]
    both = torch.promote_types(skip, branch)
    images = len(shape) == 4
    channels = shape[1] if images else shape[-1]
    along = (channels, 1, 1) if images and case.kernel.kind == "step" else (channels,)
    sample = (shape[0],) + (1,) * (len(shape) - 1)

    def random(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(size, device=sizes.device, dtype=dtype) + 0.5

    found = {"skip": random(shape, skip), "branch": random(shape, branch)}
    if channels_last:
        found = {name: x.contiguous(memory_format=torch.channels_last) for name, x in found.items()}
    least = torch.promote_types(both, torch.float32)
    norm = both if case.kernel.kind.endswith("norm") and case.kernel.kind != "batch_norm" else least
    for name in case.kernel.small:
        if name == "mask":
            kept = torch.rand(sample, device=sizes.device) < 0.7
            kept[0] = True  # without any, gradients are zero, and an error relative to them is no number
            found[name] = kept.to(branch) / 0.7
        elif name == "h":
            found[name] = torch.full((), H, device=sizes.device, dtype=least)
        elif name == "var":
            found[name] = torch.rand(channels, device=sizes.device, dtype=norm) + 0.5
        else:
            found[name] = random(along if name == "gamma" else (channels,), both if name == "gamma" else norm)
    return found


def _run(kernel: Kernel, operands: dict[str, Tensor], reference: bool = False) -> dict[str, Tensor]:
    """Results and gradients by name; batch norm is for inference and has no gradients."""
    training = kernel.kind != "batch_norm"
    leaves = {
        name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_(training and name != "mask")
        for name, t in operands.items()
    }
    out = (_reference if reference else _fused)(kernel, **leaves)
    outs = out if isinstance(out, tuple) else (out,)
    found = {f"result {i}": t.detach() for i, t in enumerate(outs)}
    if training:
        asked = {name: t for name, t in leaves.items() if t.requires_grad}
        generator = torch.Generator("cpu").manual_seed(0)
        seeds = [(torch.rand(o.shape, generator=generator) + 0.5).to(torch.bfloat16).to(o) for o in outs]
        grads = torch.autograd.grad(outs, list(asked.values()), seeds)
        found |= {f"gradient of {name}": g for name, g in zip(asked, grads, strict=True)}
    return found


def _fused(kernel: Kernel, skip: Tensor, branch: Tensor, **small: Tensor) -> Any:
    h = small.pop("h", H)
    around = {"layer_scale": small.pop("gamma", None), "drop_path": small.pop("mask", None)}
    if kernel.kind == "step":
        return euler_step(skip, branch, h, activation=kernel.activation, **around)
    weight, bias = small.get("weight"), small.get("bias")
    if kernel.kind == "batch_norm":
        mean, var = small["mean"], small["var"]
        return euler_step_bn(skip, branch, H, mean, var, weight, bias, eps=EPS, activation=kernel.activation)
    return euler_step_norm(skip, branch, h, weight, bias, EPS, kernel.kind, **around)


def _reference(kernel: Kernel, skip: Tensor, branch: Tensor, **small: Tensor) -> Any:
    """The formulas, written out."""
    if kernel.kind == "batch_norm":
        stretched = {name: t.view(-1, *(1,) * (branch.dim() - 2)) for name, t in small.items()}
        branch = (branch - stretched["mean"]) / (stretched["var"] + EPS).sqrt()
        branch = branch * stretched.get("weight", 1) + stretched.get("bias", 0)
    state = skip + small.get("h", H) * small.get("gamma", 1) * small.get("mask", 1) * branch
    activations: dict[str | None, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "silu": F.silu,
        "gelu": F.gelu,
        None: lambda x: x,
    }
    if kernel.kind in ("step", "batch_norm"):
        return activations[kernel.activation](state)
    centred = state - state.mean(-1, keepdim=True) if kernel.kind == "layer_norm" else state
    normed = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return state, normed * small.get("weight", 1) + small.get("bias", 0)
