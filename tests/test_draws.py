"""Numbers of generators of one's own are those that the process's give after the same seed, and leave these alone."""

import copy
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import rich.progress  # noqa: F401  (which draws one of Python's numbers when it is imported)
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import eulernet
from eulernet._draws import Draws, own_numbers
from tests.helpers.blocks import Block, chain

X = torch.linspace(-1, 1, 32).view(4, 8)
OPERATIONS: dict[str, Callable[[], Tensor]] = {
    "rand": lambda: torch.rand(3, 40),
    "rand, out": lambda: torch.rand(3, out=torch.empty(3)),
    "randn": lambda: torch.randn(40, dtype=torch.float64),
    "randn, out": lambda: torch.randn(40, out=torch.empty(40)),
    "randint": lambda: torch.randint(3, 9, (20,)),
    "randperm": lambda: torch.randperm(20),
    "rand_like": lambda: torch.rand_like(X),
    "randn_like": lambda: torch.randn_like(X, dtype=torch.float64),
    "randint_like, high": lambda: torch.randint_like(X, 7),
    "randint_like": lambda: torch.randint_like(X, 3, 9, dtype=torch.int64),
    "normal": lambda: torch.normal(X, 2.0),
    "normal_": lambda: torch.empty(40).normal_(1.0, 2.0),
    "uniform_": lambda: torch.empty(40).uniform_(1.0, 2.0),
    "exponential_": lambda: torch.empty(40).exponential_(),
    "bernoulli": lambda: torch.bernoulli(X.abs()),
    "multinomial": lambda: torch.multinomial(X.abs() + 0.1, 3),
    "poisson": lambda: torch.poisson(X.abs() * 9),
    "dropout": lambda: F.dropout(X, 0.5),
    "feature dropout": lambda: F.dropout1d(X, 0.5),
    "alpha dropout": lambda: F.alpha_dropout(X, 0.5, training=True),
    "rrelu": lambda: F.rrelu(X, training=True),
    "attention": lambda: F.scaled_dot_product_attention(X[None], X[None], X[None], dropout_p=0.5),
    "initialisation": lambda: nn.Linear(8, 8).weight.detach(),
    "truncated": lambda: nn.init.trunc_normal_(torch.empty(40)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_own_numbers_are_those_of_the_process_after_the_same_seed(name: str) -> None:
    draw = OPERATIONS[name]
    torch.manual_seed(3)
    expected = [draw() for _ in range(3)]
    before = torch.get_rng_state()
    with Draws(3):
        actual = [draw() for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert not torch.equal(actual[0], actual[1])


def test_dropout_in_one_operation_leaves_out_and_scales() -> None:
    before = torch.get_rng_state()
    with Draws():
        for probability in (0.0, 0.25, 1.0):
            result, kept = torch.native_dropout(torch.ones(2000), probability, train=True)
            assert abs(kept.double().mean() - (1 - probability)) < 0.05
            assert (
                torch.allclose(result[kept], torch.tensor(1 / (1 - min(probability, 0.9)))) and not result[~kept].any()
            )
        result, _ = torch.native_dropout(X, 0.5, train=False)
        assert torch.equal(result, X)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_torch_is_asked_for_here_concerns_the_own_generator_and_elsewhere_the_process_s() -> None:
    torch.manual_seed(5)
    before, python = torch.get_rng_state(), random.getstate()
    draws = Draws(3)
    elsewhere: list[Any] = []
    with own_numbers(draws), draws:
        first = torch.rand(4)
        state = torch.get_rng_state()
        second = torch.rand(4)
        torch.set_rng_state(state)
        assert torch.equal(torch.rand(4), second)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            assert torch.equal(torch.rand(4), first)
        thread = threading.Thread(target=lambda: elsewhere.append((torch.get_rng_state(), torch.initial_seed())))
        thread.start()
        thread.join()
        random.seed(1)
        np.random.seed(1)
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == python
    assert torch.equal(elsewhere[0][0], before) and elsewhere[0][1] == 5


# ------------------------------------------------------------------------------------------------------- measurements


class Noisy(Block):
    """Draws from all three generators when it runs."""

    def forward(self, x: Tensor) -> Tensor:
        kept = (random.random() + float(np.random.rand()) + torch.rand(()).item()) / 3
        return x + F.dropout(self.f(x), 0.5, self.training) * kept


class Checkpointed(nn.Module):
    """Its branch runs again for the gradients, and must drop the same then."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.f, self.again = nn.Linear(8, 8), again

    def branch(self, x: Tensor) -> Tensor:
        return F.dropout(self.f(x), 0.5, self.training)

    def forward(self, x: Tensor) -> Tensor:
        return x + (checkpoint(self.branch, x, use_reentrant=False) if self.again else self.branch(x))


MEASUREMENTS: dict[str, Callable[[nn.Module], Any]] = {
    "diagnose": lambda model: eulernet.diagnose(model, X, gains=True).rows,
    "calibrate": lambda model: eulernet.calibrate(model, X, target=1.2, bounds=(0.1, 4.0), tolerance=0.5),
    "depth_check": lambda model: (
        eulernet.depth_check(
            lambda depth: nn.Sequential(*(copy.deepcopy(model[0]) for _ in range(depth))),  # type: ignore[index]
            [1, 2],
            (X, X),
            F.mse_loss,
            seeds=1,
            progress=False,
        ).rows
    ),
}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_measurement_leaves_the_numbers_that_other_threads_draw(name: str) -> None:
    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    model = eulernet.patch(chain(Noisy(), Noisy()), 0.5, example_inputs=X)
    drawn: list[Any] = []
    done = threading.Event()

    def draw_on() -> None:
        while not done.is_set():
            drawn.append(draw())

    seed()
    thread = threading.Thread(target=draw_on)
    thread.start()
    try:
        MEASUREMENTS[name](model)
    finally:
        done.set()
        thread.join()
    seed()
    assert len(drawn) > 10
    assert drawn == [draw() for _ in drawn]


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_measurement_is_the_same_whatever_was_drawn_before(name: str) -> None:
    model = eulernet.patch(chain(Noisy(), Noisy()), 0.5, example_inputs=X)
    first = MEASUREMENTS[name](model)
    torch.manual_seed(9)
    random.seed(9)
    np.random.seed(9)
    assert MEASUREMENTS[name](model) == first


def test_what_a_checkpoint_runs_again_drops_the_same() -> None:
    plain, again = (
        eulernet.diagnose(chain(Checkpointed(on), Checkpointed(on)), X, gains=False) for on in (False, True)
    )
    assert plain.rows == again.rows and plain.gradient_growth == again.gradient_growth


def test_a_measurement_calls_no_hook_of_the_process_and_hides_none_from_other_threads() -> None:
    called: list[Any] = []
    here = threading.current_thread()
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: called.append((threading.current_thread() is here, type(module)))
    )
    done = threading.Event()
    runs: list[Tensor] = []

    def run_on() -> None:
        while not done.is_set():
            runs.append(other(X))

    other, model = nn.Linear(8, 8), eulernet.patch(chain(), 0.5, example_inputs=X)
    try:
        thread = threading.Thread(target=run_on)
        thread.start()
        for measure in MEASUREMENTS.values():
            measure(model)
    finally:
        done.set()
        thread.join()
        hook.remove()
    assert called == [(False, nn.Linear)] * len(runs) and runs


def test_a_module_that_draws_when_it_is_copied_draws_numbers_of_its_own() -> None:
    class Drawn(Block):
        def __deepcopy__(self, memo: Any) -> Any:
            twin = type(self)()
            twin.load_state_dict(self.state_dict(), strict=False)
            random.random(), np.random.rand()
            return twin

    model = nn.Sequential(Drawn())
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    eulernet.patch(model, 0.5, example_inputs=X)
    eulernet.diagnose(model, X)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


def test_a_generator_of_the_model_s_own_is_where_it_was() -> None:
    class Own(Block):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(2)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x) * torch.rand(8, generator=self.generator)

    model = nn.Sequential(Own())
    before = model[0].generator.get_state()  # type: ignore[union-attr, operator]
    eulernet.patch(model, 0.5, example_inputs=X)
    eulernet.diagnose(model, X)
    assert torch.equal(model[0].generator.get_state(), before)  # type: ignore[union-attr, operator]
