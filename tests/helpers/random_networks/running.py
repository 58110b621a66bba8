"""From source to modules: a network is imported, and given random parameters, inputs and factors."""

from __future__ import annotations

import importlib.util
import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from tests.helpers.random_networks.text import ROOT, KnownStep, RandomNetwork

_modules = count()


@contextmanager
def imported(source: str, folder: Path) -> Iterator[ModuleType]:
    """The source as a module, imported from a file in `folder` under a name of its own, and gone afterwards."""
    name = f"random_network_{next(_modules)}"
    file = folder / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]
        linecache.cache.pop(str(file), None)
        file.unlink()


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values in place of all parameters and running statistics: many start at 0 or 1 and would hide an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def random_input(network: RandomNetwork, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(network.shape, generator=generator, dtype=torch.float64).to(network.dtype)


def set_factors(twin: nn.Module, factors: dict[KnownStep, float]) -> None:
    """Each of the twin's written-out step factors."""
    for step, factor in factors.items():
        setattr(twin.get_submodule("" if step.module == ROOT else step.module), step.attribute, factor)
