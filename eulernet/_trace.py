"""Run a model once and record which tensor came from which.

The record is a graph: one node a torch function call, with the nodes of the tensors it read. Additions are kept with
the Python frames that made them, module calls with the span of nodes they made. What any of it means is decided in
`_steps.py`; nothing here knows what a residual step is.

The model that runs is a copy whose tensors are fake (shapes and dtypes without values), so that neither the model nor
its caches nor the random number generators change, and a model of any size is traced in a moment.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import inspect
import logging
import random
import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# These read a tensor for its shape, dtype or device only: the values of their result do not come from it.
_SHAPE_ONLY = frozenset(
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty new_full "
    "new_tensor new_empty_strided empty_strided detach".split()
)
# The second tensor of these gives a shape, dtype or device only.
_SHAPE_FROM_SECOND = frozenset("to type_as expand_as view_as reshape_as".split())
# The same slice of the same tensor, written twice, is one node.
SLICES = frozenset("getitem narrow select slice chunk split unbind".split())
# An addition, and what else can add a branch to a skip in one call.
ADDITIONS = frozenset("add sub subtract radd iadd isub".split())
FUSED_ADDITIONS = frozenset("addcmul addcdiv index_add scatter_add lerp addmm baddbmm addbmm addmv".split())


@dataclass(slots=True)
class Frame:
    """A Python frame at the moment of an addition: its code, its instruction, and the module that is its first
    argument, if it is one."""

    code: CodeType
    lasti: int
    module: nn.Module | None


class Ref(int):
    """A tensor among the arguments of an operation: the node that made it."""


@dataclass(slots=True)
class Node:
    """One operation: its name, the nodes of floating tensors that it read, the shape of its result, and its call.

    It is constant where no input of the model, such as the ids of tokens, had a part in it.
    """

    op: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    constant: bool
    args: Any = ()  # with a `Ref` for each tensor whose values are read
    kwargs: Any = field(default_factory=dict)
    output: int = 0  # which of the results it is; -1 where it is a tensor that the operation wrote into besides


@dataclass(slots=True)
class Addition:
    """`result = left + right`, two floating tensors of one shape, or an operation that fuses such a sum with others."""

    op: str
    result: int
    left: int
    right: tuple[int, ...]
    call: int
    frames: list[Frame]
    in_place: bool
    function: str | None = None  # the torch.autograd.Function that it is made in


@dataclass(slots=True)
class Call:
    """One call of a module: the nodes made within it are those from `start` up to `end`."""

    module: nn.Module
    parent: int
    start: int
    end: int = sys.maxsize


@dataclass
class Record:
    """What one run of a model did."""

    nodes: list[Node] = field(default_factory=list)
    additions: list[Addition] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    used: dict[int, int] = field(default_factory=dict)  # ids of the parameters and buffers that were read -> nodes
    outputs: list[int] = field(default_factory=list)  # what the model returned


_Called: TypeAlias = tuple[Any, Any, int]  # the last three entries of a node


class _Recorder(TorchFunctionMode):
    """Writes the record: names come from the torch functions that Python calls, the rest from what they dispatch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.record = Record()
        self.stack: list[int] = []
        self.inside = False
        self._of: dict[int, int] = {}  # id of a tensor -> its node
        self.alive: list[Tensor] = []  # keeps those ids from being used again
        self._writes: dict[int, int] = {}  # storage -> the node that last wrote into it
        self._views: dict[Any, int] = {}  # the same view of the same node is one node
        self.functions = _forwards()
        self.parameters = {id(t) for module in all_modules(model) for t in _own(module)}

    # ---- nodes
    def new(
        self, op: str, inputs: tuple[int, ...], shape: tuple[int, ...], constant: bool, called: _Called = ((), {}, 0)
    ) -> int:
        self.record.nodes.append(Node(op, inputs, shape, constant, *called))
        return len(self.record.nodes) - 1

    def set(self, tensor: Tensor, node: int) -> None:
        if id(tensor) not in self._of:
            self.alive.append(tensor)
        self._of[id(tensor)] = node

    def node(self, tensor: Tensor) -> int:
        """The node that made the value that `tensor` has now, writes through views of it included."""
        node = self._of.get(id(tensor))
        if node is None:
            is_parameter = id(tensor) in self.parameters
            node = self.new("parameter" if is_parameter else "input", (), tuple(tensor.shape), is_parameter)
            if is_parameter:
                self.record.used[id(tensor)] = node
            self.set(tensor, node)
        write = self._writes.get(_storage(tensor), -1)
        if write > node:
            constant = self.record.nodes[node].constant and self.record.nodes[write].constant
            called: _Called = ((Ref(node), Ref(write)), {}, 0)
            node = self.new("overwritten", (node, write), tuple(tensor.shape), constant, called)
            self.set(tensor, node)
        return node

    # ---- operations
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.observe(func, args, kwargs or {}, sys._getframe(1))

    def observe(self, func: Any, args: Any, kwargs: Any, frame: Any) -> Any:
        if self.inside:  # dispatched by a torch function that is being recorded
            return func(*args, **kwargs)
        self.inside = True
        try:
            return self.write(func, args, kwargs, frame)
        finally:
            self.inside = False

    def write(self, func: Any, args: Any, kwargs: Any, frame: Any) -> Any:
        name = _name(func)
        tensors = list(_tensors((args, kwargs)))
        if not tensors and name in ("size", "dim", "get"):
            return func(*args, **kwargs)
        before = [(t, self.node(t), _version(t)) for t in tensors]
        out = func(*args, **kwargs)
        results = list(_tensors(out))
        if not results and not any(_version(t) != v for t, _, v in before):
            return out

        nodes = {id(t): n for t, n, _ in before}
        if name in _SHAPE_ONLY:
            inputs: tuple[int, ...] = ()
            read = nodes if name == "detach" else {}
        elif name in _SHAPE_FROM_SECOND:
            inputs = tuple(n for _, n, _ in before[:1])
            read = {id(t): n for t, n, _ in before[:1]}
        else:
            inputs = tuple(dict.fromkeys(n for t, n, _ in before if _is_float(t)))
            read = nodes
        called = _referring(args, read), _referring(kwargs, read)

        constant = name in _SHAPE_ONLY or all(self.record.nodes[n].constant for _, n, _ in before)

        written = [t for t, _, v in before if _version(t) != v]
        seen = set(nodes)
        for i, result in enumerate(results):
            if id(result) not in seen:
                seen.add(id(result))
                self.set(result, self.result(name, inputs, constant, (args, kwargs, i), result, (*called, i)))
        for target in written:
            output = next((i for i, result in enumerate(results) if result is target), -1)
            node = self.new(name, inputs, tuple(target.shape), constant, (*called, output))
            self.set(target, node)
            self._writes[_storage(target)] = node
        if results and (name in ADDITIONS or name in FUSED_ADDITIONS):
            self.addition(name, args, kwargs, nodes, results[0], bool(written), frame)
        return out

    def result(
        self, name: str, inputs: tuple[int, ...], constant: bool, arguments: Any, result: Tensor, called: _Called
    ) -> int:
        shape = tuple(result.shape)
        if not _is_float(result):  # what went through integers is no longer a function to be trained
            return self.new(name, (), shape, constant, called)
        if len(inputs) == 1 and name in SLICES:
            key = (name, inputs, repr(_plain(arguments)), shape)
            if key not in self._views:
                self._views[key] = self.new(name, inputs, shape, constant, called)
            return self._views[key]
        return self.new(name, inputs, shape, constant, called)

    def addition(
        self, op: str, args: Any, kwargs: Any, nodes: dict[int, int], result: Tensor, in_place: bool, frame: Any
    ) -> None:
        left = args[0] if args else kwargs.get("input")
        if op in ADDITIONS:
            right = [args[1] if len(args) > 1 else kwargs.get("other")]
        else:
            right = [t for t in _tensors((args[1:], kwargs)) if _is_float(t)]
        if not isinstance(left, Tensor) or not right or not all(isinstance(t, Tensor) for t in right):
            return
        if not _is_float(result) or left.shape != result.shape:
            return
        if op in ADDITIONS and (right[0].shape != result.shape or not _is_float(right[0])):
            return
        self.record.additions.append(
            Addition(
                op=op,
                result=self._of[id(result)],
                left=nodes[id(left)],
                right=tuple(nodes[id(t)] for t in right),
                call=self.stack[-1] if self.stack else 0,
                frames=list(_frames(frame)),
                in_place=in_place,
                function=next((self.functions[c] for c in _codes(frame) if c in self.functions), None),
            )
        )

    # ---- module calls
    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        for tensor in _tensors((args, kwargs)):
            self.node(tensor)  # what comes from the caller is older than the call
        self.record.calls.append(Call(module, self.stack[-1] if self.stack else -1, len(self.record.nodes)))
        self.stack.append(len(self.record.calls) - 1)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        while self.stack:
            call = self.record.calls[self.stack.pop()]
            call.end = len(self.record.nodes)
            if call.module is module:
                return


