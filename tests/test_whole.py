"""An operation that is interrupted, at any line, leaves the model as it was or as it was to be, and can be repeated.

A sample of the lines is tried; EULERNET_POINTS=1000000 tries all, each at its first run and at its last.
"""

import ast
import contextlib
import copy
import inspect
import logging
import math
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import eulernet
from eulernet import _commit
from eulernet._draws import Draws, entered
from eulernet._find import apart
from eulernet._run.patched import FACTORS
from tests.helpers.blocks import Block, Closed, Fails, Frozen, Loop, Weighted, chain

X = torch.linspace(-1, 1, 16).view(2, 8)
ROOT = str(Path(eulernet.__file__).parent)
POINTS = int(os.environ.get("EULERNET_POINTS", "9"))


@pytest.fixture(autouse=True)
def locks_are_free_again() -> Iterator[None]:
    """What is raised at the line of a with statement, as it ends, keeps its lock. No interrupt comes there."""
    yield
    for lock in (_commit.LOCK, apart._LOCK):
        while lock._is_owned():  # type: ignore[attr-defined]
            lock.release()


def patched(h: float = 0.5, **options: Any) -> nn.Module:
    return eulernet.patch(chain(), h, example_inputs=X, **options)


def scheduled() -> tuple[nn.Module, eulernet.HScheduler]:
    model = patched()
    return model, eulernet.HScheduler(model, start=1.0, end=0.5, total_steps=4)


def patching(model: nn.Module, h: float, **options: Any) -> tuple[nn.Module, Callable[[], Any]]:
    return model, lambda: eulernet.patch(model, h, example_inputs=X, **options)


def stepping() -> tuple[nn.Module, Callable[[], Any]]:
    model, schedule = scheduled()

    def step_to_two() -> None:
        if schedule.last_step < 1:
            schedule.step()

    return model, step_to_two


def scheduling() -> tuple[nn.Module, Callable[[], Any]]:
    model = patched()
    return model, lambda: eulernet.HScheduler(model, start=0.25, end=0.125, total_steps=4)


def with_average() -> tuple[nn.Module, Callable[[], Any]]:
    model = patched()
    average = copy.deepcopy(model)
    return nn.ModuleList([model, average]), lambda: eulernet.set_h([model, average], [0.1, 0.2])


def in_a_loop(**options: Any) -> tuple[nn.Module, Callable[[], Any]]:
    torch.manual_seed(0)
    model = Loop()
    return model, lambda: eulernet.patch(model, [0.5, 0.25], example_inputs=X, **options)


def parametrized(operation: str) -> tuple[nn.Module, Callable[[], Any]]:
    model = chain(Weighted(), Weighted())
    if operation == "unpatch":
        eulernet.patch(model, 0.5, example_inputs=X)
    for block in model:
        nn.utils.parametrizations.weight_norm(block)
    if operation == "unpatch":
        return model, lambda: eulernet.unpatch(model)
    return model, lambda: eulernet.patch(model, 0.5, example_inputs=X)


def loading() -> tuple[nn.Module, Callable[[], Any]]:
    model, schedule = scheduled()
    state = {**schedule.state_dict(), "last_step": 3, "kind": "cosine"}
    return model, lambda: schedule.load_state_dict(state)


def on(model: nn.Module, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Callable[[], Any]]:
    return model, lambda: operation(model, *args, **kwargs)


