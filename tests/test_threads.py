"""Several threads at once: nothing of the process changes, and the numbers that others draw are theirs."""

import logging
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import eulernet
from eulernet._find import apart
from tests.helpers.blocks import Block, Dropped, chain

X = torch.ones(2, 8)
LOGGER = logging.getLogger("torch._subclasses.fake_tensor")


@pytest.fixture(autouse=True)
def many_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*works: Callable[[], Any]) -> None:
    """Run these at once; what one of them raises is raised."""
    errors: list[BaseException] = []

    def run(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def patch_one() -> None:
    model = eulernet.patch(chain(), 0.5, example_inputs=X)
    assert [step.h for step in eulernet.steps(model)] == [0.5, 0.5]


def test_threads_that_patch_at_once_leave_the_process_as_it_was() -> None:
    patch_one()  # what is imported now adds filters of its own
    called: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: called.append("hook"))
    try:
        before = list(warnings.filters), LOGGER.disabled, LOGGER.filters[:], random.random, np.random.rand
        for _ in range(4):
            together(patch_one, patch_one, patch_one)
            after = list(warnings.filters), LOGGER.disabled, LOGGER.filters[:], random.random, np.random.rand
            assert after == before
        assert not called
        chain()(X)
        assert called
    finally:
        handle.remove()


def test_the_numbers_that_another_thread_draws_are_those_it_would_draw_alone() -> None:
    """While models are patched that draw numbers themselves."""

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    drawn: list[Any] = []
    done = threading.Event()

    def draw_on() -> None:
        while not done.is_set():
            drawn.append(draw())

    remaining = iter([(Dropped(), Block()) for _ in range(3)])

    def patch_those() -> None:
        try:
            for pair in remaining:
                eulernet.patch(nn.Sequential(*pair), 0.5, example_inputs=X)
        finally:
            done.set()

    seed()
    together(patch_those, draw_on)
    seed()
    assert len(drawn) > 10
    assert drawn == [draw() for _ in drawn]


def test_a_layer_that_is_dropped_at_random_is_dropped_alike_in_each_run() -> None:
    for seed in range(3):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        model = eulernet.patch(nn.Sequential(Dropped(), Dropped()), 0.5, example_inputs=X)  # proves itself, or raises
        assert len(eulernet.steps(model)) == 2


def test_a_warning_of_another_thread_is_seen_while_a_model_is_patched() -> None:
    done = threading.Event()

    def patch_some() -> None:
        try:
            for _ in range(3):
                patch_one()
        finally:
            done.set()

    warned = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread = threading.Thread(target=patch_some)
        thread.start()
        while not done.is_set():
            warnings.warn("seen", UserWarning, stacklevel=1)
            warned += 1
            time.sleep(0.001)
        thread.join()
    assert warned and sum(str(w.message) == "seen" for w in caught) == warned