class _Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What no torch function announced: the inside of scripted functions, views made by autograd."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.observe(func, args, kwargs or {}, sys._getframe(1))


class Sandbox:
    """A copy of a model that can be run without a trace of it being left anywhere.

    `fake` copies have shapes and dtypes without values; real ones are for models whose code looks at values. Forward
    hooks are the owner's, who may keep what they see: a copy has none, unless the model cannot run without its `hooks`.
    """

    def __init__(self, model: nn.Module, fake: bool, hooks: bool = False) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
        memo: dict[int, Any] = {}
        with FakeCopyMode(self.mode) if self.mode else contextlib.nullcontext():
            self.copy: nn.Module = copy.deepcopy(model, memo)
        self.fakes: list[weakref.ref[Tensor]] = []  # to `forget` once the sandbox is gone
        self.original: dict[nn.Module, nn.Module] = {}
        for module in {id(m): m for m in all_modules(model)}.values():
            twin = memo.get(id(module))
            if isinstance(twin, nn.Module):
                self.original[twin] = module
        for twin in self.original:
            if not hooks:
                twin._forward_hooks.clear()
                twin._forward_pre_hooks.clear()

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool) -> Record:
        """Run the copy in eval or train mode, and return the record."""
        recorder = _Recorder(self.copy)
        handles = []
        for module in self.original:
            handles.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(recorder.leave))
        self.copy.train(training)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.set_grad_enabled(training))
                if self.mode is not None:
                    stack.enter_context(self.mode)
                args, kwargs = self._inputs(args), self._inputs(kwargs)
                stack.enter_context(_Dispatched(recorder))
                stack.enter_context(recorder)
                _seed()  # a layer that is dropped at random is dropped in each run
                output = self.copy(*args, **kwargs)
                recorder.inside = True
                recorder.record.outputs = [recorder.node(t) for t in _tensors(output)]
        finally:
            for handle in handles:
                handle.remove()
            self.fakes.extend(weakref.ref(t) for t in recorder.alive if isinstance(t, FakeTensor))
        return recorder.record

    def _inputs(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.clone() if value.is_inference() else value.detach()
            return self.mode.from_tensor(value, static_shapes=True) if self.mode else value.clone()
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self._inputs, value))
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._inputs, value))
        if isinstance(value, dict):
            return {key: self._inputs(item) for key, item in value.items()}
        return copy.deepcopy(value)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leave the random number generators as they are, and call or repeat nothing that is the owner's business."""
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # prints the traceback of what a copy fails on
    silent = logger.disabled
    module_hooks = (torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks)
    hooks = [dict(h) for h in module_hooks]
    try:
        logger.disabled = True
        for h in module_hooks:
            h.clear()
        with warnings.catch_warnings(), torch.random.fork_rng(devices=devices), torch.inference_mode(False):
            warnings.simplefilter("ignore")
            yield
    finally:
        for h, saved in zip(module_hooks, hooks, strict=True):
            h.update(saved)
        logger.disabled = silent
        random.setstate(python)
        if numpy:
            numpy.random.set_state(numpy_state)


