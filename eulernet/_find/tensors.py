"""What the trace asks of a tensor, of the arguments of an operation, and of a model: the modules that it holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, Tensor):
                yield item
            elif isinstance(item, (tuple, list, dict)):  # whose length may be an error: e3nn's Irreps
                yield from tensors_in(item)


def returned(value: Any) -> list[Tensor]:
    """The tensors that a model returns: where containers hold none, those that attributes of objects hold."""
    found = list(tensors_in(value))
    seen: set[int] = set()
    pending = [] if found else [value]
    while pending:
        one = pending.pop()
        if isinstance(one, Tensor):
            found.append(one)
        elif id(one) not in seen and not isinstance(one, (type, nn.Module)):
            seen.add(id(one))
            names = [name for cls in type(one).__mro__ for name in getattr(cls, "__slots__", ())]
            pending += [*vars(one).values()] if hasattr(one, "__dict__") else []
            pending += [getattr(one, name) for name in names if isinstance(name, str) and hasattr(one, name)]
            pending += one.values() if isinstance(one, dict) else one if isinstance(one, (tuple, list, set)) else []
    return found


def layers_of(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor, and those that it wraps where a transform of `torch.func` runs, such as vmap."""
    yield tensor
    while is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
        yield tensor


def is_wrapped(tensor: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_made(tensor: Tensor) -> bool:
    """Whether a tensor was computed in this run: it is fake, or autograd knows what made it."""
    return isinstance(tensor, FakeTensor) or tensor.grad_fn is not None


def plain(value: Any) -> Any:
    """Arguments without their tensors, to compare two calls."""
    if isinstance(value, Tensor):
        return f"<{id(value)}>" if not is_float(value) else "<tensor>"
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def version_of(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # an inference tensor: nothing counts its writes
        return 0


def storage_of(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # a tensor without storage has no views either
        return -id(tensor)


def deepcopied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """`copy.deepcopy` of a tensor. Torch would copy a fake one's mode too, and free storages that this counts twice."""
    if not isinstance(tensor, FakeTensor) or not tensor.is_leaf:  # of another torch raises
        return Tensor.__deepcopy__(tensor, memo)  # type: ignore[no-any-return, no-untyped-call]
    if id(tensor) not in memo:
        new = tensor.detach().clone()
        own = nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new
        memo[id(tensor)] = own.requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]  # type: ignore[no-any-return]


OF_MODULES = frozenset(vars(nn.Module()))  # the attributes that each module has


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """The attributes that a module was given beside its parameters, buffers and modules."""
    return {name: value for name, value in vars(module).items() if name not in OF_MODULES}


def all_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The registered modules, and those that a module keeps unregistered in a list, tuple, dict or attribute."""
    seen: set[int] = set()
    pending: list[Any] = [model]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            yield value
            pending += value.children() if isinstance(value, torch.jit.ScriptModule) else ()
            value = vars(value)
        items = value.values() if isinstance(value, dict) else value
        pending += [v for v in items if (type(v) in (list, tuple, dict, OrderedDict) and v) or isinstance(v, nn.Module)]


def own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers that a module itself holds."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


# ---- operations

ADDING: dict[str, tuple[str, int, tuple[Any, ...]]] = {  # where so asked
    "index_put": ("accumulate", 3, (True,)),
    "put": ("accumulate", 3, (True,)),
    "scatter": ("reduce", 4, ("add",)),
    "scatter_reduce": ("reduce", 4, ("sum", "add")),
}


def name_of(func: Any) -> str:
    """`add` for `torch.add`, `Tensor.add_`, `x + y`, `x += y` and `aten.add.Tensor`; the attribute for `x.T`."""
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "get")
    if isinstance(func, torch._ops.OpOverload):
        name = func._schema.name.removeprefix("aten::")
        if name == "detach":  # not by the model, but within a scripted function that autograd has specialised
            return "alias"
    elif isinstance(func, torch._ops.OpOverloadPacket):
        name = func._qualified_op_name.removeprefix("aten::")
    return name.strip("_")


def adds(op: str, args: Any, kwargs: Any) -> bool:
    """Whether an operation that may write over parts of a tensor adds to them."""
    name, place, adding = ADDING.get(op, ("", 0, ()))
    return not name or kwargs.get(name, args[place] if len(args) > place else None) in adding