OPERATIONS: dict[str, Callable[[], tuple[nn.Module, Callable[[], Any]]]] = {
    "patch": lambda: patching(chain(), 0.5),
    "patch, preserve": lambda: patching(chain(), 0.5, preserve=True),
    "patch, trainable": lambda: patching(chain(), 0.5, trainable=True),
    "patch, preserve where possible": lambda: patching(chain(), 0.5, preserve="where_possible"),
    "patch, the layers of a loop": in_a_loop,
    "patch, the layers of a loop, trainable": lambda: in_a_loop(trainable=True),
    "patch, parametrized": lambda: parametrized("patch"),
    "patch again": lambda: patching(patched(), 0.25),
    "patch again, preserve": lambda: patching(patched(), 0.25, preserve=True),
    "patch again, from trainable": lambda: patching(patched(trainable=True), 0.25),
    "patch again, to trainable": lambda: patching(patched(trainable="model"), 0.25, trainable=True),
    "unpatch": lambda: on(patched(), eulernet.unpatch),
    "unpatch, trainable": lambda: on(patched(trainable=True), eulernet.unpatch),
    "unpatch, parametrized": lambda: parametrized("unpatch"),
    "set_h": lambda: on(patched(), eulernet.set_h, [0.1, 0.2]),
    "set_h, trainable": lambda: on(patched(trainable=True), eulernet.set_h, [0.1, 0.2]),
    "set_h, two models": with_average,
    "HScheduler": scheduling,
    "HScheduler.step": stepping,
    "HScheduler.load_state_dict": loading,
    "fold": lambda: folding(),
    "fold, trainable": lambda: folding(trainable=True),
    "fold, where possible": lambda: folding(where_possible=True),
}


def folding(where_possible: bool = False, **options: Any) -> tuple[nn.Module, Callable[[], Any]]:
    model = patched(**options)

    def fold() -> None:
        if eulernet.is_patched(model):
            eulernet.fold(model, where_possible=where_possible, example_inputs=X)

    return model, fold


def state(model: nn.Module) -> Any:
    """Classes, attributes, parameters in their order, h, hooks, and what the model computes."""
    modules = [
        (
            classes(module),
            sorted(vars(module)),
            [(key, value.tolist()) for key, value in module._parameters.items() if value is not None],
            [hook for hooks in (module._forward_hooks, module._forward_pre_hooks) for hook in hooks],
            [contents(factor) for factor in vars(module).get(FACTORS, ())],
        )
        for module in model.modules()
    ]
    hs = [step.h for step in eulernet.steps(model)] if eulernet.is_patched(model) else None
    models = model if isinstance(model, nn.ModuleList) else [model]
    return modules, hs, [one(X).tolist() for one in models]


def classes(module: nn.Module) -> list[Any]:
    """Those of `parametrize` by their names: each module has one of its own."""
    return [cls.__name__ if cls.__module__ == parametrize.__name__ else cls for cls in type(module).__mro__]


def contents(factor: Any) -> list[Any]:
    values = {name: v.item() if isinstance(v, torch.Tensor) else v for name, v in vars(factor).items()}
    return [type(factor), sorted(values.items())]


