"""Record, while a model trains, what Fig. 2 of the paper shows: norms of weights and gradients; and step sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from eulernet._checks import brief, check_module, unwrapped, whole_number
from eulernet._errors import EulernetError
from eulernet._patch.patch import is_patched
from eulernet._patch.select import matches
from eulernet._run.hooks import StepInputs, add_step_hook, remove_step_hooks
from eulernet._run.patched import OBSERVED, Patched, by_module
from eulernet._step import ROOT

Record = dict[str, Any]
_BUFFERED = 32  # records that may wait on the device


class watch:
    """Record norms of weights, of gradients, and the sizes of steps, in every k-th iteration of a training.

    These are the quantities of Fig. 2 of *Towards Robust ResNet* (Zhang et al., IJCAI 2019). Call `step()` once an
    iteration, after `backward()` and before the optimiser's step; with a `GradScaler` after `scaler.unscale_(...)`.
    The norms are computed on the model's device and fetched from there some records at a time.

    Args:
        model: a patched model, or, with `step_sizes=False`, any.
        layers: patterns on the names of modules and parameters, by dotted component, for which there is one norm each
            (of all parameters below a module): `"layer1.1"`, `"blocks.*.mlp"`, `"layer1.*.conv2.weight"`. By default
            the modules that hold a step, one norm each.
        every: record iterations 0, k, 2k, ...
        step_sizes: record ||h F|| / ||s|| of each step; over its runs in an iteration, the root of the sum of
            squares of the one divided by that of the other; runs without gradients (validation) do not count. In a
            compiled model steps cannot be seen.
        path: a file to which each record is appended as a line of JSON.
        writer: anything with `add_scalar(tag, value, iteration)`, such as a `torch.utils.tensorboard.SummaryWriter`.

    Attributes:
        records: what was recorded, one dictionary an iteration: {"iteration": 0, "weight": {name: norm}, "gradient":
            {name: norm}, "step_size": {step: size}}. A name without gradient, a step that did not run, is left out.
        notes: what could not be recorded, one sentence each.

    Raises:
        EulernetError: the model is not patched, a pattern matches nothing, `every` is no positive integer.

    Example:
        >>> import torch, eulernet
        >>> model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = eulernet.patch(model, h=0.1, example_inputs=torch.zeros(2, 5, 8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with eulernet.watch(model, layers=["linear*.weight"], every=10) as log:
        ...     for _ in range(11):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(2, 5, 8)).square().mean().backward()
        ...         log.step()
        ...         optimizer.step()
        >>> [record["iteration"] for record in log.records], list(log.records[0]["weight"])
        ([0, 10], ['linear1.weight', 'linear2.weight'])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: str | Iterable[str] | None = None,
        every: int = 1,
        step_sizes: bool = True,
        path: str | PathLike[str] | None = None,
        writer: Any = None,
    ) -> None:
        check_module(model, "watch")
        every = whole_number(every, "every", "every=10, to record each tenth iteration", least=1)
        if writer is not None and not callable(getattr(writer, "add_scalar", None)):
            raise EulernetError(f"writer is a {type(writer).__name__} without add_scalar(tag, value, iteration)")
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise EulernetError(f"path={str(path)!r}: there is no folder {Path(path).absolute().parent}")
        model = unwrapped(model)
        patched = is_patched(model)
        if step_sizes and not patched:
            raise EulernetError(
                f"{type(model).__name__} is not patched, so the sizes of its steps cannot be seen. Patch it first, "
                "eulernet.patch(model, h=1) computes the same bits, or leave them out: eulernet.watch(model, "
                "step_sizes=False, layers=...)"
            )
        if layers is None and not patched:
            raise EulernetError(
                f"{type(model).__name__} is not patched: say which layers to watch, eulernet.watch(model, "
                'step_sizes=False, layers="layer1.*"), patterns on names of modules or parameters'
            )
        self.notes: list[str] = []
        self._groups = _groups(model, layers)
        modules = by_module(model) if step_sizes else {}
        self._steps = [(module, [step.name for step in steps]) for module, steps in modules.items()]
        self._every, self._iteration = every, 0
        self._path = None if path is None else Path(path)
        self._writer = writer
        self._inside = False
        self._squares: dict[str, Tensor] = {}  # of a step: [||h F||^2, ||s||^2]
        self._waiting: list[tuple[int, list[tuple[str, str]], Tensor]] = []
        self._records: list[Record] = []

    def __enter__(self) -> Self:
        if any(OBSERVED[0] in vars(module) for module, _ in self._steps):
            raise EulernetError("the model is watched already: leave that block first, or watch(..., step_sizes=False)")
        for module, names in self._steps:
            add_step_hook(module, partial(self._see, module, names))
        self._inside = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside = False
        for module, _ in self._steps:
            remove_step_hooks(module)
        self._fetch()

    @property
    def records(self) -> list[Record]:
        self._fetch()
        return self._records

    @torch.no_grad()
    def step(self) -> None:
        """The end of an iteration: record, where it is one of those to record."""
        if not self._inside:
            raise EulernetError("log.step() is for within the block: with eulernet.watch(model) as log: ...")
        if self._iteration % self._every == 0:
            self._record()
        self._iteration += 1

    def _record(self) -> None:
        labels: list[tuple[str, str]] = []
        values: list[Tensor] = []
        for kind in ("weight", "gradient"):
            tensors = {name: [_of(kind, p) for p in group] for name, group in self._groups.items()}
            present = {name: [t for t in group if t is not None] for name, group in tensors.items()}
            present = {name: group for name, group in present.items() if group}
            if present:
                labels += [(kind, name) for name in present]
                values.append(_norms(list(present.values())))
        if self._squares:
            labels += [("step_size", name) for name in self._squares]
            home = next(iter(self._squares.values())).device
            squares = torch.stack([pair.to(home) for pair in self._squares.values()])
            values.append((squares[:, 0] / squares[:, 1]).sqrt())
            self._squares.clear()
        elif self._steps:
            self._note(
                "no step was seen to run with gradients, so there are no step sizes: of a compiled model only weights "
                "and gradients are recorded"
            )
        if values:
            self._waiting.append((self._iteration, labels, torch.cat([v.to(values[0].device) for v in values])))
        if len(self._waiting) >= _BUFFERED:
            self._fetch()

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _see(self, module: Patched, names: list[str], seen: StepInputs, add: Callable[[], Any]) -> Any:
        if torch.compiler.is_compiling() or self._iteration % self._every or not torch.is_grad_enabled():
            return add()
        if not (isinstance(seen.skip, Tensor) and isinstance(seen.branch, Tensor)):
            self._note(f"the size of {names[seen.slot]} is not recorded: its skip is not seen")
            return add()
        h = module._euler[seen.slot].bound_to(module).value * seen.alpha
        pair = torch.stack([_norm(seen.branch.detach()) * h, _norm(seen.skip.detach())]).square()
        before = self._squares.get(names[seen.slot])
        self._squares[names[seen.slot]] = pair if before is None else before + pair
        return add()

    def _fetch(self) -> None:
        """Bring to the host what waits on the device, and hand it out."""
        waiting, self._waiting = self._waiting, []
        fresh: list[Record] = []
        for iteration, labels, values in waiting:
            record: Record = {"iteration": iteration, "weight": {}, "gradient": {}, "step_size": {}}
            for (kind, name), value in zip(labels, values.tolist(), strict=True):
                record[kind][name] = value
                if self._writer is not None:
                    self._writer.add_scalar(f"{kind}/{name}", value, iteration)
            fresh.append(record)
        self._records += fresh
        if self._path is not None and fresh:
            with self._path.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in fresh)


