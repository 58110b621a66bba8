"""What the runs of a copy leave in the process, in caches outside of the model, is taken back."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GeneratorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from eulernet._errors import EulernetError
from eulernet._find.tensors import OF_MODULES, all_modules

_CACHE = functools._lru_cache_wrapper
_HERE = str(Path(__file__).parent)
_OF_TORCH = torch.__path__[0]
_DEPTH, _MANY = 2, 256  # how far what a frame names is followed, and from how many items on no further
_VALUES = (Tensor, str, bytes, int, float, complex, ModuleType, CodeType, BuiltinFunctionType, type(None))
_NUMBERS = (bool, int, float, str, type(None))
_NAMED = (ModuleType, type, FunctionType, BuiltinFunctionType)  # what a namespace may get while a model runs
MISSING: Any = object()
_CONTAINERS = frozenset(("types", "collections", "queue"))  # of Python, whose objects hold what is put into them


class Leftovers:
    """What the runs of a search leave: fake tensors, and what held something else before.

    Before the first run, and the first time that a function runs, what its code names is kept in mind: its variables,
    the globals, and what these hold. Where a fake tensor was left in one of them, all of them get back what they held:
    a cache that has forgotten its table must not remember the length of it. So they do where a run had values. Flags
    and counters always do.
    """

    def __init__(self) -> None:
        self.fakes: list[weakref.ref[Tensor]] = []
        self.had_values = False  # whether a run's tensors were no fake ones
        self.copies: set[int] = set()  # ids of the modules that run, which are not outside
        self._codes: dict[int, CodeType] = {}  # of which a frame was looked at
        self._foreseen: dict[int, FunctionType] = {}  # functions that are looked at before they run
        self._pending: list[FunctionType] = []  # of these, those that are still to be looked at
        self._held: dict[int, tuple[Any, dict[Any, Any], bool]] = {}  # by the owner's id; whether a name leads to it
        self._variables: dict[tuple[int, str], Any] = {}  # of closures, by the id of the code that reads them

    def foresee(self, modules: Iterable[nn.Module]) -> None:
        """Keep in mind these modules, which no run is to change, and what their functions may write into."""
        classes: dict[type, None] = {}
        for module in modules:
            self._remember(module, 0)
            for name, value in vars(module).items():
                if name in ("_parameters", "_buffers") or name not in OF_MODULES:
                    self._remember(value, 0)
                    self._foresee(value)
            classes.update(dict.fromkeys(type(module).__mro__))
        for cls in classes:
            for value in vars(cls).values():
                self._foresee(value)
        self._look_ahead()

    def _foresee(self, value: Any) -> None:
        """Look at a function, or at those in a container, before they run."""
        several = isinstance(value, dict | list) and len(value) < _MANY
        for one in (value, *((held_by(value) or {}).values() if several else ())):
            function = _function(one)
            if function is not None and id(function) not in self._foreseen and not _is_known(function.__module__):
                self._foreseen[id(function)] = function
                self._pending.append(function)

    def _look_ahead(self) -> None:
        while self._pending:
            function = self._pending.pop()
            cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
            self._keep(function.__code__, {name: content_of(cell) for name, cell in cells}, function.__globals__)

    def look(self, frame: Any) -> None:
        """Keep in mind what the functions may write into that have called this."""
        while frame is not None and not frame.f_code.co_filename.startswith(_HERE):
            code = frame.f_code
            if id(code) not in self._codes:
                self._codes[id(code)] = code
                if not code.co_filename.startswith(_OF_TORCH):
                    self._keep(code, frame.f_locals, frame.f_globals)
                    for value in frame.f_locals.values():
                        self._remember(value, _DEPTH, named=False)
            frame = frame.f_back
        self._look_ahead()

    def _keep(self, code: CodeType, variables: Mapping[str, Any], namespace: dict[str, Any]) -> None:
        named = [namespace.get(name) for name in code.co_names]
        for name in code.co_freevars:
            value = variables.get(name, MISSING)
            if not (isinstance(value, nn.Module) or _leads_to_fakes(value)):  # what this run has made itself
                self._variables.setdefault((id(code), name), value)
                named.append(value)
        self._remember(namespace, 0)
        for module in [m for m in named if isinstance(m, ModuleType) and not _is_known(m.__name__)]:
            self._remember(vars(module), 0)
            named += [vars(module).get(name) for name in code.co_names]
        for value in named:
            self._remember(value, _DEPTH)
            self._foresee(value)

    def _remember(self, owner: Any, depth: int, named: bool = True) -> None:
        if isinstance(owner, _VALUES) or id(owner) in self._held or (held := held_by(owner)) is None:
            return
        if id(owner) in self.copies:
            held = {name: value for name, value in held.items() if name not in OF_MODULES}
        else:
            self._held[id(owner)] = owner, held, named
        if not isinstance(owner, type | dict | list | FunctionType | _CACHE):
            self._remember(type(owner), 0, named)
        if depth and len(held) < _MANY:
            for value in list(held.values()):
                self._remember(value, depth - 1, named)

    def put_back(self) -> None:
        """Let what the functions name hold what it held before: all of it, or its flags and counters."""
        changed: list[tuple[Any, dict[Any, Any], dict[Any, Any], bool, bool]] = []
        for owner, held, named in self._held.values():
            now = held_by(owner) or {}
            if before := changed_since(held, now):
                has_fakes = any(_leads_to_fakes(now.get(key)) for key in before)
                changed.append((owner, before, now, named, has_fakes))
        left = any(named and has_fakes for *_, named, has_fakes in changed)
        for owner, before, now, named, has_fakes in changed:
            cached = isinstance(owner, _CACHE)  # whose results with values are as good as any
            if has_fakes or (named and (left or (self.had_values and not cached))):
                put_back(owner, before)
            elif named and not cached and not isinstance(owner, list | deque | set):  # which keep what was seen
                put_back(owner, {key: v for key, v in before.items() if _is_flag(v, now.get(key, MISSING))})

    def take_back(self) -> None:
        """All of it, in the end."""
        self.put_back()
        self._held.clear()
        _forget(self.fakes, self._variables)


def _is_flag(*values: Any) -> bool:
    return all(value is MISSING or isinstance(value, _NUMBERS) for value in values)


def _is_known(module: str | None) -> bool:
    """Whether a module is one of Python's or torch's, whose functions are none of the model's."""
    root = (module or "").partition(".")[0]
    return root == "torch" or (root in sys.stdlib_module_names and root != "__main__")