def process() -> Any:
    """What is the process's, or the thread's."""
    return (
        list(warnings.filters),
        logging.getLogger("torch._subclasses.fake_tensor").filters[:],
        len(_get_current_function_mode_stack()),
        len(_get_current_dispatch_mode_stack()),
        random.random,
        torch.manual_seed,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


@cache
def withs(filename: str) -> frozenset[int]:
    tree = ast.parse(Path(filename).read_text())
    return frozenset(n.lineno for n in ast.walk(tree) if isinstance(n, ast.With))


def lines_of(function: Any) -> set[tuple[str, int]]:
    source, first = inspect.getsourcelines(function)
    return {(function.__code__.co_filename, first + i) for i in range(len(source))}


COMMIT = lines_of(_commit.commit)


def below_torch(frame: Any) -> bool:
    """Whether torch has called back from C++, which an error may end. The trace runs in a thread that none reaches."""
    while frame is not None:
        if frame.f_code.co_name == "__torch_dispatch__":
            return True
        frame = frame.f_back
    return False


def run(operation: Callable[[], Any], at: int = 0, error: type[BaseException] = KeyboardInterrupt) -> list[Any]:
    """The lines that run in eulernet's own files; at the one of that number (from 1) an error is raised."""
    seen: list[Any] = []

    def trace(frame: Any, event: str, arg: Any) -> Any:
        filename = frame.f_code.co_filename
        if not filename.startswith(ROOT):
            return None
        entered: set[int] = set()

        def line(frame: Any, event: str, arg: Any) -> Any:
            number = frame.f_lineno
            # The end of a `with` runs its line once more. No signal is handled there, so nothing is raised.
            if event == "line" and not (number in entered and number in withs(filename)) and not below_torch(frame):
                entered.add(number)
                seen.append((filename, number))
                if len(seen) == at:
                    raise error
            return line

        return line

    before = sys.gettrace()
    threading.settrace(trace)
    sys.settrace(trace)
    try:
        operation()
    finally:
        sys.settrace(before)
        threading.settrace(None)  # type: ignore[arg-type]
    return seen


def points(lines: list[Any]) -> list[int]:
    """The first and the last time that each line runs; of these a sample, most of it from the commit on."""
    chosen = {line: i for i, line in enumerate(lines, 1)}.values()
    first = {line: i for i, line in reversed(list(enumerate(lines, 1)))}.values()
    every = sorted({*chosen, *first})
    commit = next((i for i, line in enumerate(lines) if line in COMMIT), 0)
    rng = random.Random(0)
    late, early = [p for p in every if p > commit], [p for p in every if p <= commit]
    return [*rng.sample(late, min(POINTS, len(late))), *rng.sample(early, min(POINTS // 3, len(early)))]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the first line of a thread
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_error_at_any_line_leaves_the_model_old_or_new(name: str) -> None:
    model, operation = OPERATIONS[name]()
    operation()
    after = state(model)
    lines = run(OPERATIONS[name]()[1])
    outside = process()
    for number, point in enumerate(points(lines)):
        model, operation = OPERATIONS[name]()
        before = state(model)
        error = (KeyboardInterrupt, MemoryError)[number % 2]
        with contextlib.suppress(KeyboardInterrupt, MemoryError, eulernet.EulernetError):
            run(operation, point, error)
        where = lines[point - 1]
        assert state(model) in (before, after), where
        assert process() == outside, where
        operation()
        assert state(model) == after, where


def test_a_parameter_that_is_refused_leaves_all_blocks_as_they_were() -> None:
    model = chain(Block(), Closed(), Block())
    before = state(model)
    with pytest.raises(eulernet.EulernetError, match=r"Closed does not take the parameter log_h.*exclude=Closed"):
        eulernet.patch(model, 0.5, example_inputs=X, trainable=True)
    assert state(model) == before
    assert [step.h for step in eulernet.steps(eulernet.patch(model, 0.5, example_inputs=X))] == [0.5] * 3


@pytest.mark.parametrize("afterwards", [False, True], ids=["before", "afterwards"])
@pytest.mark.parametrize("error", [RuntimeError(), MemoryError(), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("former", [None, False, True], ids=["plain", "patched", "learned"])
def test_a_module_that_fails_to_take_a_parameter_leaves_all_blocks_as_they_were(
    former: bool | None, error: BaseException, afterwards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fails, "error", error)
    monkeypatch.setattr(Fails, "afterwards", afterwards)
    for number in range(3):
        blocks: list[nn.Module] = [Block(), Block(), Block()]
        blocks[number] = Fails()
        model = chain(*blocks)
        if former is not None:
            eulernet.patch(model, 0.25, example_inputs=X, trainable=former)
        before = state(model)
        monkeypatch.setattr(Fails, "times", 1)
        with pytest.raises((eulernet.EulernetError, MemoryError, KeyboardInterrupt)):
            eulernet.patch(model, 0.5, example_inputs=X, trainable=True)
        assert state(model) == before
        eulernet.patch(model, 0.5, example_inputs=X, trainable=True)
        assert [p.item() for name, p in model.named_parameters() if "log_h" in name] == [
            pytest.approx(math.log(0.5))
        ] * 3


def test_a_class_that_its_module_does_not_let_go_is_exchanged() -> None:
    model = eulernet.patch(chain(Block(), Frozen()), 0.5, example_inputs=X)
    assert [step.h for step in eulernet.steps(model)] == [0.5, 0.5]
    assert type(eulernet.unpatch(model)[1]) is Frozen


@pytest.mark.parametrize("trainable", [False, True])
def test_memory_that_ends_in_the_middle_leaves_the_model_as_it_was(
    trainable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patched(trainable=trainable)
    before = state(model)
    made: list[None] = []
    real = torch.tensor if not trainable else torch.full

    def fails(*args: Any, **kwargs: Any) -> Any:
        made.append(None)
        if len(made) % 7 == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, real.__name__, fails)
    for _ in range(8):
        try:
            eulernet.patch(model, 0.25, example_inputs=X, trainable=trainable)
        except torch.OutOfMemoryError:
            assert state(model) == before
        before = state(model)
    assert len(made) >= 6


def flags() -> dict[str, Any]:
    """What torch keeps of the process of the modes that are on; where one seems on, dynamo compiles nothing."""
    return {name: value for name, value in vars(_python_dispatch).items() if name.startswith("_is_in_")}


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals here")
@pytest.mark.parametrize("interrupts", [1, 2])
def test_an_interrupt_waits_for_the_trace_and_a_second_one_lets_the_next_trace_wait(
    interrupts: int, alarm: list[bool]
) -> None:
    seen: list[str] = []
    go_on = threading.Event()

    class Interrupted(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append("begins")
            if len(seen) == 1:
                for _ in range(interrupts):
                    alarm[0] = True
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)
                    time.sleep(0.3)  # the main thread looks for signals each tenth of a second
                assert interrupts == 1 or go_on.wait(60)
            seen.append("ends")
            return super().forward(x)

    model, before = chain(Interrupted()), flags()
    with pytest.raises(KeyboardInterrupt):
        eulernet.patch(model, 0.5, example_inputs=X)
    if interrupts == 1:
        assert seen and seen == ["begins", "ends"] * (len(seen) // 2) and flags() == before
    else:
        assert seen == ["begins"]
        threading.Timer(0.3, go_on.set).start()
    assert len(eulernet.steps(eulernet.patch(model, 0.5, example_inputs=X))) == 1
    assert seen == ["begins", "ends"] * (len(seen) // 2) and flags() == before


@pytest.mark.parametrize("method", [TorchDispatchMode.__enter__, TorchDispatchMode.__exit__], ids=["enter", "exit"])
def test_an_interrupt_while_a_mode_is_entered_or_left_leaves_none_on(method: Any) -> None:
    def raised_at(at: int) -> bool:
        lines = iter(range(1, at))

        def line(frame: Any, event: str, arg: Any) -> Any:
            if event == "line" and next(lines, None) is None:
                sys.settrace(None)
                frame.f_trace = None
                raise KeyboardInterrupt
            return line

        sys.settrace(lambda frame, event, arg: line if frame.f_code is method.__code__ else None)
        try:
            with entered(Draws()):
                torch.rand(2)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    before, at = flags(), 1
    while raised_at(at):
        assert flags() == before and not _get_current_dispatch_mode_stack()
        at += 1
    assert at > 5


def test_memory_that_ends_in_the_trace_of_the_training_path_is_no_failure_of_the_model() -> None:
    class Large(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training and memory_ends:
                raise MemoryError
            return super().forward(x)

    model, memory_ends = chain(Large(), Large()), True
    before = state(model.eval())
    with pytest.raises(MemoryError):
        eulernet.patch(model, 0.5, example_inputs=X)
    assert state(model) == before
    memory_ends = False
    assert len(eulernet.steps(eulernet.patch(model, 0.5, example_inputs=X))) == 2


@pytest.fixture
def alarm() -> Iterator[list[bool]]:
    armed = [False]

    def interrupt(*_: Any) -> None:
        if armed[0]:
            armed[0] = False
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield armed
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
# An alarm that goes off in a weakref's callback is ignored by Python, which says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["patch", "patch again, to trainable", "unpatch, trainable", "fold"])
def test_an_interrupt_at_any_time_leaves_the_model_old_or_new(name: str, alarm: list[bool]) -> None:
    model, operation = OPERATIONS[name]()
    began = time.perf_counter()
    operation()
    duration, after, rng = time.perf_counter() - began, state(model), random.Random(0)
    for _ in range(POINTS // 3):
        model, operation = OPERATIONS[name]()
        before = state(model)
        try:
            alarm[0] = True
            signal.setitimer(signal.ITIMER_REAL, max(rng.uniform(0, 1) * duration, 1e-5))
            operation()
            alarm[0] = False
        except KeyboardInterrupt:
            pass
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert state(model) in (before, after)
        operation()
        assert state(model) == after
