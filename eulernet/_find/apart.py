"""Run the owner's code apart from the process: nothing of the process changes by it, and other threads see nothing."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eulernet._commit import surely

T = TypeVar("T")
_LOCK = threading.RLock()
_WORK = threading.Lock()  # held by the thread that works, which may outlive the call that an interrupt ended
_within: contextvars.ContextVar[bool] = contextvars.ContextVar("_within", default=False)
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One at a time in the process: the caches that a trace cleans up after itself are the process's."""
    if _within.get():  # a thread of `apart` belongs to who holds the lock
        yield
        return
    with _LOCK:
        with _WORK:
            pass
        yield


def apart(work: Callable[[], T]) -> T:
    """What `work` returns, done in a thread of its own while the caller waits, without showing a warning.

    The modes of torch are a thread's: those of the caller have no part in it, and none is left over. An interrupt,
    which Python handles in the main thread, does not reach the middle of torch, where it would end the process. It
    waits for the end of `work`; a second one does not, but the next work does.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    inherit, outermost = _surroundings(), not _within.get()
    _stand_in_for_a_missing_gpu()
    over: list[bool] = []
    ended = threading.Lock()
    ended.acquire()

    def run() -> None:
        try:
            _within.set(True)
            with _WORK if outermost else contextlib.nullcontext(), inherit(), quiet():
                results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            over.append(True)
            ended.release()

    def wait() -> None:  # `Thread.join` and `Event.wait` stand no interrupt: Python 3.11 does not wait again
        while not over and (ended.acquire(timeout=0.1) or thread.is_alive()):
            pass
        thread.join()  # it frees tensors until then, and aborts the process if that ends meanwhile

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name="eulernet", daemon=True)
    try:
        thread.start()
        wait()
    except BaseException as error:
        if _begins(thread):
            wait()
        # What `start` may raise for an interrupt is an error of its locks.
        if isinstance(error, RuntimeError) and isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    try:
        if results:
            return results[0]
        raise errors[0] if errors else MemoryError("the thread of the trace came to no end")
    finally:
        errors.clear()  # an error holds its frames, and these would hold the error


def _begins(thread: threading.Thread) -> bool:
    """Whether a thread whose start was cut short runs: it does so within moments, or never."""
    for _ in range(1000):
        if thread.ident is not None or thread not in threading.enumerate():
            break
        time.sleep(1e-3)
    return thread.ident is not None


@cache
def _stand_in_for_a_missing_gpu() -> None:
    """Where a torch built for CUDA finds no GPU, the first fake tensors put a stand-in in the place of CUDA's guard.

    From torch 2.9 on it dies with the thread that made it (it is `thread_local` in DeviceGuardImplInterface.cpp; later
    releases made it static), and the next fake tensors of the process crash. So a thread makes it that never ends.
    """
    put: Callable[[], None] | None = getattr(torch._C, "_ensureCUDADeviceGuardSet", None)  # torch 2.8 has none
    if put is None or torch.version.cuda is None or torch.cuda.device_count() > 0:
        return
    made = threading.Event()

    def make() -> None:
        try:
            put()
        finally:
            made.set()
        threading.Event().wait()

    threading.Thread(target=make, name="eulernet: stands in for a missing GPU", daemon=True).start()
    made.wait()


def _surroundings() -> Callable[[], contextlib.ExitStack]:
    """What of the caller's thread is a setting rather than a mode: default device, autocast, stream of the GPU."""
    device = torch.get_default_device()
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in _AUTOCAST if torch.is_autocast_enabled(kind)]
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def enter() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if device.type != "cpu":
            stack.enter_context(device)
        for kind, dtype in casts:
            stack.enter_context(torch.autocast(kind, dtype))
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))
        return stack

    return enter


# ---- warnings and logs


class _Here:
    """Stands in a filter of the process, and concerns one thread only."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = threading.current_thread()

    def match(self, message: str) -> bool:
        """Of a filter of `warnings`: whether it concerns this warning."""
        return threading.current_thread() is self.thread

    def filter(self, record: logging.LogRecord) -> bool:
        """Of a filter of `logging`: whether to let this record pass."""
        return threading.current_thread() is not self.thread


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warning of this thread is shown, nor the traceback that torch logs of what a copy fails on."""
    here = _Here()
    ignore: Any = ("ignore", here, Warning, None, 0)
    held, logger = warnings.filters, logging.getLogger("torch._subclasses.fake_tensor")
    filters: Any = held

    def undo() -> None:
        here.thread = None
        for kept in (held, warnings.filters):  # whoever has entered `catch_warnings` in between holds a copy
            if ignore in kept:
                kept.remove(ignore)  # type: ignore[attr-defined]
        logger.removeFilter(here)

    with surely(undo):
        filters.insert(0, ignore)
        logger.addFilter(here)
        yield


# ---- dtypes


class OneDtype(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Products of tensors of two dtypes fail, as they do with values; fake tensors would let them pass."""

    _PRODUCTS = frozenset("aten::mm aten::addmm aten::bmm aten::baddbmm aten::mv aten::addmv aten::convolution".split())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in self._PRODUCTS:
            dtypes = {arg.dtype for arg in args if isinstance(arg, Tensor)}
            if len(dtypes) > 1:
                raise TypeError(f"{func._schema.name} of {' and '.join(sorted(map(str, dtypes)))}")
        return func(*args, **(kwargs or {}))


# ---- hooks


_MODULE = torch.nn.modules.module
_GLOBAL_HOOKS = [f"_global_{when}_hooks" for when in ("forward_pre", "forward", "backward_pre", "backward")]
_without_hooks = types.FunctionType(
    nn.Module._call_impl.__code__, {**vars(_MODULE), **{name: {} for name in _GLOBAL_HOOKS}}, "_call_impl"
)


@contextlib.contextmanager
def without_global_hooks(modules: list[nn.Module]) -> Iterator[None]:
    """These modules do not call the hooks that are registered for all modules of the process."""
    called = modules if any(vars(_MODULE)[name] for name in _GLOBAL_HOOKS) else []
    try:
        for module in called:
            module.__dict__["_call_impl"] = types.MethodType(_without_hooks, module)
        yield
    finally:
        for module in called:
            module.__dict__.pop("_call_impl", None)


_led: contextvars.ContextVar[tuple[object, ...]] = contextvars.ContextVar("_led", default=())


@contextlib.contextmanager
def led_to(copies: dict[nn.Module, nn.Module]) -> Iterator[None]:
    """Who calls one of these modules from here calls its copy (`copies`: each copy with its module).

    A copy may hold a module of the model where nothing is copied: by a weak reference, in a class or a closure. Other
    threads call the module.
    """
    mine = object()
    called: list[nn.Module] = []

    def leading(module: nn.Module, copy: nn.Module) -> Callable[..., Any]:
        own: Callable[..., Any] = module._call_impl

        def call(*args: Any, **kwargs: Any) -> Any:
            return copy(*args, **kwargs) if mine in _led.get() else own(*args, **kwargs)

        return call

    token = _led.set((*_led.get(), mine))
    try:
        for copy, module in copies.items():
            if "_call_impl" not in module.__dict__:
                called.append(module)
                module.__dict__["_call_impl"] = leading(module, copy)
        yield
    finally:
        for module in called:
            module.__dict__.pop("_call_impl", None)
        _led.reset(token)
