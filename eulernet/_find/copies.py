"""A deep copy of a model whose functions and weak references lead to the copy, too."""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from eulernet._commit import surely
from eulernet._errors import EulernetError
from eulernet._find.leftovers import MISSING, changed_since, content_of, held_by, put_back
from eulernet._find.tensors import OF_MODULES, all_modules, version_of
from eulernet._step import ROOT

_TENSORS = frozenset(("_parameters", "_buffers"))  # of a module
_NOT_WRITTEN = (Tensor, nn.Module, str, bytes, int, float, type, FunctionType, MethodType, ModuleType, type(None))
Memo = dict[int, Any]  # the id of what was copied -> its copy


def copied(model: nn.Module, memo: Memo) -> nn.Module:
    """A deep copy; what cannot be copied is shared.

    A function gets variables of its own where it reads some of the function around it. A weak reference to a module of
    the model leads to that module's copy.
    """
    with _own_ways(model, memo):
        try:
            twin = copy.deepcopy(model, memo)
        except Exception:
            memo.clear()
            memo.update(_shared(model))
            twin = copy.deepcopy(model, memo)
    _check_copied(model, twin)
    _without_compiling(twin)
    return twin


@contextlib.contextmanager
def _own_ways(model: nn.Module, memo: Memo) -> Iterator[None]:
    """Let `copy.deepcopy` with this memo copy what it shares else, and what torch does not copy in all versions."""
    own = {id(module) for module in all_modules(model)}

    def reference(held: Any, to: Memo) -> Any:
        target = held()
        return held if id(target) not in own else weakref.ref(_copy_of(target, to))  # which calls nobody back

    def method(held: Any, to: Memo) -> Any:
        bound = held()
        owner = getattr(bound, "__self__", None)
        return held if id(owner) not in own else weakref.WeakMethod(MethodType(bound.__func__, _copy_of(owner, to)))

    ways: dict[type, Callable[[Any, Memo], Any]] = {
        FunctionType: _function,
        weakref.ref: reference,
        weakref.WeakMethod: method,
        # A generator's copy reads a copy of its state, and torch 2.8 crashes where that is a fake tensor.
        torch.Generator: lambda generator, _: generator.clone_state(),
    }
    copiers: dict[type, Any] = copy._deepcopy_dispatch  # type: ignore[attr-defined]
    before = {kind: copiers.get(kind) for kind in ways}

    def as_they_were() -> None:
        for kind, copier in before.items():
            if copier is None:
                copiers.pop(kind, None)
            else:
                copiers[kind] = copier

    def for_this_copy(way: Callable[[Any, Memo], Any], kind: type) -> Callable[[Any, Memo], Any]:
        """Other copies that are made meanwhile, by the model or in another thread, are as ever."""
        usual = before[kind]
        return lambda value, to: way(value, to) if to is memo or usual is None else usual(value, to)

    with surely(as_they_were):
        copiers.update({kind: for_this_copy(way, kind) for kind, way in ways.items()})
        yield


def _copy_of(module: Any, memo: Memo) -> Any:
    """The copy of a module; while one that copies itself is being copied, there is none yet."""
    return memo.get(id(module), module) if hasattr(module, "__deepcopy__") else copy.deepcopy(module, memo)


def _function(function: FunctionType, memo: Memo) -> FunctionType:
    """A function with variables of its own, which it shares with the copies of those that it shared them with."""
    cells = function.__closure__ or ()
    new = [cell for cell in cells if id(cell) not in memo]
    memo.update((id(cell), CellType()) for cell in new)
    variables = tuple(memo[id(cell)] for cell in cells) or None
    twin = FunctionType(function.__code__, function.__globals__, function.__name__, None, variables)
    memo[id(function)] = twin if cells else function  # for one that refers to itself
    for cell in new:
        with contextlib.suppress(ValueError):  # of a variable without a value yet
            memo[id(cell)].cell_contents = _value(cell.cell_contents, memo)
    given, named = function.__defaults__, function.__kwdefaults__
    twin.__defaults__ = given and tuple(_value(each, memo) for each in given)
    twin.__kwdefaults__ = named and {name: _value(each, memo) for name, each in named.items()}
    was = (*(given or ()), *(named or {}).values())
    own = (*(twin.__defaults__ or ()), *(twin.__kwdefaults__ or {}).values())
    if cells or any(a is not b for a, b in zip(was, own, strict=True)):
        memo[id(function)] = functools.update_wrapper(twin, function)
    result: FunctionType = memo[id(function)]
    return result