def test_a_warning_of_the_model_is_not_shown_by_the_trace() -> None:
    class Warning_(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            warnings.warn("the model's own", UserWarning, stacklevel=1)
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eulernet.patch(nn.Sequential(Warning_(), Block()), 0.5, example_inputs=X)


def test_each_addition_takes_the_old_h_or_the_new_one_of_another_thread() -> None:
    model = nn.Sequential(Block(), Block())
    with torch.no_grad():
        for block in model:
            block.f.weight.zero_()
            block.f.bias.fill_(1.0)
    eulernet.patch(model, 1.0, example_inputs=X)
    done = threading.Event()
    seen: set[float] = set()

    def set_on() -> None:
        try:
            for i in range(400):
                eulernet.set_h(model, [1.0, 16.0] if i % 2 else [2.0, 32.0])
        finally:
            done.set()

    def run_on() -> None:
        with torch.no_grad():
            while not done.is_set():
                out = model(torch.zeros(1, 8))
                assert (out == out[0, 0]).all()
                seen.add(out[0, 0].item())

    together(set_on, run_on)
    assert seen <= {1.0 + 1.0, *(a + b for a in (1.0, 2.0) for b in (1.0, 16.0, 32.0))}


def test_a_model_that_another_thread_unpatches_is_set_or_is_said_to_be_not_patched() -> None:
    for _ in range(20):
        model = eulernet.patch(chain(), 0.5, example_inputs=X)
        said: list[str] = []

        def set_on(model: nn.Module = model, said: list[str] = said) -> None:
            try:
                while not said:
                    eulernet.set_h(model, 0.25)
            except eulernet.EulernetError as error:
                said.append(str(error))

        def unpatch(model: nn.Module = model) -> None:
            time.sleep(1e-3)
            eulernet.unpatch(model)

        together(set_on, unpatch)
        assert "is not patched; call eulernet.patch" in said[0]
        assert torch.equal(model(X), chain()(X))


class Meddling(nn.Module):
    """A branch in the middle of which another thread does something."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)
        self.meanwhile: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.meanwhile is not None:
            together(self.meanwhile)
        return self.f(x)


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.branches = nn.LayerNorm(8), nn.ModuleList([Meddling(), Meddling(), Meddling()])

    def forward(self, x: Tensor) -> Tensor:
        """In one expression."""
        y = self.norm(x)
        return x + self.branches[0](y) + self.branches[1](y) + self.branches[2](y)


class InStatements(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out = x + self.branches[0](y)
        out = self.branches[1](y) + out
        out += self.branches[2](y)
        return out


class InALoop(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        y, out = self.norm(x), x
        for branch in self.branches:
            out = out + branch(y)
        return out


class InAFunction(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        return added(x, self.norm(x), *self.branches)


def added(x: Tensor, y: Tensor, *branches: nn.Module) -> Tensor:
    out = x + branches[0](y)
    for branch in branches[1:]:
        out = out + branch(y)
    return out


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", [Parallel, InStatements, InALoop, InAFunction])
def test_all_branches_of_a_step_take_one_h_whatever_another_thread_sets(kind: type[Parallel], learned: bool) -> None:
    x = torch.linspace(-1, 1, 16, dtype=torch.float64).view(2, 8)
    model = eulernet.patch(nn.Sequential(kind(), kind()).double(), 0.5, example_inputs=x, trainable=learned)
    assert [step.kind for step in eulernet.steps(model)] == ["parallel"] * 2

    def by_hand(h: float) -> Tensor:
        out = x
        for block in model:
            y = block.norm(out)  # type: ignore[operator, union-attr]
            out = out + h * sum(branch.f(y) for branch in block.branches)  # type: ignore[union-attr]
        return out

    for number in range(3):
        eulernet.set_h(model, 0.5)
        branch = model[-1].branches[number]  # type: ignore[union-attr]
        branch.meanwhile = lambda: eulernet.set_h(model, 0.25)
        torch.testing.assert_close(model(x), by_hand(0.5))
        branch.meanwhile = None
        torch.testing.assert_close(model(x), by_hand(0.25))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for h in (0.25, 0.125, 0.5):
        eulernet.set_h(model, h)
        torch.testing.assert_close(compiled(x), by_hand(h))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_the_stand_in_for_a_missing_gpu_outlives_the_thread_of_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """From torch 2.9 on it dies with the thread that made it, and the fake tensors of the next trace crash."""
    made_by: list[threading.Thread] = []
    monkeypatch.setattr(
        torch._C, "_ensureCUDADeviceGuardSet", lambda: made_by.append(threading.current_thread()), raising=False
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    apart._stand_in_for_a_missing_gpu.cache_clear()
    for _ in range(2):
        patch_one()
    assert made_by[0].is_alive() and made_by[0].daemon
    assert all(thread.name == "eulernet" for thread in made_by[1:])  # those of the traces find it there


def test_a_forward_that_calls_eulernet_is_traced() -> None:
    """The trace holds the lock; what belongs to it does not wait for it."""

    class Curious(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not eulernet.find_steps(nn.Linear(2, 2), example_inputs=torch.ones(1, 2))
            return super().forward(x)

    assert len(eulernet.find_steps(nn.Sequential(Curious()), example_inputs=X)) == 1


def test_the_settings_of_the_callers_thread_hold_for_the_trace() -> None:
    class Settings(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.f(x).dtype, torch.empty(0).device.type))
            return super().forward(x)

    seen: list[Any] = []
    model = nn.Sequential(Settings())
    with torch.autocast("cpu", torch.bfloat16):
        eulernet.find_steps(model, example_inputs=X)
    assert seen == [(torch.bfloat16, "cpu")] * len(seen) and seen
    seen.clear()
    with torch.device("meta"):
        eulernet.find_steps(model.to("meta"), example_inputs=torch.ones(2, 8))
    assert seen == [(torch.float32, "meta")] * len(seen) and seen
