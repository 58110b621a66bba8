"""Whole models, patched against original, in turn: at batch 1 and at a large one, in training and in inference, AMP."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import eulernet
from benchmarks.gpu.clock import WallClock
from benchmarks.gpu.results import Row
from benchmarks.gpu.sizes import Sizes
from benchmarks.peers import hooked
from benchmarks.timing import Interleaved, Run

H = 0.1


@dataclass(frozen=True)
class Model:
    """How to build one, and what to run it on.

    Args:
        build: the model, on the device that is the default.
        inputs: those of a batch.
        batch: the large one.
        images: whether it is convolutional: channels_last.
        branches: a pattern of the names of the modules whose results are the branches, for forward hooks.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    batch: int
    branches: str
    images: bool = False


CONVNEXT, VIT = r"blocks\.\d+\.drop_path$", r"blocks\.\d+\.drop_path[12]$"


def _timm(name: str, batch: int, branches: str, images: bool = False, size: int = 224, **options: Any) -> Model:
    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, **options)
        return model

    return Model(build, lambda n: torch.randn(n, 3, size, size), batch, branches, images)


def _bert_large() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        add_cross_attention=False,
    )  # fmt: skip
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


def _tokens(length: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(0, 1000, (n, length))


# In order of importance.
MODELS: dict[str, Model] = {
    "resnet50": _timm("resnet50", 128, r"layer\d\.\d+\.bn3$", images=True),
    "deit3_base": _timm("deit3_base_patch16_224", 128, VIT),
    "llama_1b": Model(_llama_1b, _tokens(2048), 4, r"self_attn\.o_proj$|mlp$"),
    "convnext_base": _timm("convnext_base", 64, CONVNEXT, images=True),
    "bert_large": Model(_bert_large, _tokens(512), 32, r"output\.dropout$"),
    "vit_large (DINOv2)": _timm("vit_large_patch14_dinov2", 32, VIT, img_size=224),
    "swin_base": _timm("swin_base_patch4_window7_224", 64, VIT),
    "resnet200d": _timm("resnet200d", 64, r"layer\d\.\d+\.bn3$", images=True, size=256),
}
TINY: dict[str, Model] = {
    "resnet10t": _timm("resnet10t", 2, r"layer\d\.\d+\.bn2$", images=True, size=64),
    "deit3": _timm("deit3_small_patch16_224", 2, VIT, img_size=32, embed_dim=32, depth=2, num_heads=2, size=32),
}


def models(sizes: Sizes) -> dict[str, Model]:
    return TINY if sizes.tiny else MODELS


def build(model: Model, sizes: Sizes) -> dict[str, nn.Module]:
    """The original, a patched copy, and one with forward hooks that multiply, on the device."""
    torch.manual_seed(0)
    with torch.device(sizes.device):
        original = model.build()
        one = model.inputs(1)
    if model.images:
        original, one = original.to(memory_format=torch.channels_last), _channels_last(one)
    patched = eulernet.patch(copy.deepcopy(original), h=H, example_inputs=one)
    return {"original": original, "patched": patched, "hooks": hooked(copy.deepcopy(original), model.branches, H)}


def measure(name: str, compiled: bool, sizes: Sizes) -> Iterator[Row]:
    """A row for batch 1 and the large batch, in inference and in training."""
    model = models(sizes)[name]
    variants = build(model, sizes)
    if compiled:
        torch._dynamo.reset()
        del variants["hooks"]
        for net in variants.values():
            net.compile(backend=sizes.backend, dynamic=False)
    for batch in (1, model.batch) if not compiled else (model.batch,):
        inputs = on_the_device(model, batch, sizes)
        for training in (False, True):
            yield {
                "table": "models", "name": name, "what": "training" if training else "inference", "batch": batch,
                "backend": "compiled" if compiled else "eager", **_race(variants, inputs, training, sizes),
            }  # fmt: skip


def on_the_device(model: Model, batch: int, sizes: Sizes) -> Tensor:
    with torch.device(sizes.device):
        inputs = model.inputs(batch)
    return _channels_last(inputs) if model.images else inputs


def _race(variants: dict[str, nn.Module], inputs: Tensor, training: bool, sizes: Sizes) -> Row:
    runs = {kind: (train if training else infer)(net.train(training), inputs) for kind, net in variants.items()}
    row: Row = {}
    for kind, run in runs.items():
        run()
        if sizes.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            row[f"{kind} bytes"] = torch.cuda.max_memory_allocated() - before
            row[f"{kind} device ms"] = _device_seconds(run) * 1e3
    race = Interleaved(runs, WallClock(sizes.device))
    for _ in range(race.warm_up(2, least=5, seconds=sizes.seconds, most=50)):
        race.round()
    row |= {f"{kind} ms": race.median(kind) * 1e3 for kind in runs}
    row |= {"rounds": len(race.seconds["original"]), **race.ratio("patched", "original")}
    if "hooks" in runs:
        row["hooks"] = race.ratio("hooks", "original")["median"]
    for net in variants.values():
        net.zero_grad()
    return row


def _device_seconds(run: Run, times: int = 3) -> float:
    """What the kernels of a call take together: where a call takes longer, the device waits for the host."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        for _ in range(times):
            run()
        torch.cuda.synchronize()
    return float(sum(event.self_device_time_total for event in seen.key_averages())) / 1e6 / times


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def train(net: nn.Module, inputs: Tensor) -> Run:
    def run() -> None:
        net.zero_grad()
        with torch.autocast(inputs.device.type, torch.bfloat16):
            out: Any = net(inputs)
        (out if isinstance(out, Tensor) else out[0]).float().square().mean().backward()

    return run


def infer(net: nn.Module, inputs: Tensor) -> Run:
    def run() -> None:
        with torch.no_grad(), torch.autocast(inputs.device.type, torch.bfloat16):
            net(inputs)

    return run
