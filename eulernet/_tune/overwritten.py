"""Say which module's gradient fails, since what it keeps for it is written into afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eulernet._find.tensors import storage_of, version_of
from eulernet._run.hooks import StepInputs


class Kept:
    """The tensors that the modules of a model keep for their gradients while it runs once more."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name or "the model itself" for name, module in model.named_modules()}
        self.running: list[nn.Module] = []
        self.kept: list[tuple[Tensor, int, nn.Module]] = []  # with its version, and who keeps it
        self.steps: list[tuple[int, str, int]] = []  # how many were kept before it, its name, its skip's storage

    def during(self, run: Callable[[], Any]) -> None:
        """Look on as the model runs."""
        handles = []
        for module in self.names:
            handles.append(module.register_forward_pre_hook(lambda module, args: self.running.append(module)))
            handles.append(module.register_forward_hook(lambda *_: self.running.pop() and None, always_call=True))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
                run()
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, tensor: Tensor) -> Tensor:
        if self.running:
            self.kept.append((tensor, version_of(tensor), self.running[-1]))
        return tensor

    def see(self, step: str, seen: StepInputs) -> None:
        """A step is about to be made."""
        if isinstance(seen.skip, Tensor):
            self.steps.append((len(self.kept), step, storage_of(seen.skip)))

    def overwritten(self) -> str | None:
        """The first module whose tensor was written into, and by which step, if it was one."""
        for number, (tensor, version, module) in enumerate(self.kept):
            if version_of(tensor) != version:
                storage = storage_of(tensor)
                by = next((name for before, name, at in self.steps if before > number and at == storage), None)
                writes = f"the step {by!r} writes" if by is not None else "something after it writes"
                return (
                    f"{self.names[module]} ({type(module).__name__}) keeps a tensor of shape {tuple(tensor.shape)} for "
                    f"its gradient, and {writes} into it, in place. Make a new tensor there: x = x + f(x) and not "
                    "x += f(x)"
                )
        return None
