"""`python -m benchmarks.fused`: how many steps of which model are fused with what stands around them, and with what.

Nothing is timed and no GPU is needed: each model runs once in evaluation and once in training, as a GPU would run it
with large states, and its kernels, which are not started, are counted. A step is fused where one kernel does more than
the addition. Models have their own blocks, and few of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import eulernet
from benchmarks.tables import Table, rich_table
from eulernet import kernels
from eulernet._run import fuse
from eulernet._run.patched import ADD_NORM, EPILOGUE, EPILOGUE_IN_PLACE, SCALE, STEP, STEP_IN_PLACE, Patched

RESULTS = Path(__file__).parent / "results" / "fused.json"
Row = dict[str, Any]
Inputs = dict[str, Tensor]


def _timm(name: str, **options: Any) -> Callable[[], tuple[nn.Module, Inputs]]:
    def build() -> tuple[nn.Module, Inputs]:
        import timm

        model = timm.create_model(name, **options)
        size = options.get("img_size", model.pretrained_cfg["input_size"][-1])
        return model, {"x": torch.randn(2, 3, size, size)}

    return build


def _torchvision(name: str) -> Callable[[], tuple[nn.Module, Inputs]]:
    def build() -> tuple[nn.Module, Inputs]:
        import torchvision

        return torchvision.models.get_model(name, weights=None), {"x": torch.randn(2, 3, 224, 224)}

    return build


def _text(name: str, config: str, **options: Any) -> Callable[[], tuple[nn.Module, Inputs]]:
    """Of Hugging Face, with two layers of width 64."""

    def build() -> tuple[nn.Module, Inputs]:
        import transformers

        made = getattr(transformers, config)(vocab_size=100, **options)
        model = getattr(transformers, name)(made)
        inputs = {"input_ids": torch.randint(3, 90, (2, 8))}
        if made.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        return model, inputs

    return build


_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_DECODER = {**_SMALL, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
MODELS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "ResNet-50 (timm)": _timm("resnet50"),
    "ResNet-50 (torchvision)": _torchvision("resnet50"),
    "ResNeXt-50": _timm("resnext50_32x4d"),
    "SE-ResNet-50": _timm("seresnet50"),
    "ResNet-RS-50": _timm("resnetrs50", drop_path_rate=0.1),
    "RegNetY (timm)": _timm("regnety_004"),
    "RegNetY (torchvision)": _torchvision("regnet_y_400mf"),
    "EfficientNet-B0": _timm("efficientnet_b0", drop_path_rate=0.1),
    "MobileNetV3": _timm("mobilenetv3_large_100"),
    "ConvNeXt (timm)": _timm("convnext_atto", drop_path_rate=0.1),
    "ConvNeXt (torchvision)": _torchvision("convnext_tiny"),
    "ConvNeXt V2": _timm("convnextv2_atto", drop_path_rate=0.1),
    "ViT (timm)": _timm("vit_tiny_patch16_224", depth=2, drop_path_rate=0.1),
    "ViT (torchvision)": _torchvision("vit_b_32"),
    "DeiT III": _timm("deit3_small_patch16_224", depth=2, drop_path_rate=0.1),
    "DINOv2 (timm)": _timm("vit_small_patch14_reg4_dinov2", depth=2, img_size=224, drop_path_rate=0.1),
    "SigLIP (timm)": _timm("vit_base_patch16_siglip_224", depth=2),
    "EVA-02": _timm("eva02_tiny_patch14_224", depth=2, drop_path_rate=0.1),
    "BEiT": _timm("beit_base_patch16_224", depth=2, drop_path_rate=0.1),
    "CaiT": _timm("cait_xxs24_224", depth=2, drop_path_rate=0.1),
    "Swin (timm)": _timm("swin_tiny_patch4_window7_224", drop_path_rate=0.1),
    "Swin (torchvision)": _torchvision("swin_t"),
    "Mixer": _timm("mixer_s32_224", drop_path_rate=0.1),
    "PoolFormer": _timm("poolformer_s12", drop_path_rate=0.1),
    "BERT": _text("BertModel", "BertConfig", **_SMALL),
    "RoBERTa": _text("RobertaModel", "RobertaConfig", **_SMALL),
    "GPT-2": _text("GPT2LMHeadModel", "GPT2Config", n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    "Llama": _text("LlamaForCausalLM", "LlamaConfig", **_DECODER),
    "Mistral": _text("MistralForCausalLM", "MistralConfig", **_DECODER),
    "Qwen3": _text("Qwen3ForCausalLM", "Qwen3Config", **_DECODER),
    "Gemma 2": _text("Gemma2ForCausalLM", "Gemma2Config", **_DECODER),
    "OPT": _text(
        "OPTForCausalLM", "OPTConfig", hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    "T5": _text("T5Model", "T5Config", d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
}  # fmt: skip
_THEN = {"relu": "ReLU", "silu": "SiLU", "gelu": "GELU", "layer_norm": "LayerNorm", "rms_norm": "RMSNorm"}
_WRITTEN = {"step_forward": (4, 5), "norm_forward": (6, 7, 8, 9), "bn_forward": (6,)}


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Kernels are chosen at any size and not started; counted is each step by what it is fused with, "" for nothing."""
    from eulernet.kernels import _launch

    counts: Counter[str] = Counter()
    fused: list[str] = []

    def start(self: Any, tensors: tuple[Tensor | None, ...], h: float) -> None:
        for i in _WRITTEN[self.kernel.fn.__name__]:
            if (result := tensors[i]) is not None:
                result.zero_()

    def watched(name: str | None, after: Any, skip: Any, branch: Any, *rest: Any, **options: Any) -> Any:
        result = original(name, after, skip, branch, *rest, **options)
        if result is not None:
            waiting = branch if type(branch) is fuse.DeferredBranch else None
            fused.append(_named(waiting, name if after is None else after.kind))
        return result

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            fused.clear()
            result = method(self, *arguments, **options)
            counts[fused[-1] if fused else ""] += 1
            return result

        return call

    original, started = fuse._fused, _launch.Launch.__call__
    names = (STEP, STEP_IN_PLACE, EPILOGUE, EPILOGUE_IN_PLACE, ADD_NORM, SCALE)
    methods = {name: getattr(Patched, name) for name in names}
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        fuse._fused, _launch.Launch.__call__ = watched, start  # type: ignore[method-assign]
        for name, method in methods.items():
            setattr(Patched, name, counted(method))
        with kernels.mode("triton"):
            yield counts
    finally:
        fuse._fused, _launch.Launch.__call__ = original, started  # type: ignore[method-assign]
        for name, method in methods.items():
            setattr(Patched, name, method)
        os.environ.pop("TRITON_INTERPRET") if before is None else os.environ.update(TRITON_INTERPRET=before)


