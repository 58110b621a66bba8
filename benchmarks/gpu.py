"""`python -m benchmarks.gpu`: how near the fused operations come to the speed of memory, and what models gain by them.

Operations are timed on the device alone, back to back, over buffers that rotate so that the cache holds none of them;
bytes are counted (each operand read once, each result written once), and `clone()` of a tensor of the same size is
timed in the same run. Results of a run replace those of the same name in the JSON, the others stay.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import re
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import eulernet
from eulernet import kernels
from eulernet.functional import euler_step, euler_step_bn, euler_step_norm

RESULTS = Path(__file__).parent / "results" / "gpu.json"
NO_GPU = (
    "There is no CUDA device here: benchmarks.gpu measures a GPU (--smoke runs all of it on the CPU with tiny sizes, "
    "which measures nothing)."
)
Function = Callable[..., Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is run: in earnest on a GPU, or tiny ones that show that all of it runs."""

    device: str
    mebibytes: tuple[float, ...]  # of one operand
    calls: int  # in one timing
    rounds: int
    backend: str  # of torch.compile
    models: dict[str, Model]


# ---- operations


@dataclass(frozen=True)
class Operation:
    """A fused operation and the same in eager PyTorch.

    Args:
        fused, eager: functions of (skip, branch, *small).
        small: shapes of the small operands, for rows of C elements, or for images (N, C, H, W).
        forward, backward: which streams are moved: s, b, o for tensors of skip's, branch's and the result's dtype;
            no backward: it is for inference.
        flops: for an element, forward; for the roofline.
        images: whether the operands are images in channels_last.
    """

    fused: Function
    eager: Function
    small: tuple[Callable[[int], tuple[int, ...]], ...]
    forward: str
    backward: str
    flops: int
    images: bool = False


H = 0.1
_row = (lambda c: (c,),)


def _layer_scale(skip: Tensor, branch: Tensor, gamma: Tensor) -> Tensor:
    return euler_step(skip, branch, H, layer_scale=gamma)


def _drop_path(skip: Tensor, branch: Tensor, gamma: Tensor) -> Tensor:
    return euler_step(skip, branch, H, layer_scale=gamma, drop_path=0.1)


def _drop_path_eager(skip: Tensor, branch: Tensor, gamma: Tensor) -> Tensor:
    f = gamma * branch
    mask = f.new_empty((f.shape[0],) + (1,) * (f.dim() - 1)).bernoulli_(0.9).div_(0.9)
    return torch.add(skip, mask * f, alpha=H)


