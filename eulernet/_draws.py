"""Random numbers from generators of one's own: those of the process, from which other threads draw, are left alone."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode

from eulernet._commit import surely

_CPU = torch.device("cpu")
_LIKE: dict[str, Callable[..., Tensor]] = {  # which take no generator in torch 2.8
    "aten::rand_like": Tensor.uniform_,
    "aten::randn_like": Tensor.normal_,
    "aten::randint_like": lambda like, *bounds, generator: like.random_(*(0, *bounds)[-2:], generator=generator),
}


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws of torch come from generators of this mode's own: the numbers that follow on `torch.manual_seed(seed)`."""

    supports_higher_order_operators = True

    def __init__(self, seed: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generators: dict[torch.device, torch.Generator] = {}
        self.seed(seed)

    def seed(self, seed: int) -> torch.Generator:
        """Begin anew, as `torch.manual_seed` does."""
        self.first = int(seed)
        for generator in self.generators.values():
            generator.manual_seed(self.first)
        return self.generator(_CPU)

    def generator(self, device: torch.device) -> torch.Generator:
        """The own generator of a device."""
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.first)
        return self.generators[device]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
            device = next((t.device for t in tensors), None) or torch.device(kwargs.get("device") or "cpu")
            if device.type != "meta" and kwargs.get("generator") is None and _draws(func, args, kwargs):
                return self._draw(func, args, kwargs, self.generator(device))
        return func(*args, **kwargs)

    def _draw(self, func: Any, args: Any, kwargs: Any, own: torch.Generator) -> Any:
        taking, name = _with_generator(func), func._schema.name
        if taking is not None:
            return taking(*args, **{**kwargs, "generator": own})
        if name in _LIKE and "out" not in kwargs:
            return _LIKE[name](torch.empty_like(args[0], **kwargs), *args[1:], generator=own)
        if name == "aten::native_dropout" and "out0" not in kwargs:
            branch, probability, *_ = args
            kept = torch.empty_like(branch, dtype=torch.bool).bernoulli_(1 - probability, generator=own)
            return branch * kept * (0.0 if probability == 1 else 1 / (1 - probability)), kept
        default = _default_generator(own.device)  # such as attention with dropout on a GPU, which takes no other one
        before = default.get_state()
        try:
            default.set_state(own.get_state())
            return func(*args, **kwargs)
        finally:
            own.set_state(default.get_state())
            default.set_state(before)


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation that may draw does: attention with a dropout of zero does not, nor a dropout that is off."""
    given = {argument.name: argument.default_value for argument in func._schema.arguments}
    given |= dict(zip(given, args, strict=False)) | kwargs
    drops = [given[name] for name in ("dropout_p", "dropout") if name in given]
    return given.get("train") is not False and (not drops or drops[0] != 0)


@cache
def _with_generator(func: Any) -> Any:
    """The same operation with a generator among its arguments; None where torch has none."""

    def arguments(overload: Any) -> dict[str, str]:
        return {argument.name: str(argument.type) for argument in overload._schema.arguments}

    packet, wanted = func.overloadpacket, arguments(func)
    for overload in (func, *(getattr(packet, name) for name in packet.overloads())):
        taken = arguments(overload)
        if taken.pop("generator", None) is not None and taken == {n: t for n, t in wanted.items() if n != "generator"}:
            return overload
    return None


@contextlib.contextmanager
def entered(draws: Draws) -> Iterator[None]:
    """Enter the mode; in the end it is left, and torch knows of no mode that it did not know of, whenever an interrupt
    comes."""
    depth, flags = len(_get_current_dispatch_mode_stack()), _flags()

    def undo() -> None:
        while len(_get_current_dispatch_mode_stack()) > depth:
            _pop_mode()
        for name in _flags() - flags:
            setattr(_python_dispatch, name, False)

    with surely(undo), draws:
        yield


def _flags() -> set[str]:
    """What torch keeps of the process beside the modes themselves: dynamo compiles nothing where a mode seems on."""
    return {name for name, value in vars(_python_dispatch).items() if name.startswith("_is_in_") and value is True}


def _default_generator(device: torch.device) -> Any:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


@contextlib.contextmanager
def own_numbers(draws: Draws) -> Iterator[None]:
    """What Python, NumPy and torch are asked for in this thread concerns generators of its own.

    That is draws of Python and NumPy, which begin alike, and the seed and the state of torch's, which are those of
    `draws` (which the caller enters, or does not). Other threads keep theirs.
    """
    thread = threading.current_thread()
    cpu, state = draws.generator(_CPU), torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    answers: list[tuple[Any, str, Callable[..., Any]]] = []
    for module in (torch, torch.random):
        answers += [(module, "manual_seed", draws.seed), (module, "seed", cpu.seed)]
        answers += [(module, "get_rng_state", cpu.get_state), (module, "set_rng_state", cpu.set_state)]
    if state:
        answers.append((torch.cuda, "get_rng_state", lambda device="cuda": draws.generator(_gpu(device)).get_state()))
        answers.append(
            (torch.cuda, "set_rng_state", lambda new, device="cuda": draws.generator(_gpu(device)).set_state(new))
        )
    numpy = sys.modules.get("numpy.random")
    instances: list[tuple[Any, Any, Any]] = [(random, random._inst, random.Random(0))]
    if numpy is not None:
        instances.append((numpy, numpy.mtrand._rand, numpy.RandomState(0)))
    for module, instance, own in instances:
        for name, function in vars(module).items():
            if getattr(function, "__self__", None) is instance or name == "seed":
                answers.append((module, name, getattr(own, name)))
    replaced = [(module, name, getattr(module, name)) for module, name, _ in answers]

    def here() -> bool:  # in a thread of autograd's, to which the modes of this one go along, as well
        return threading.current_thread() is thread or draws in _get_current_dispatch_mode_stack()

    def undo() -> None:
        for module, name, function in replaced:
            setattr(module, name, function)

    with surely(undo):
        for (module, name, own), (_, _, function) in zip(answers, replaced, strict=True):
            setattr(module, name, _answered(function, own, here))
        yield


def _gpu(device: Any) -> torch.device:
    given = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cuda", torch.cuda.current_device() if given.index is None else given.index)


def _answered(function: Any, own: Callable[..., Any], here: Callable[[], bool]) -> Callable[..., Any]:
    @wraps(function)
    def answer(*args: Any, **kwargs: Any) -> Any:
        return (own if here() else function)(*args, **kwargs)

    return answer
