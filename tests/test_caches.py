"""Caches outside of a model forget as a whole what the runs of its copies have left in them."""

import contextvars
import functools
import gc
import random
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eulernet
from eulernet import EulernetError

DIM = 6
X = torch.linspace(-1, 1, 2 * DIM).view(2, DIM)


def table(n: int) -> Tensor:
    return torch.arange(float(n)) / n


@functools.cache
def in_a_dictionary(n: int) -> dict[str, Tensor]:
    return {"table": table(n)}


@functools.lru_cache(maxsize=4)
def in_an_object(n: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(table=table(n))


class Store:
    length = 4
    table = table(4)


STORE, LENGTHS, TABLES = Store(), {"n": 4}, {"n": table(4)}
_length, _table = 4, table(4)
registry: Any = types.ModuleType("registry")
registry.length, registry.table = 0, None
local, variable = threading.local(), contextvars.ContextVar[Tensor | None]("variable", default=None)


def with_its_length(n: int) -> Tensor:
    """The length is written before any tensor is made."""
    if STORE.length < n:
        STORE.length = n
        STORE.table = table(n)
    return STORE.table


def with_the_length_elsewhere(n: int) -> Tensor:
    if LENGTHS["n"] < n:
        LENGTHS["n"] = n
        TABLES["n"] = table(n)
    return TABLES["n"]


def with_the_length_in_a_global(n: int) -> Tensor:
    global _length, _table
    if _length < n:
        _length = n
        _table = table(n)
    return _table


def in_a_module(n: int) -> Tensor:
    if registry.length < n:
        registry.length = n
        registry.table = table(n)
    return registry.table  # type: ignore[no-any-return]


def in_a_thread(n: int) -> Tensor:
    if not hasattr(local, "table"):
        local.table = table(n)
    return local.table  # type: ignore[no-any-return]


def in_a_context(n: int) -> Tensor:
    if variable.get() is None:
        variable.set(table(n))
    found = variable.get()
    assert found is not None
    return found


CACHES: dict[str, Callable[[int], Tensor]] = {
    "dictionary": lambda n: in_a_dictionary(n)["table"],
    "object": lambda n: in_an_object(n).table,  # type: ignore[no-any-return]
    **{
        cached.__name__: cached
        for cached in (
            with_its_length,
            with_the_length_elsewhere,
            with_the_length_in_a_global,
            in_a_module,
            in_a_thread,
            in_a_context,
        )
    },
}


class Cached(nn.Module):
    def __init__(self, cached: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.a, self.cached = nn.Linear(DIM, DIM), cached

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x * self.cached(DIM))


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_cache_is_as_before_and_the_patched_model_runs(name: str, frozen: bool) -> None:
    cached = CACHES[name]
    model = nn.Sequential(nn.Linear(DIM, DIM), Cached(cached))
    if frozen:
        gc.freeze()  # as servers do before they fork
    eulernet.find_steps(model, example_inputs=X)
    assert (STORE.length, len(STORE.table), LENGTHS, len(TABLES["n"])) == (4, 4, {"n": 4}, 4)
    assert (_length, len(_table), registry.length, registry.table) == (4, 4, 0, None)
    eulernet.patch(model, 0.3, example_inputs=X)
    state = model[0](X)
    torch.testing.assert_close(model(X), state + 0.3 * model[1].a(state * table(DIM)))
    for clear in (in_a_dictionary.cache_clear, in_an_object.cache_clear):
        clear()
    STORE.length, STORE.table, LENGTHS["n"], TABLES["n"] = 4, table(4), 4, table(4)
    globals().update(_length=4, _table=table(4))
    registry.length, registry.table = 0, None


def by_class(compute: Callable[[Any, int], Tensor]) -> Callable[[Any, int], Tensor]:
    cache: dict[Any, Tensor] = {}

    @functools.wraps(compute)
    def look_up(self: Any, n: int) -> Tensor:
        key = type(self), n
        if key not in cache:
            cache[key] = compute(self, n)
        return cache[key]

    return look_up


class OfItsClass(nn.Module):
    """A patched module is of another class, for which the table is made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(DIM, DIM)

    @by_class
    def table(self, n: int) -> Tensor:
        return table(n)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x * self.table(DIM))


def test_a_cache_by_class_is_filled_for_the_patched_class_too() -> None:
    model = eulernet.patch(OfItsClass(), 0.3, example_inputs=X)
    torch.testing.assert_close(model(X), X + 0.3 * model.a(X * table(DIM)))


class Instantiating(OrderedDict[str, Any]):
    """Makes a new object at each look, as transformers' table of activations does."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


ACTIVATIONS = Instantiating(relu=nn.ReLU, gelu=nn.GELU)


def test_a_table_that_makes_its_values_keeps_what_it_holds() -> None:
    def cached(n: int) -> Tensor:
        assert isinstance(ACTIVATIONS["relu"], nn.ReLU)
        return with_its_length(n)

    eulernet.find_steps(nn.Sequential(nn.Linear(DIM, DIM), Cached(cached)), example_inputs=X)
    assert list(OrderedDict.items(ACTIVATIONS)) == [("relu", nn.ReLU), ("gelu", nn.GELU)]


def tables() -> Iterator[Tensor]:
    kept = table(DIM)
    while True:
        yield kept


def test_a_generator_that_is_moved_on_is_said() -> None:
    source = tables()
    model = nn.Sequential(nn.Linear(DIM, DIM), Cached(lambda n: next(source)))
    with pytest.raises(EulernetError, match="the generator tables, which the model reads, was moved on"):
        eulernet.find_steps(model, example_inputs=X)


class Child(nn.Module):
    """Lets its parent, which it knows by a weak reference, prepare what it takes."""

    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.a, self.parent = nn.Linear(DIM, DIM), weakref.ref(parent)

    def forward(self, x: Tensor) -> Tensor:
        parent: Any = self.parent()
        parent.mean.mul_(0.9)
        return x + self.a(parent.prepared(x) - parent.norm.forward(x))  # type: ignore[no-any-return]


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM)
        self.calls, self.last = 0, None
        self.register_buffer("mean", torch.ones(DIM))
        self.child = Child(self)

    def prepared(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach()  # type: ignore[assignment]
        return 2 * x

    def forward(self, x: Tensor) -> Tensor:
        return self.child(self.first(x))  # type: ignore[no-any-return]


def test_a_weak_reference_of_the_copy_leads_to_the_copy() -> None:
    def measure(model: nn.Module) -> Any:
        return eulernet.diagnose(model, X)

    for look in (lambda m: eulernet.find_steps(m, example_inputs=X), measure):
        model = Parent()
        attributes, state = set(vars(model)), {k: v.clone() for k, v in model.state_dict().items()}
        look(model)
        assert set(vars(model)) == attributes and (model.calls, model.last) == (0, None)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    eulernet.patch(model, 0.3, example_inputs=X)
    state = model.eval().first(X)
    torch.testing.assert_close(model(X), state + 0.3 * model.child.a(2 * state - model.norm(state)))


def test_a_table_is_printed_without_a_random_number() -> None:
    steps = eulernet.find_steps(nn.Sequential(nn.Linear(DIM, DIM), Cached(table)), example_inputs=X)
    random.seed(0)
    expected = random.random()
    random.seed(0)
    assert "Cached" in str(steps)
    assert random.random() == expected


class MadeInEvalMode(nn.Module):
    """Attention biases that are looked up when the mode is set, as in LeViT."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bias = nn.Linear(DIM, DIM), nn.Parameter(torch.ones(3))
        self.register_buffer("index", torch.arange(DIM) % 3)

    @torch.no_grad()
    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        vars(self).pop("biases", None)
        if not mode:
            self.biases = self.bias[self.index]
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x + (self.bias[self.index] if self.training else self.biases))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("error")
def test_what_is_made_when_the_mode_is_set_is_not_out_of_sight(training: bool) -> None:
    model = nn.Sequential(nn.Linear(DIM, DIM), MadeInEvalMode()).train(training)
    assert len(eulernet.steps(eulernet.patch(model, 0.3, example_inputs=X))) == 1
