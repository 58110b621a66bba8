"""A copy of a model that runs and leaves no trace: none on the model, none in the process."""

from __future__ import annotations

import contextlib
import copy
import dis
import inspect
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import CellType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from eulernet._draws import Draws, entered, own_numbers
from eulernet._find.apart import OneDtype, alone, led_to, quiet, without_global_hooks
from eulernet._find.copies import as_before, copied
from eulernet._find.leftovers import Leftovers
from eulernet._find.tensors import all_modules, attributes_of, deepcopied, returned, tensors_in
from eulernet._find.trace import DispatchTracer, Trace, Tracer

_KEEPING = frozenset("append extend update setdefault __setitem__ add put".split())  # what a lambda keeps a value by


class Sandbox:
    """A copy of a model that can be run without a trace of it being left anywhere.

    `fake` copies have shapes and dtypes without values; real ones are for models whose code looks at values. Forward
    hooks are the owner's, who may keep what they see: a copy has none, unless the model cannot run without its `hooks`.
    """

    def __init__(self, model: nn.Module, fake: bool, hooks: bool = False, leftovers: Leftovers | None = None) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
        if self.mode and any(isinstance(v, torch.ScriptObject) for m in all_modules(model) for v in vars(m).values()):
            self.mode.cache_enabled = False  # it compares arguments, which packed weights refuse
        self.tracer: Tracer | None = None  # while it runs
        self.operations: Operations | None = None  # of the last run again
        self.differentiates = False  # whether the model asks for gradients in eval mode too, as a force field does
        memo: dict[int, Any] = {}
        fakes, draws = FakeCopyMode(self.mode) if self.mode else contextlib.nullcontext(), Draws()
        with fakes, own_numbers(draws), draws:
            self.copy: nn.Module = copied(model, memo)
        self.copied = [value for value in memo.values() if isinstance(value, Tensor)]
        self.variables = [value for value in memo.values() if isinstance(value, CellType)]
        self.leftovers = leftovers or Leftovers()
        self.leftovers.had_values |= not fake
        self.leftovers.copies |= {id(module) for module in all_modules(self.copy)}
        self.fakes = self.leftovers.fakes
        self.original: dict[nn.Module, nn.Module] = {}
        for module in {id(m): m for m in all_modules(model)}.values():
            twin = memo.get(id(module))
            if isinstance(twin, torch.jit.ScriptModule):  # which copies its modules itself
                self.original.update(zip(twin.modules(), module.modules(), strict=True))
            elif isinstance(twin, nn.Module):
                self.original[twin] = module
        self.hooked: dict[nn.Module, None] = {}  # of the model's modules those with a hook that is not run, and returns
        for twin, module in self.original.items():
            for owners in (twin._forward_hooks, twin._forward_pre_hooks) if not hooks else ():
                for key in [key for key, hook in owners.items() if not _computes_weights(hook)]:
                    if _returns(owners.pop(key)):
                        self.hooked[module] = None

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool, backward: bool = False) -> Trace:
        """Run the copy in eval or train mode, and return the trace; with that of its backward if asked."""
        self.tracer = tracer = Tracer(self.copy, self.leftovers.look if self.mode else None)
        tracer.keep(self.copied)
        tracer.keep(t for fake in self.fakes if (t := fake()) is not None)  # in a cache since an earlier run
        handles = []
        for module in (m for m in self.original if not isinstance(m, torch.jit.ScriptModule)):  # which takes no hooks
            handles.append(module.register_forward_pre_hook(tracer.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(tracer.leave))
        try:
            with self._running(training, OneDtype()) as stack:  # type: ignore[no-untyped-call]
                switched = (m for m in self.original if type(m).train is not nn.Module.train)  # which may make tensors
                tracer.keep(t for module in switched for t in tensors_in(attributes_of(module)))
                args, kwargs = self._inputs(args), self._inputs(kwargs)
                operations = stack.enter_context(Operations(self.mode))
                stack.enter_context(DispatchTracer(tracer, {} if self.mode else self._owned()))
                stack.enter_context(tracer)
                output = self.copy(*args, **kwargs)
                tracer.inside = True
                tracer.trace.outputs = [tracer.node(t) for t in returned(output)]
                if not tracer.trace.outputs:
                    of = f"{type(self.copy).__name__} returns a {type(output).__name__}"
                    tracer.trace.breaks[f"{of}, in which no tensor is seen"] = None
                tracer.trace.operations = operations.counts.copy()
                if backward:
                    tracer.inside, tracer.trace.forward = False, len(tracer.trace.additions)
                    _differentiate(output)
        finally:
            for handle in handles:
                handle.remove()
            self.tracer = None
            self.fakes.extend(weakref.ref(t) for t in tracer.alive if isinstance(t, FakeTensor))
        return tracer.trace

    def _owned(self) -> dict[int, str]:
        """The tensors of the model, which no run with values may write into, by their ids: whose they are."""
        return {
            id(tensor): f"{name} of {type(module).__name__}"
            for module in self.original.values()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }

    def run_again(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool, backward: bool = False
    ) -> Counter[str]:
        """Run the copy, which is no longer as it was traced, as the model will run; returns what it computes."""
        with self._running(training, _Made(self.fakes)) as stack:
            self.operations = stack.enter_context(Operations(self.mode))
            stack.enter_context(_Copying())
            output = self.copy(*self._inputs(args), **self._inputs(kwargs))
            counts: Counter[str] = self.operations.counts.copy()
            if backward:
                _differentiate(output)
        return counts

    def step(self, add: Callable[[], Any]) -> Any:
        """What `add` returns, which is the work of a step, while the copy runs again."""
        assert self.operations is not None
        self.operations.in_step = True
        try:
            return add()
        finally:
            self.operations.in_step = False

    @contextlib.contextmanager
    def _running(self, training: bool, of_fakes: TorchDispatchMode) -> Iterator[contextlib.ExitStack]:
        """All that a run of the copy is to be under; one mode where its tensors are fake."""
        draws = Draws()
        with contextlib.ExitStack() as stack:
            stack.enter_context(as_before(self.original, self.variables, values=self.mode is None))
            self.copy.train(training)
            stack.enter_context(torch.set_grad_enabled(training or self.differentiates))
            stack.enter_context(_uncompiled())
            if self.mode is not None:
                stack.enter_context(self.mode)
                stack.enter_context(of_fakes)
            else:
                stack.enter_context(draws)  # a layer that is dropped at random is dropped in each run
            stack.enter_context(own_numbers(draws))
            stack.enter_context(without_global_hooks(list(self.original)))
            stack.enter_context(led_to(self.original))
            yield stack

    def parameter(self, of_model: nn.Parameter) -> nn.Parameter:
        """A copy of a parameter that is put into the copy."""
        value = of_model.detach()
        return nn.Parameter(self.mode.from_tensor(value, static_shapes=True) if self.mode else value.clone())

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


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what a run computes, by name and numbers, but for what a step does another way: views, copies, sums.

    What a run of fake tensors would write into a real one, it writes into a fake one that stands for it.
    """

    supports_higher_order_operators = True
    _COPIES = frozenset("clone copy _to_copy detach lift_fresh empty empty_like".split())
    _SUMS = frozenset("add sub rsub".split())  # of tensors
    _OF_STEPS = _SUMS | frozenset("mul lerp exp".split())

    def __init__(self, mode: FakeTensorMode | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode
        self.in_step = False
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(func, OpOverload):  # one of higher order
            return func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if func._schema.is_mutable and self.mode is not None:
            args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        # Of what gives no tensor a scripted function asks another time or not, as it is compiled.
        if name not in self._COPIES and not func.is_view and any(True for _ in tensors_in(out)):
            numbers = [a for a in args if type(a) in (int, float)]
            numbers += [f"{key}={a}" for key, a in (kwargs or {}).items() if type(a) in (int, float) and a != 1]
            if not (name in self._OF_STEPS if self.in_step else name in self._SUMS and not numbers):
                self.counts[" ".join(map(str, (name, *numbers)))] += 1
        return out

    def _fake(self, tensor: Tensor) -> Tensor:
        assert self.mode is not None
        return tensor if isinstance(tensor, FakeTensor) else self.mode.from_tensor(tensor, static_shapes=True)


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps in mind which tensors a run has made."""

    def __init__(self, fakes: list[weakref.ref[Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fakes = fakes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.fakes.extend(weakref.ref(t) for t in tensors_in(out) if isinstance(t, FakeTensor))
        return out


class _Copying(TorchFunctionMode):
    """Copies of fake tensors that the model makes itself, as the trace makes them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return deepcopied(*args) if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


def _differentiate(output: Any) -> None:
    ends = tuple(t for t in tensors_in(output) if t.requires_grad)
    gradients = tuple(torch.ones_like(t) for t in ends)
    # Not by torch.autograd.backward, itself a torch function, which would hide what is in it.
    with torch.autograd.set_multithreading_enabled(False):
        rest = False, False, ()  # no graph is kept or made; all leaves get their gradients
        engine = torch.autograd.graph._engine_run_backward
        engine(ends, gradients, *rest, allow_unreachable=True, accumulate_grad=True)


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """What compiles itself at its first call is run as it is written."""
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    name = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    before = getattr(flex, name, None)
    if before is not None:
        setattr(flex, name, True)
    try:
        yield
    finally:
        if before is not None:
            setattr(flex, name, before)


def _computes_weights(hook: Any) -> bool:
    """Whether a hook makes a weight out of parameters: the older weight and spectral norms, and pruning."""
    return type(hook).__module__.startswith("torch.nn.utils.")


def _returns(hook: Any) -> bool:
    """Whether a hook may return another value for the one that it is given, and does not just keep that."""
    code = getattr(inspect.unwrap(getattr(hook, "__func__", hook)), "__code__", None)
    if code is None or (code.co_name == "<lambda>" and not _KEEPING.isdisjoint(code.co_names)):
        return False
    last = [
        before if step.opname == "RETURN_VALUE" else step
        for before, step in pairwise(dis.get_instructions(code))
        if step.opname in ("RETURN_VALUE", "RETURN_CONST")
    ]
    return any("CONST" not in step.opname or step.argval is not None for step in last)


@contextlib.contextmanager
def measuring(copies: dict[nn.Module, nn.Module] | None = None, seed: int = 0) -> Iterator[None]:
    """Draw from generators of one's own, call no hook of the process on these copies, and not the modules themselves.

    Those of torch give what follows on `torch.manual_seed(seed)`.
    """
    draws, copies = Draws(seed), copies or {}
    calm = alone(), quiet(), torch.inference_mode(False), _disable_current_modes(), without_global_hooks(list(copies))
    with contextlib.ExitStack() as stack:
        for context in (*calm, led_to(copies), own_numbers(draws), entered(draws)):
            stack.enter_context(context)
        yield