def _groups(model: nn.Module, layers: str | Iterable[str] | None) -> dict[str, list[nn.Parameter]]:
    """The parameters under each module or parameter that is to be watched."""
    named = {name or ROOT: list(module.parameters()) for name, module in model.named_modules()}
    named |= {name: [parameter] for name, parameter in model.named_parameters()}
    named = {name: parameters for name, parameters in named.items() if parameters}
    if not named:
        raise EulernetError(f"{type(model).__name__} has no parameters to watch")
    chosen: dict[str, None] = {}
    if layers is None:
        for steps in by_module(model).values():
            chosen |= {_nearest(step.module_name or ROOT, named): None for step in steps}
    if layers is not None and not isinstance(layers, Iterable):
        raise EulernetError(
            f"layers={brief(layers)} is no pattern on names, nor several; for example layers='layer1.*'"
        )
    for pattern in [layers] if isinstance(layers, str) else layers or ():
        if not isinstance(pattern, str):
            raise EulernetError(f"layers: {brief(pattern)} is no pattern on names; for example layers='layer1.*'")
        found = [name for name in named if name.count(".") == pattern.count(".") and matches(pattern, name)]
        if not found:
            raise EulernetError(
                f"layers: the pattern {pattern!r} names no module or parameter. There are for example "
                f"{', '.join(list(named)[:8])}"
            )
        chosen |= dict.fromkeys(found)
    if not chosen:
        raise EulernetError("layers names nothing; leave it out to watch the modules that hold a step")
    return {name: named[name] for name in chosen}


def _nearest(name: str, named: dict[str, list[nn.Parameter]]) -> str:
    """The module of this name, or the nearest one around it, that has parameters."""
    while name not in named:
        name = name.rpartition(".")[0] or ROOT
    return name


def _of(kind: str, parameter: nn.Parameter) -> Tensor | None:
    return parameter.detach() if kind == "weight" else parameter.grad


def _norms(groups: list[list[Tensor]]) -> Tensor:
    """The Euclidean norm of all that is in each group: one launch for all tensors, however many."""
    flat = [tensor for group in groups for tensor in group]
    norms = [_local(norm) for norm in torch._foreach_norm(flat, 2, dtype=_wide(*flat))]
    squares = torch.stack([norm.to(norms[0].device) for norm in norms]).square()
    numbers = [i for i, group in enumerate(groups) for _ in group]
    total = squares.new_zeros(len(groups)).index_add(0, torch.tensor(numbers, device=squares.device), squares)
    return total.sqrt()


def _norm(tensor: Tensor) -> Tensor:
    return _local(torch.linalg.vector_norm(tensor, dtype=_wide(tensor)))


def _wide(*tensors: Tensor) -> torch.dtype | None:
    """A dtype in which the squares of half-precision numbers do not overflow; None where there are no such numbers."""
    dtypes = {t.dtype for t in tensors}
    if dtypes.isdisjoint((torch.float16, torch.bfloat16)):
        return None
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _local(tensor: Tensor) -> Tensor:
    """The whole of what FSDP has spread over processes."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()