def _function(value: Any) -> FunctionType | None:
    """The function behind a method, a property, a partial or a cache."""
    while True:
        match value:
            case FunctionType():
                return value
            case partial():
                value = value.func
            case property():
                value = value.fget
            case MethodType() | staticmethod() | classmethod():
                value = value.__func__
            case _ if isinstance(value, _CACHE):
                value = value.__wrapped__
            case _:
                return None


def content_of(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a variable without a value yet
        return MISSING


def held_by(owner: Any) -> dict[Any, Any] | None:
    """What an object holds: its items, or its attributes; None for what holds nothing that a model would write."""
    if isinstance(owner, dict):
        return dict(dict.items(owner))  # one that makes its values as they are asked for is not asked
    if isinstance(owner, list | deque):
        return dict(enumerate(list.__iter__(owner) if isinstance(owner, list) else owner))
    if isinstance(owner, set):
        return {id(value): value for value in owner}
    if isinstance(owner, _CACHE):
        return {id(result): result for result in _results(owner)}
    cls = type(owner)
    home = (owner if isinstance(owner, type) else cls).__module__
    if _is_known(home) and not (home in _CONTAINERS and hasattr(owner, "__dict__")):
        return _attributes(owner) if isinstance(owner, FunctionType | nn.Module) else None
    if isinstance(owner, type):
        return dict(vars(owner))
    try:
        held = _attributes(owner)
    except (AttributeError, TypeError):
        held = {}
    for base in cls.__mro__:
        if "__slots__" in vars(base):
            for name, slot in vars(base).items():
                if isinstance(slot, MemberDescriptorType):
                    with contextlib.suppress(AttributeError):
                        held[name] = slot.__get__(owner)
    return held


def changed_since(held: dict[Any, Any], now: dict[Any, Any]) -> dict[Any, Any]:
    """What an object held under the keys under which it holds something else now."""
    if len(held) == len(now) and all(now.get(key, MISSING) is value for key, value in held.items()):
        return {}
    return {k: held.get(k, MISSING) for k in {**held, **now} if now.get(k, MISSING) is not held.get(k, MISSING)}


def _attributes(owner: Any) -> dict[Any, Any]:
    held = dict(object.__getattribute__(owner, "__dict__"))
    held.pop("_call_impl", None)  # which leads a module's callers to its copy while the runs last
    return held


def _results(cached: Any) -> Iterator[Any]:
    """What a cached function keeps."""
    for held in gc.get_referents(cached):
        if type(held) is not dict:
            yield held
        elif held is not vars(cached):
            yield from held.values()


def put_back(owner: Any, held: dict[Any, Any]) -> None:
    """Let an object hold again what it did, nothing under a key that is missing."""
    if isinstance(owner, _CACHE):
        owner.cache_clear()
        return
    if isinstance(owner, list | deque):
        items = {**dict(enumerate(owner)), **held}
        kept = [items[key] for key in sorted(items) if items[key] is not MISSING]
        if isinstance(owner, deque):
            owner.clear()
            owner.extend(kept)
        else:
            list.__setitem__(owner, slice(None), kept)
        return
    if isinstance(owner, set):
        items = {**{id(value): value for value in owner}, **held}
        owner.clear()
        owner.update(value for value in items.values() if value is not MISSING)
        return
    now = held_by(owner) or {}
    for key, value in held.items():
        if isinstance(now.get(key), _NAMED):
            continue  # what was imported meanwhile
        if isinstance(owner, dict):
            kind: type[dict[Any, Any]] = OrderedDict if isinstance(owner, OrderedDict) else dict
            if value is MISSING:
                kind.pop(owner, key, None)
            else:
                kind.__setitem__(owner, key, value)
        elif value is MISSING:
            (type.__delattr__ if isinstance(owner, type) else object.__delattr__)(owner, key)
        else:
            (type.__setattr__ if isinstance(owner, type) else object.__setattr__)(owner, key, value)


def _leads_to_fakes(value: Any) -> bool:
    """Whether a fake tensor is in what was kept."""
    pending, seen = [value], set[int]()
    while pending and len(seen) < _MANY:
        one = pending.pop()
        if isinstance(one, FakeTensor):
            return True
        if id(one) not in seen and not isinstance(one, _VALUES + _NAMED):
            seen.add(id(one))
            pending += one if isinstance(one, tuple | set) else (held_by(one) or {}).values()
    return False


@contextlib.contextmanager
def nothing_left(model: nn.Module) -> Iterator[Leftovers]:
    """Afterwards no cache of the process holds a fake tensor of these runs, or a copy of the model."""
    classes = {cls for module in all_modules(model) for cls in type(module).__mro__ if cls.__module__ != "builtins"}
    methods = [value for cls in classes for value in vars(cls).values() if isinstance(value, _CACHE)]
    sizes = [(method, method.cache_info().currsize) for method in methods]
    left = Leftovers()
    try:
        yield left
    finally:
        for method, size in sizes:
            if method.cache_info().currsize > size:  # what it was called on, the copied model, is a key
                method.cache_clear()
        left.take_back()


def _forget(fakes: list[weakref.ref[Tensor]], variables: dict[tuple[int, str], Any]) -> None:
    """Empty the caches (`functools.lru_cache`, dictionaries, lists, closures) that have kept one of these tensors."""
    if any(fake() is not None for fake in fakes):
        gc.collect()
    kept: list[Any] = [tensor for fake in fakes if (tensor := fake()) is not None]
    if not kept:
        return
    with _unfrozen():
        _empty_holders(kept, variables)


@contextlib.contextmanager
def _unfrozen() -> Iterator[None]:
    """What was frozen (`gc.freeze`) is found among the referrers as well."""
    frozen = gc.get_freeze_count() > 0
    if frozen:
        gc.unfreeze()
    try:
        yield
    finally:
        if frozen:
            gc.freeze()


def _empty_holders(kept: list[Any], variables: dict[tuple[int, str], Any]) -> None:
    own = {id(kept)}
    for _ in range(4):  # a cache holds the tensor itself, or a tuple or list of a few
        if not kept:
            return
        holders = gc.get_referrers(*kept)
        spaces = _namespaces([holder for holder in holders if type(holder) is dict])
        inside = {id(k) for k in kept}
        kept = []
        own |= {id(holders), id(kept)}
        for holder in holders:
            if id(holder) in own:
                continue
            if isinstance(holder, _CACHE):
                holder.cache_clear()
            elif isinstance(holder, GeneratorType):
                raise EulernetError(
                    f"the generator {holder.__qualname__}, which the model reads, was moved on as a copy of the model "
                    "ran, and a generator cannot be copied or put back. Make it anew, and let the model hold what it "
                    "gives: self.table = next(generator) in __init__"
                )
            elif isinstance(holder, CellType):
                _empty(holder, variables)
            elif type(holder) is dict and id(holder) not in spaces:
                if _is_result(holder):
                    kept.append(holder)
                    continue
                for key in [key for key, value in holder.items() if id(value) in inside]:
                    del holder[key]
            elif isinstance(holder, deque | set):
                left = [item for item in holder if id(item) not in inside]
                holder.clear()
                (holder.extend if isinstance(holder, deque) else holder.update)(left)
            elif type(holder) is list and not any(_is_cache(h) for h in gc.get_referrers(holder)):
                holder[:] = [item for item in holder if id(item) not in inside]
            elif type(holder) in (tuple, list):
                kept.append(holder)


def _empty(cell: CellType, variables: dict[tuple[int, str], Any]) -> None:
    """Let a closure's variables have the values again that they had when its function was first seen to run."""
    closures = [holder for holder in gc.get_referrers(cell) if type(holder) is tuple]
    for function in gc.get_referrers(*closures) if closures else ():
        if not isinstance(function, FunctionType) or not any(function.__closure__ is closure for closure in closures):
            continue
        for name, one in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            value = variables.get((id(function.__code__), name), one)
            if value is MISSING:
                del one.cell_contents
            elif value is not one:
                one.cell_contents = value


def _namespaces(dicts: list[dict[Any, Any]]) -> set[int]:
    """The ids of what the classes and modules refer to whose `__dict__` is among these."""
    owners = [owner for owner in gc.get_referrers(*dicts) if isinstance(owner, (type, ModuleType))] if dicts else []
    return {id(value) for value in gc.get_referents(*owners)}


def _is_result(value: Any) -> bool:
    """Whether it is what a cached function has returned."""
    holders = gc.get_referrers(value)
    entries = gc.get_referrers(*[h for h in holders if type(h) is dict])
    return any(isinstance(holder, _CACHE) for holder in (*holders, *entries))


def _is_cache(holder: Any) -> bool:
    return isinstance(holder, (_CACHE, tuple)) or (
        type(holder) is dict and not any(isinstance(k, str) for k in holder) and id(holder) not in _namespaces([holder])
    )