def _seed() -> None:
    """One state for all the generators that a model draws from; `undisturbed` gives them back their own."""
    random.seed(0)
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)


@contextlib.contextmanager
def no_fakes_left(model: nn.Module, sandboxes: list[Sandbox]) -> Iterator[None]:
    """Afterwards no cache of the process holds a fake tensor of these sandboxes, which are emptied."""
    classes = {cls for module in all_modules(model) for cls in type(module).__mro__ if cls.__module__ != "builtins"}
    modules = {id(m): m for cls in classes if (m := sys.modules.get(cls.__module__)) is not None}
    before = [(owner, dict(vars(owner))) for owner in (*classes, *modules.values())]
    methods = [value for cls in classes for value in vars(cls).values() if isinstance(value, _CACHE)]
    sizes = [(method, method.cache_info().currsize) for method in methods]
    try:
        yield
    finally:
        fakes = [fake for sandbox in sandboxes for fake in sandbox.fakes]
        sandboxes.clear()
        for method, size in sizes:
            if method.cache_info().currsize > size:  # what it was called on, the copied model, is a key
                method.cache_clear()
        for owner, names in before:
            for name, value in list(vars(owner).items()):
                if isinstance(value, FakeTensor) and value is not names.get(name):
                    setattr(owner, name, names[name]) if name in names else delattr(owner, name)
        _forget(fakes)


