"""Compile each kernel for an H100 or H200, which needs no GPU; print how its operands are loaded and stored, as JSON.

Run by a test in a process of its own: in the interpreter nothing is compiled.
"""

import json
import re
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eulernet.kernels import _device

SIZES = ["M", "C", "R", "skip_outer", "skip_middle", "branch_outer", "branch_middle"]
SIZES += ["normed_outer", "normed_middle", "P", "B"]
TILE = {"SPLIT": True, "BR": 8, "BC": 256, "STAGES": 3}
BARE = {"SCALE": -1, "MASK": -1, "scale": None, "mask": None}
VARIANTS: list[tuple[Any, dict[str, Any]]] = [
    *[(_device.step_forward, {"SCALE": s, "MASK": 0, "ACT": a} | TILE) for s, a in ((2, 1), (1, 2), (0, 3), (-2, 0))],
    (_device.step_forward, BARE | {"ACT": 1} | TILE),
    *[(_device.step_backward, {"SCALE": s, "MASK": 0, "ACT": a} | TILE) for s, a in ((2, 1), (1, 2), (0, 3), (-2, 0))],
    (_device.norm_forward, {"SCALE": 2, "MASK": 0, "EPS": 1e-5, "CENTRED": True} | TILE),
    (_device.norm_forward, BARE | {"EPS": 1e-5, "CENTRED": False, "mean": None, "rstd": None, "bias": None} | TILE),
    (_device.norm_backward, {"SCALE": 2, "MASK": 0} | TILE),
    (_device.norm_backward, {"SCALE": 2, "MASK": 0, "stream_grad": None} | TILE),
    (_device.norm_backward, BARE | {"mean": None, "scale_parts": None, "branch": None} | TILE),
    *[
        (_device.bn_forward, {"CHANNEL": c, "CHANNELS": 64, "PIXELS": 49, "EPS": 1e-5, "ACT": 3, "bias": None} | TILE)
        for c in (2, -1)
    ],
    (_device.sum_parts, {"BR": 256, "BC": 16}),
    (_device.sum_parts, {"BR": 256, "BC": 16, "weight_parts": None, "bias_parts": None}),
]


def accesses(kernel: Any, constants: dict[str, Any], dtype: str) -> list[str]:
    """The instructions that reach the memory of the GPU."""
    constants = {name: value for name, value in constants.items() if name != "STAGES" or name in kernel.arg_names}
    if "T" in kernel.arg_names:
        constants = constants | {"T": tl.float64 if dtype == "fp64" else tl.float32}
    else:
        constants = constants | {"B": 1}
    signature: dict[str, str] = {}
    attributes = {}
    for i, name in enumerate(kernel.arg_names):
        wide = name.endswith("parts") or name in ("mean", "rstd")
        kinds = {"alpha": "fp32", "tiles": "i32"} | dict.fromkeys(SIZES, "i32") | dict.fromkeys(constants, "constexpr")
        signature[name] = kinds.get(name, "*fp32" if wide and dtype != "fp64" else f"*{dtype}")
        if name not in ("alpha", "tiles", *constants):
            attributes[(i,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    ahead = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, 0x10\b", compiled.asm["ptx"])
    return re.findall(r"(?:ld|st)\.global[\w.:]*", compiled.asm["ptx"]) + ["ld.ahead.v4.b32"] * len(ahead)


if __name__ == "__main__":
    kinds = ("bf16", "fp32", "fp64")
    print(
        json.dumps(
            [(k.fn.__name__, dtype, accesses(k, constants, dtype)) for k, constants in VARIANTS for dtype in kinds]
        )
    )
