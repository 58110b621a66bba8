"""What people use instead of a patch, on the same model: each makes a copy of it into its own."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import eulernet
from benchmarks.timing import Run

H = 0.1


def branches(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The modules whose results are the branches: their names match the pattern."""
    found = {name: module for name, module in model.named_modules() if re.search(pattern, name)}
    if not found:
        raise LookupError(f"no module of {type(model).__name__} has a name that matches {pattern!r}")
    return found


def hooked(model: nn.Module, pattern: str, h: float = H) -> nn.Module:
    """Forward hooks that multiply the results of the branches; changes the model."""
    for module in branches(model, pattern).values():
        module.register_forward_hook(lambda module, args, out: out * h)
    return model


class LayerScale(nn.Module):
    """A module and a factor for each of its channels, learned (Touvron et al., arXiv:2103.17239)."""

    def __init__(self, module: nn.Module, shape: tuple[int, ...], h: float) -> None:
        super().__init__()
        self.module, self.gamma = module, nn.Parameter(torch.full(shape, h))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.module(*args, **kwargs) * self.gamma
        return result


def layer_scaled(model: nn.Module, pattern: str, inputs: dict[str, Any], h: float = H) -> nn.Module:
    """A LayerScale module around each branch; changes the model, which is run once for the numbers of channels."""
    shapes: dict[str, tuple[int, ...]] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            shapes[name] = (out.shape[1], 1, 1) if out.dim() == 4 else (out.shape[-1],)

        return hook

    found = branches(model, pattern)
    handles = [module.register_forward_hook(look(name)) for name, module in found.items()]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    for name, module in found.items():
        model.set_submodule(name, LayerScale(module, shapes[name], h))
    return model


def hand_written(model: nn.Module, h: float = H) -> nn.Module:
    """`x + h * f` written into the forward of each block; changes the model."""
    for module in model.modules():
        write = _FORWARDS.get(type(module).__name__)
        if write is not None:
            module.forward = write(module, h)
    return model


def _bottleneck(block: Any, h: float) -> Callable[..., Tensor]:
    def forward(x: Tensor) -> Tensor:
        f = block.act1(block.bn1(block.conv1(x)))
        f = block.act2(block.bn2(block.conv2(f)))
        f = block.bn3(block.conv3(f))
        result: Tensor = block.act3((x if block.downsample is None else block.downsample(x)) + h * f)
        return result

    return forward


def _vit_block(block: Any, h: float) -> Callable[..., Tensor]:
    def forward(x: Tensor, **options: Any) -> Tensor:
        x = x + h * block.drop_path1(block.ls1(block.attn(block.norm1(x), **options)))
        result: Tensor = x + h * block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return result

    return forward


def _convnext_block(block: Any, h: float) -> Callable[..., Tensor]:
    def forward(x: Tensor) -> Tensor:
        f = block.mlp(block.norm(block.conv_dw(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        result: Tensor = block.shortcut(x) + h * block.drop_path(f * block.gamma.reshape(1, -1, 1, 1))
        return result

    return forward


def _bert_output(block: Any, h: float) -> Callable[..., Tensor]:
    def forward(f: Tensor, x: Tensor) -> Tensor:
        result: Tensor = block.LayerNorm(x + h * block.dropout(block.dense(f)))
        return result

    return forward


_FORWARDS: dict[str, Callable[[Any, float], Callable[..., Tensor]]] = {
    "Bottleneck": _bottleneck,
    "Block": _vit_block,
    "ConvNeXtBlock": _convnext_block,
    "BertSelfOutput": _bert_output,
    "BertOutput": _bert_output,
}


def unit_scaled(model: nn.Module) -> nn.Module:
    """The whole model, unit-scaled (Blake et al., arXiv:2303.11257); other weights, another method, the same place."""
    from unit_scaling.transforms import unit_scale

    scaled: nn.Module = unit_scale(model)
    return scaled


def peers(model: nn.Module, pattern: str, inputs: dict[str, Any]) -> dict[str, Callable[[], nn.Module]]:
    """How each comes from the model, which stays as it is."""
    return {
        "eulernet": lambda: eulernet.patch(copy.deepcopy(model), h=H),
        "hand-written": lambda: hand_written(copy.deepcopy(model)),
        "forward hooks": lambda: hooked(copy.deepcopy(model), pattern),
        "LayerScale": lambda: layer_scaled(copy.deepcopy(model), pattern, inputs),
        "unit-scaling": lambda: unit_scaled(copy.deepcopy(model)),
    }


def saved(model: nn.Module, run: Run) -> int:
    """Bytes that a forward and backward saves in between, beside the parameters."""
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # else their memory could be found twice

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        run()
    return sum(sizes.values())