def _forget(fakes: list[weakref.ref[Tensor]]) -> None:
    """Empty the caches (`functools.lru_cache`, dictionaries, lists) that have kept one of these tensors."""
    if any(fake() is not None for fake in fakes):
        gc.collect()
    kept: list[Any] = [tensor for fake in fakes if (tensor := fake()) is not None]
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
            elif type(holder) is dict and id(holder) not in spaces:
                for key in [key for key, value in holder.items() if id(value) in inside]:
                    del holder[key]
            elif type(holder) is list and not any(_is_cache(h) for h in gc.get_referrers(holder)):
                holder[:] = [item for item in holder if id(item) not in inside]
            elif type(holder) in (tuple, list):
                kept.append(holder)


def _namespaces(dicts: list[dict[Any, Any]]) -> set[int]:
    """The ids of what the classes and modules refer to whose `__dict__` is among these."""
    owners = [owner for owner in gc.get_referrers(*dicts) if isinstance(owner, (type, ModuleType))] if dicts else []
    return {id(value) for value in gc.get_referents(*owners)}


def _is_cache(holder: Any) -> bool:
    return isinstance(holder, (_CACHE, tuple)) or (
        type(holder) is dict and not any(isinstance(k, str) for k in holder) and id(holder) not in _namespaces([holder])
    )


def all_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The registered modules, and those that a module keeps unregistered in a list, tuple, dict or attribute."""
    seen: set[int] = set()
    pending: list[Any] = [model]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        if isinstance(value, nn.Module):
            seen.add(id(value))
            yield value
            pending.extend(vars(value).values())
        elif type(value) in (list, tuple):
            seen.add(id(value))
            pending.extend(value)
        elif type(value) in (dict, OrderedDict):
            seen.add(id(value))
            pending.extend(value.values())


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _name(func: Any) -> str:
    """`add` for `torch.add`, `Tensor.add_`, `x + y`, `x += y` and `aten.add.Tensor`; the attribute for `x.T`."""
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "get")
    if isinstance(func, torch._ops.OpOverload):
        name = func._schema.name.rpartition("::")[2]
    return name.strip("_")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _referring(value: Any, nodes: dict[int, int]) -> Any:
    """Arguments with a `Ref` for each tensor in `nodes`, and without the others."""
    if isinstance(value, Tensor):
        return Ref(nodes[id(value)]) if id(value) in nodes else None
    if isinstance(value, (tuple, list)):
        return [_referring(item, nodes) for item in value]
    if isinstance(value, dict):
        return {key: _referring(item, nodes) for key, item in value.items()}
    return value


def _plain(value: Any) -> Any:
    """Arguments without their tensors, to compare two calls."""
    if isinstance(value, Tensor):
        return f"<{id(value)}>" if not _is_float(value) else "<tensor>"
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # an inference tensor: nothing counts its writes
        return 0


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # a tensor without storage has no views either
        return -id(tensor)


_MODULE_CALL = nn.Module.__call__.__code__.co_filename
_CACHE = functools._lru_cache_wrapper
_PLUMBING = tuple(
    torch.__path__[0] + name
    for name in ("/overrides.py", "/_ops.py", "/_compile.py", "/utils/_python_dispatch.py", "/_dynamo/", "/_tensor.py")
)


def _frames(frame: Any) -> Iterator[Frame]:
    """The frames from an operation up to the `forward` of the module that is being called."""
    while frame is not None and frame.f_code.co_filename != _MODULE_CALL:
        code = frame.f_code
        if not code.co_filename.startswith(_PLUMBING) and code.co_filename != __file__:
            first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            yield Frame(code, frame.f_lasti, first if isinstance(first, nn.Module) else None)
        frame = frame.f_back


def _codes(frame: Any) -> Iterator[CodeType]:
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def _forwards(cls: type[torch.autograd.Function] = torch.autograd.Function) -> dict[CodeType, str]:
    """The forwards of all kinds of `torch.autograd.Function` but torch's own, whose backwards run modules again."""
    found: dict[CodeType, str] = {}
    for kind in cls.__subclasses__():
        code = getattr(inspect.unwrap(kind.forward), "__code__", None)
        if code is not None and not kind.__module__.startswith("torch."):
            found[code] = kind.__qualname__
        found.update(_forwards(kind))
    return found