def _value(value: Any, memo: Memo) -> Any:
    """What a function holds: copies of modules, tensors, functions and references, and of what contains some."""
    kinds = nn.Module, Tensor, FunctionType, MethodType, functools.partial, weakref.ref, weakref.WeakSet
    if any(isinstance(each, kinds) for each in (value, *_items(value))):
        try:
            return copy.deepcopy(value, memo)
        except Exception:
            return value
    return value


def _items(value: Any) -> list[Any]:
    return list(value.values() if isinstance(value, dict) else value) if isinstance(value, (list, tuple, dict)) else []


@contextlib.contextmanager
def as_before(
    originals: Mapping[nn.Module, nn.Module], variables: Sequence[CellType], *, values: bool
) -> Iterator[None]:
    """Afterwards a copy holds what it held: what a model keeps from one call to the next changes no other run.

    Args:
        originals: the modules of the copy, with the model's.
        variables: those of its functions.
        values: whether its tensors have some, which the model has still.
    """
    held: dict[int, tuple[Any, dict[Any, Any]]] = {}
    pending: list[tuple[Any, int]] = [(module, 2) for module in originals]
    while pending:
        owner, depth = pending.pop()
        if id(owner) in held or (now := held_by(owner)) is None:
            continue
        held[id(owner)] = owner, now
        own = isinstance(owner, nn.Module)
        inner = [value for name, value in now.items() if not own or name not in OF_MODULES or name in _TENSORS]
        pending += [(value, depth - 1) for value in inner if depth and not isinstance(value, _NOT_WRITTEN)]
    contents = [(cell, content_of(cell)) for cell in variables]
    versions = [(a, version_of(a), b) for twin, own in originals.items() for a, b in _pairs_of(twin, own)]
    known = [(t, t.item_memo) for t, *_ in versions if isinstance(t, FakeTensor) and t.item_memo is not None]
    try:
        yield
    finally:
        for owner, before in held.values():
            if changed := changed_since(before, held_by(owner) or {}):
                put_back(owner, changed)
        for cell, content in contents:
            if content is MISSING:
                del cell.cell_contents
            else:
                cell.cell_contents = content
        with torch.no_grad():
            for tensor, version, of_model in versions if values else ():
                if version_of(tensor) != version:
                    tensor.copy_(of_model)
        for fake, number in known:  # of a tensor that was written into it is forgotten
            fake.item_memo = number


def _pairs_of(twin: nn.Module, own: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """The parameters and buffers of a module of the copy, each with the model's."""
    named = {**own._parameters, **own._buffers} if not isinstance(own, torch.jit.ScriptModule) else {}
    for name, tensor in (*twin._parameters.items(), *twin._buffers.items()) if named else ():
        if tensor is not None and (of_model := named.get(name)) is not None and of_model.shape == tensor.shape:
            yield tensor, of_model


def _check_copied(model: nn.Module, twin: nn.Module) -> None:
    """A copy that holds a module of the model's would run it."""
    own = {id(module) for module in all_modules(model)}
    for name, module in twin.named_modules():
        if id(module) in own:
            raise EulernetError(
                f"{name or ROOT} ({type(module).__name__}) gives itself back where it is copied, by its __deepcopy__, "
                "and it is a copy that eulernet runs. Make that return a new module"
            )


def _without_compiling(twin: nn.Module) -> None:
    """Modules that `torch.compile` has wrapped stand there themselves."""
    for module in list(twin.modules()):
        for name, part in module._modules.items():
            if type(part).__name__ == "OptimizedModule":
                module._modules[name] = part._orig_mod  # type: ignore[union-attr, assignment]


def _shared(model: nn.Module) -> dict[int, Any]:
    """What of the modules' attributes cannot be copied, by its id: a lock, a generator, a trainer, a result."""
    shared: dict[int, Any] = {}
    pending = [value for module in all_modules(model) for value in vars(module).values()]
    seen = {id(module) for module in all_modules(model)}
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (list, tuple, dict)):
            pending.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, Tensor):
            if not value.is_leaf:
                shared[id(value)] = value.detach()
        else:
            try:
                copy.deepcopy(value, dict(shared))
            except Exception:
                shared[id(value)] = value
    return shared