def _named(waiting: fuse.DeferredBranch | None, then: str | None) -> str:
    """What one kernel does together: `BatchNorm + step + ReLU`; "" where that is the addition alone."""
    parts = ["step"]
    if waiting is not None:
        before = {"BatchNorm": waiting.norm, "LayerScale": waiting.scale, "drop path": waiting.mask}
        parts = [name for name, value in before.items() if value is not None] + parts
    if then is not None:
        parts.append(_THEN[then])
    return " + ".join(parts) if len(parts) > 1 else ""


def measure(name: str) -> Iterator[Row]:
    """How many of a model's steps, in evaluation and in training, are fused with what."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    eulernet.patch(model.eval(), h=0.5, example_inputs=inputs)
    for training in (False, True):
        model.train(training)
        with counting() as counts, torch.set_grad_enabled(training):
            model(**inputs) if "input_ids" in inputs else model(inputs["x"])
        yield {"model": name, "training": training, "steps": counts.total(), "with": dict(counts)}


def table(rows: list[Row]) -> Table:
    """A row a model, and one for all of them: each model counts the same."""
    shares: dict[bool, list[float]] = {False: [], True: []}
    lines: dict[str, list[str]] = {}
    for row in rows:
        counted = {what: n for what, n in row["with"].items() if what}
        shares[row["training"]].append(sum(counted.values()) / row["steps"])
        share = f"{sum(counted.values())} of {row['steps']}"
        with_what = "; ".join(f"{n} {what}" for what, n in sorted(counted.items(), key=lambda item: -item[1]))
        lines.setdefault(row["model"], [row["model"]]).extend([with_what, share])
    ordered = [[name, evaluation, training, a, b] for name, evaluation, a, training, b in lines.values()]
    means = [f"{sum(found) / len(found):.0%}" for found in shares.values()]
    columns = ("model", "fused in evaluation", "fused in training", "evaluation", "training")
    return Table("Steps that one kernel does with what stands around them", columns, 3, [
        *ordered, ["mean share of the models", "", "", *means],
    ])  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fused", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("models", nargs="*", help="only these models, which are then not written", metavar="model")
    given = parser.parse_args(arguments)
    if unknown := set(given.models) - MODELS.keys():
        parser.error(f"{', '.join(sorted(unknown))} is not known; use some of {', '.join(MODELS)}")
    rows = [row for name in given.models or MODELS for row in measure(name)]
    if not given.models:
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm", "transformers"))
        data = {"command": "python -m benchmarks.fused", "versions": versions, "rows": rows}
        given.json.write_text(json.dumps(data, indent=1) + "\n")
    from rich.console import Console

    Console().print(rich_table(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
