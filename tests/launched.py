"""Run real models, patched, with a driver that launches nothing; print what the compiler made of each launch, as JSON.

Run by a test in a process of its own: the driver stays. The models are those of timm and transformers with few layers
and their own widths, in evaluation and in training; what they launch is compiled for an H100 or H200.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn

import eulernet
from benchmarks import fake_gpu
from eulernet import kernels
from eulernet.kernels import _layout
from eulernet.kernels._launch import Launch

SHARED = 224 * 1024  # bytes that a multiprocessor has for programs
MULTIPROCESSORS = 4  # of a small GPU, so that programs that sum up have several tiles
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
WRITTEN = {
    "step_forward": {"state", "out"}, "norm_forward": {"stream", "normed"}, "bn_forward": {"out"},
    "step_backward": {"skip_grad", "branch_grad"}, "norm_backward": {"skip_grad", "branch_grad"},
}  # fmt: skip
BYTES = {"v4.b32": 16, "v2.b64": 16, "v2.b32": 8, "b64": 8, "v4.b16": 8}
launched: list[tuple[Launch, tuple[Tensor | None, ...], Any]] = []


def install() -> None:
    """The driver, a small GPU's size, what autocast does on a GPU, and a record of what is launched."""
    fake_gpu.install()
    from eulernet.kernels import _norm

    _layout.multiprocessors = lambda device: MULTIPROCESSORS  # type: ignore[assignment]
    _layout.shared_memory = lambda device: SHARED  # type: ignore[assignment]
    _norm.widened = lambda kind, device: kind == "layer_norm"
    through = Launch._through_triton

    def recorded(self: Launch, tensors: tuple[Tensor | None, ...], h: float) -> Any:
        compiled = through(self, tensors, h)
        launched.append((self, tensors, compiled))
        return compiled

    Launch._through_triton = recorded  # type: ignore[method-assign]


def models() -> Iterator[tuple[str, Callable[[], nn.Module], Any, torch.dtype, bool]]:
    """Name, how to build it, an input, the dtype of the parameters, and whether autocast runs it in bfloat16."""
    import timm
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    image, tokens = torch.randn(2, 3, 224, 224), torch.randint(0, 99, (2, 64))
    last = image.contiguous(memory_format=torch.channels_last)
    resnet, bf16, fp32 = (lambda: timm.create_model("resnet50")), torch.bfloat16, torch.float32
    yield "ResNet-50, NCHW", resnet, image, fp32, False
    yield "ResNet-50, NHWC", resnet, last, fp32, False
    yield "ResNet-50, NHWC, AMP", resnet, last, fp32, True
    yield "ResNet-50, NCHW, bfloat16", resnet, image, bf16, False

    def convnext() -> nn.Module:
        return timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), drop_path_rate=0.1)

    def vit() -> nn.Module:
        return timm.create_model("deit3_base_patch16_224", depth=2, drop_path_rate=0.1)

    yield "ConvNeXt", convnext, image, fp32, False
    yield "ViT", vit, image, fp32, False
    yield "ViT, AMP", vit, image, fp32, True
    yield "ViT, bfloat16", vit, image, bf16, False
    bert = BertConfig(num_hidden_layers=1, vocab_size=100)
    yield "BERT, bfloat16", lambda: BertModel(bert), tokens, bf16, False
    llama = LlamaConfig(hidden_size=2048, intermediate_size=128, num_hidden_layers=1, vocab_size=100)
    yield "Llama, bfloat16", lambda: LlamaModel(llama), tokens, bf16, False


def run(model: nn.Module, x: Any, training: bool, amp: bool) -> None:
    from eulernet.kernels import _bn, _norm, _step

    model.train(training)
    for module in (_step, _norm, _bn):
        module._plans.clear()
    for parameter in model.parameters():
        parameter.grad = None
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16) if amp else nullcontext():
        out = model(x)
        out = out if isinstance(out, Tensor) else out[0]
    if training:
        out.float().sum().backward()


def resources(binary: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes that did not fit into them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(TOOL), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}


def described(launch: Launch, tensors: tuple[Tensor | None, ...], compiled: Any) -> dict[str, Any]:
    """What a launch needs of a multiprocessor; bytes of its streams a thread has to move, and moves by vectors."""
    name = launch.kernel.fn.__name__
    constants = dict(zip(launch.kernel.arg_names[len(tensors) + 1 :], launch.tail, strict=True))
    row: dict[str, Any] = {"kernel": name, "programs": launch.programs, "warps": launch.warps}
    row |= resources(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}
    if constants.get("tiles", 1) > 1:
        row["multiprocessors"] = MULTIPROCESSORS
    if name not in WRITTEN:
        return row
    named = zip(launch.kernel.arg_names, tensors, strict=False)
    given = {argument: t for argument, t in named if t is not None}
    largest = max(t.numel() for t in given.values())
    streams = {argument: t for argument, t in given.items() if t.numel() == largest and "parts" not in argument}
    each = max(1, constants["BR"] * constants["BC"] // (32 * launch.warps))
    moved = {"ld": 0, "st": 0}
    for kind, width in re.findall(r"(ld|st)\.global(?:\.[a-z_:0-9A-Z]+?)*?\.((?:v\d\.)?b\d+)\b", compiled.asm["ptx"]):
        moved[kind] += BYTES.get(width, 0)
    # What is read ahead is copied to shared memory, before the loop for all stages but one.
    ahead = [
        int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (0x\w+|\d+)", compiled.asm["ptx"])
    ]
    moved["ld"] += sum(size for size in ahead if size == 16) // constants.get("STAGES", 1)
    for kind, written in (("ld", False), ("st", True)):
        mine = [t for argument, t in streams.items() if (argument in WRITTEN[name]) == written]
        row[kind] = {"bytes": sum(t.itemsize * each for t in mine), "by vectors": moved[kind]}
    return row | {"dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in streams.values()})}


def main() -> None:
    install()
    rows = []
    for name, build, x, dtype, amp in models():
        torch.manual_seed(0)
        x = x.to(dtype) if x.is_floating_point() else x
        model = build().to(dtype)
        eulernet.patch(model.eval(), h=0.5, example_inputs=x)
        for training in (False, True):
            with kernels.mode("triton"):
                run(model, x, training, amp)
            seen = {json.dumps(described(*launch), sort_keys=True) for launch in launched}
            launched.clear()
            rows += [{"model": name, "training": training} | json.loads(row) for row in sorted(seen)]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