def _layer_norm_eager(skip: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.add(skip, branch, alpha=H)
    return state, F.layer_norm(state, state.shape[-1:], weight, bias)


def _before_layer_norm(skip: Tensor, branch: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor) -> object:
    return euler_step_norm(skip, branch, H, weight, bias, layer_scale=gamma, drop_path=0.1)


def _before_layer_norm_eager(skip: Tensor, branch: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor) -> object:
    state = _drop_path_eager(skip, branch, gamma)
    return state, F.layer_norm(state, state.shape[-1:], weight, bias)


def _rms_norm_eager(skip: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.add(skip, branch, alpha=H)
    return state, F.rms_norm(state, state.shape[-1:], weight, 1e-6)


def _bn(skip: Tensor, branch: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return euler_step_bn(skip, branch, H, mean, var, weight, bias, activation="relu")


def _bn_eager(skip: Tensor, branch: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.add(skip, F.batch_norm(branch, mean, var, weight, bias), alpha=H).relu_()


OPERATIONS: dict[str, Operation] = {
    "step": Operation(
        lambda s, b: euler_step(s, b, H), lambda s, b: torch.add(s, b, alpha=H), (), "sbo", "ob", flops=2
    ),
    "step, ReLU": Operation(
        lambda s, b: euler_step(s, b, H, activation="relu"),
        lambda s, b: torch.add(s, b, alpha=H).relu_(),
        (),
        "sbo",
        "oosb",
        flops=3,
        images=True,
    ),
    "step, GELU": Operation(
        lambda s, b: euler_step(s, b, H, activation="gelu"),
        lambda s, b: F.gelu(torch.add(s, b, alpha=H)),
        (),
        "sbo",
        "osbsb",
        flops=10,
    ),
    "LayerScale, step": Operation(
        _layer_scale, lambda s, b, g: torch.add(s, g * b, alpha=H), _row, "sbo", "obb", flops=3
    ),
    "LayerScale, drop path, step": Operation(_drop_path, _drop_path_eager, _row, "sbo", "obb", flops=4),
    "step, LayerNorm": Operation(
        lambda s, b, w, c: euler_step_norm(s, b, H, w, c), _layer_norm_eager, _row * 2, "sboo", "ooosb", flops=10
    ),
    "LayerScale, drop path, step, LayerNorm": Operation(
        _before_layer_norm, _before_layer_norm_eager, _row * 3, "sboo", "ooobsb", flops=12
    ),
    "step, RMSNorm": Operation(
        lambda s, b, w: euler_step_norm(s, b, H, w, None, 1e-6, "rms_norm"),
        _rms_norm_eager,
        _row,
        "sboo",
        "ooosb",
        flops=7,
    ),
    "BatchNorm, step, ReLU (inference)": Operation(_bn, _bn_eager, _row * 4, "sbo", "", flops=6, images=True),
}
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32 + bfloat16": (torch.float32, torch.bfloat16),
}


def liger() -> Function | None:
    """Liger's addition with RMSNorm, the nearest operation that others have; None where it is not installed."""
    try:
        from liger_kernel.transformers.functional import liger_fused_add_rms_norm
    except ImportError:
        return None
    return lambda skip, branch, weight: liger_fused_add_rms_norm(branch, skip, weight, 1e-6)[::-1]


def measure_operation(name: str, dtypes: str, mebibytes: float, sizes: Sizes) -> Iterator[Row]:
    operation = OPERATIONS[name]
    skip_dtype, branch_dtype = DTYPES[dtypes]
    dtype = torch.promote_types(skip_dtype, branch_dtype)
    itemsize = {"s": skip_dtype.itemsize, "b": branch_dtype.itemsize, "o": dtype.itemsize}
    channels, copies = (64, 2) if sizes.device == "cpu" else (1024, 4)
    rows = int(mebibytes * 2**20 / dtype.itemsize / channels)
    shape = (rows // 64, channels, 8, 8) if operation.images else (rows // 64, 64, channels)
    elements = rows // 64 * 64 * channels

    def operand(of: torch.dtype) -> Tensor:
        x = torch.randn(shape, device=sizes.device).to(of)
        return (x.contiguous(memory_format=torch.channels_last) if operation.images else x).requires_grad_()

    buffers = [
        [operand(skip_dtype), operand(branch_dtype)]
        + [torch.rand(s(channels), device=sizes.device, dtype=dtype).requires_grad_() for s in operation.small]
        for _ in range(copies)
    ]
    clone = _seconds([lambda x=x[0]: x.detach().clone() for x in buffers], sizes)
    clone_rate = 2 * elements * skip_dtype.itemsize / clone / 1e9

    def fused(*inputs: Tensor) -> object:
        with kernels.mode("triton"):  # the plain step too, which "auto" leaves to torch.add
            return operation.fused(*inputs)

    functions: dict[str, Function] = {"fused": fused, "eager": operation.eager}
    torch._dynamo.reset()
    functions["compiled"] = torch.compile(operation.eager, backend=sizes.backend)
    other = liger() if name == "step, RMSNorm" and skip_dtype == branch_dtype else None
    if other is not None:
        functions["Liger"] = other
    for direction, streams in (("forward", operation.forward), ("backward", operation.backward)):
        if not streams:
            continue
        moved = elements * sum(itemsize[s] for s in streams)
        row: Row = {
            "table": "operations", "name": name, "dtype": dtypes, "MiB": mebibytes, "direction": direction,
            "bytes": moved, "flops": operation.flops * elements, "clone GB/s": clone_rate,
        }  # fmt: skip
        for kind, function in functions.items():
            calls = _forwards(function, buffers) if direction == "forward" else _backwards(function, buffers)
            shared = (kind, direction) == ("Liger", "backward")  # without h, branch and skip have one gradient
            row[f"{kind} GB/s"] = (moved - shared * elements * itemsize["b"]) / _seconds(calls, sizes) / 1e9
        yield row


def _forwards(function: Function, buffers: Sequence[Sequence[Tensor]]) -> list[Function]:
    def call(inputs: Sequence[Tensor]) -> Function:
        def run() -> object:
            with torch.no_grad():
                return function(*inputs)

        return run

    return [call(inputs) for inputs in buffers]


def _backwards(function: Function, buffers: Sequence[Sequence[Tensor]]) -> list[Function]:
    def call(inputs: Sequence[Tensor]) -> Function:
        out = function(*inputs)
        outs = list(out) if isinstance(out, tuple) else [out]
        seeds = [torch.randn_like(o) for o in outs]
        return lambda: torch.autograd.grad(outs, list(inputs), seeds, retain_graph=True)

    return [call(inputs) for inputs in buffers]


def _seconds(calls: Sequence[Function], sizes: Sizes) -> float:
    """The time of one call: the median over rounds of calls that follow one another without a gap."""
    for call in calls:
        call()
    times = []
    for _ in range(sizes.rounds):
        if sizes.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]  # cycles in which the calls are queued, so that launching costs nothing
            start.record()
            for call in itertools.islice(itertools.cycle(calls), sizes.calls):
                call()
            end.record()
            torch.cuda.synchronize()
            times.append(float(start.elapsed_time(end)) / 1e3 / sizes.calls)
        else:
            began = time.perf_counter()
            for call in itertools.islice(itertools.cycle(calls), sizes.calls):
                call()
            times.append((time.perf_counter() - began) / sizes.calls)
    return statistics.median(times)


# ---- launch cost


def measure_launch(sizes: Sizes) -> Iterator[Row]:
    """Microseconds of the host for a tensor so small that nothing else counts, and where a kernel begins to pay."""
    repeats = 1000 if sizes.device == "cuda" else 3
    elements = [2**n for n in range(3, 25, 3)] if sizes.device == "cuda" else [8]
    candidates: dict[str, tuple[str, Function]] = {
        "torch.add": ("torch", lambda s, b: torch.add(s, b, alpha=H)),
        "torch.add, relu": ("torch", lambda s, b: torch.add(s, b, alpha=H).relu()),
        "step": ("triton", lambda s, b: euler_step(s, b, H)),
        "step, ReLU": ("triton", lambda s, b: euler_step(s, b, H, activation="relu")),
    }
    for n, (name, (mode, function)) in itertools.product(elements, candidates.items()):
        skip, branch = (torch.randn(n, device=sizes.device).requires_grad_() for _ in range(2))
        seed = torch.ones_like(skip)

        def run(function: Function = function, skip: Tensor = skip, branch: Tensor = branch) -> object:
            return function(skip, branch)

        def both(run: Function = run, inputs: Any = (skip, branch), seed: Tensor = seed) -> object:
            return torch.autograd.grad(run(), inputs, seed)

        with kernels.mode(mode):
            row: Row = {"table": "launch", "name": name, "elements": n}
            for what, call in (("forward", run), ("forward + backward", both)):
                for _ in range(3):
                    call()
                times = []
                for _ in range(sizes.rounds):
                    _synchronize(sizes)
                    began = time.perf_counter()
                    for _ in range(repeats):
                        call()
                    _synchronize(sizes)
                    times.append((time.perf_counter() - began) / repeats * 1e6)
                row[f"{what} us"] = statistics.median(times)
        yield row


def _synchronize(sizes: Sizes) -> None:
    if sizes.device == "cuda":
        torch.cuda.synchronize()


# ---- whole models


@dataclass(frozen=True)
class Model:
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    images: bool = False  # convolutional: channels_last


def _timm(name: str, batch: int, images: bool = False, size: int = 224, **options: Any) -> Model:
    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, **options)
        return model

    return Model(build, lambda: torch.randn(batch, 3, size, size), images)


def _bert_large() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        add_cross_attention=False,
    )
    model: nn.Module = BertModel(config, add_pooling_layer=False)
    return model


def _llama_1b() -> nn.Module:
    """The shape of Llama 3.2 1B with a small vocabulary, whose head would hide the blocks."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=1024, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=8192, use_cache=False,
    )  # fmt: skip
    model: nn.Module = LlamaModel(config)
    return model


MODELS: dict[str, Model] = {
    "resnet50": _timm("resnet50", 128, images=True),
    "resnet200d": _timm("resnet200d", 64, images=True, size=256),
    "convnext_base": _timm("convnext_base", 64, images=True),
    "deit3_base": _timm("deit3_base_patch16_224", 128),
    "vit_large (DINOv2)": _timm("vit_large_patch14_dinov2", 32, img_size=224),
    "swin_base": _timm("swin_base_patch4_window7_224", 64),
    "bert_large": Model(_bert_large, lambda: torch.randint(0, 1000, (32, 512))),
    "llama_1b": Model(_llama_1b, lambda: torch.randint(0, 1000, (4, 2048))),
}
TINY: dict[str, Model] = {
    "resnet10t": _timm("resnet10t", 2, images=True, size=32),
    "deit3": _timm("deit3_small_patch16_224", 2, img_size=32, embed_dim=32, depth=2, num_heads=2, size=32),
}


def measure_model(name: str, what: str, backend: str, sizes: Sizes) -> Iterator[Row]:
    model, training = sizes.models[name], what == "training"
    runs: dict[str, Function] = {}
    memory: dict[str, float] = {}
    torch._dynamo.reset()
    for variant in ("original", "patched"):
        torch.manual_seed(0)
        net = model.build().to(sizes.device).train(training)
        net = net.to(memory_format=torch.channels_last) if model.images else net
        inputs = model.inputs().to(sizes.device)
        inputs = inputs.contiguous(memory_format=torch.channels_last) if model.images else inputs
        if variant == "patched":
            eulernet.patch(net, h=H, example_inputs=inputs)
        if backend == "compiled":
            net.compile(backend=sizes.backend)
        runs[variant] = _train(net, inputs, sizes) if training else _infer(net, inputs, sizes)
        runs[variant]()
        if sizes.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            runs[variant]()
            memory[variant] = torch.cuda.max_memory_allocated() - before
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {variant: [] for variant in runs}
    for i in range(sizes.rounds):
        for variant in list(runs)[:: 1 if i % 2 else -1]:
            _synchronize(sizes)
            began = time.perf_counter()
            runs[variant]()
            _synchronize(sizes)
            seconds[variant].append(time.perf_counter() - began)
    ratios = [p / o for p, o in zip(seconds["patched"], seconds["original"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    yield {
        "table": "models", "name": name, "what": what, "backend": backend,
        "original ms": statistics.median(seconds["original"]) * 1e3,
        "patched ms": statistics.median(seconds["patched"]) * 1e3, "ratio": median, "low": low, "high": high,
        "original bytes": memory.get("original"), "patched bytes": memory.get("patched"),
    }  # fmt: skip


def _train(net: nn.Module, inputs: Tensor, sizes: Sizes) -> Function:
    def run() -> None:
        net.zero_grad()
        with torch.autocast(sizes.device, torch.bfloat16):
            out: Any = net(inputs)
        (out if isinstance(out, Tensor) else out[0]).float().square().mean().backward()

    return run


def _infer(net: nn.Module, inputs: Tensor, sizes: Sizes) -> Function:
    def run() -> None:
        with torch.no_grad(), torch.autocast(sizes.device, torch.bfloat16):
            net(inputs)

    return run


# ---- the command


def where(sizes: Sizes) -> Row:
    """What a row was measured on."""
    packages = ("eulernet", "torch", "triton", "timm", "transformers")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    device = torch.cuda.get_device_name() if sizes.device == "cuda" else "the CPU, tiny sizes: no measurement"
    command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
    return {"device": device, "versions": versions, "python": sys.version.split()[0], "command": command}


def parts(sizes: Sizes) -> Iterator[tuple[str, Iterator[Row]]]:
    """All that can be measured, by name."""
    for name, dtypes, mebibytes in itertools.product(OPERATIONS, DTYPES, sizes.mebibytes):
        yield f"operations/{name}/{dtypes}", measure_operation(name, dtypes, mebibytes, sizes)
    yield "launch", measure_launch(sizes)
    for name, what, backend in itertools.product(sizes.models, ("training", "inference"), ("eager", "compiled")):
        yield f"models/{name}/{what}/{backend}", measure_model(name, what, backend, sizes)


KEYS = ("table", "name", "dtype", "MiB", "direction", "elements", "what", "backend")


def save(path: Path, new: Sequence[Row]) -> None:
    """Write rows into a JSON, in place of those of the same name."""
    old: list[Row] = json.loads(path.read_text()) if path.exists() else []
    merged = {tuple(row.get(key) for key in KEYS): row for row in (*old, *new)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in merged.values()) + "\n]\n")


def show(measured: Sequence[Row]) -> None:
    console = Console()
    for title in ("operations", "launch", "models"):
        mine = [row for row in measured if row["table"] == title]
        if mine:
            hidden = ("table", "device", "versions", "python", "command", "bytes", "flops", "low", "high")
            columns = list(dict.fromkeys(key for row in mine for key in row if key not in hidden))
            table = Table(title=f"{title}, {mine[0]['device']}")
            for column in columns:
                table.add_column(column, justify="left" if isinstance(mine[0].get(column), str) else "right")
            for row in mine:
                table.add_row(*(_cell(row.get(column)) for column in columns))
            console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 100
        else f"{value:,.0f}"
        if isinstance(value, int | float)
        else str(value)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "-k",
        default="",
        help="a regular expression on names: operations/step, ReLU/bfloat16, launch, models/resnet50/training/eager",
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--smoke", action="store_true", help="run it all with tiny sizes; nothing is written")
    given = parser.parse_args(arguments)
    if not given.smoke and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 1
    torch._functorch.config.donated_buffer = False  # a graph is run backward repeatedly
    if given.smoke:
        os.environ.setdefault("TRITON_INTERPRET", "1")
        sizes = Sizes("cpu", (2**-5,), calls=2, rounds=2, backend="aot_eager", models=TINY)
    else:
        sizes = Sizes("cuda", (64, 256), calls=20, rounds=15, backend="inductor", models=MODELS)
    on = where(sizes)
    measured: list[Row] = []
    failed: list[str] = []
    for name, part in parts(sizes):
        if not re.search(given.k, name):
            continue
        try:
            for row in part:
                measured.append(row | on)
                print(".", end="", flush=True, file=sys.stderr)
                if not given.smoke:
                    save(given.json, measured)
        except Exception:  # the time on a GPU is short: the other parts are measured all the same
            traceback.print_exc()
            failed.append(name)
    print(file=sys.stderr)
    show(measured)
    if failed:
        print(f"Not measured, the errors stand above: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
