"""The models that are measured, with random weights, and an input for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Inputs = dict[str, Any]


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name)
        return model

    return build


def bert_small() -> nn.Module:
    """BERT with 4 layers of width 512, as in "Well-Read Students Learn Better" (arXiv:1908.08962)."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048)
    model: nn.Module = BertModel(config)
    return model


def llama_7b() -> nn.Module:
    """Llama of 6.7 billion parameters, the default configuration, on the meta device: nothing is allocated."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(LlamaConfig())
    return model


def first_output(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """What a model returns, or the first entry of it."""
    out: Any = model(*inputs.values())
    return out if isinstance(out, torch.Tensor) else out[0]


def images(batch: int) -> Inputs:
    return {"x": torch.randn(batch, 3, 224, 224)}


def tokens(batch: int, length: int) -> Inputs:
    return {"input_ids": torch.randint(0, 1000, (batch, length))}


# name -> how to build it, and its inputs as arguments by name
SPEED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "resnet50": (_timm("resnet50"), lambda: images(1)),
    "vit_small": (_timm("vit_small_patch16_224"), lambda: images(1)),
    "convnext_tiny": (_timm("convnext_tiny"), lambda: images(1)),
    "bert_small": (bert_small, lambda: tokens(1, 128)),
}
# name -> a pattern of the names of the modules whose results are the branches
BRANCHES: dict[str, str] = {
    "resnet50": r"layer\d\.\d+\.bn3$",
    "vit_small": r"blocks\.\d+\.drop_path[12]$",
    "convnext_tiny": r"blocks\.\d+\.drop_path$",
    "bert_small": r"output\.dropout$",
}
PATCH: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    **SPEED,
    "vit_large": (_timm("vit_large_patch16_224"), lambda: images(1)),
    "llama_7b (meta)": (llama_7b, lambda: {}),
}
