"""A copy of a model reaches the model by no way, and what the model holds outside of it is as it was."""

import functools
import queue
import weakref
from collections import UserDict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eulernet

DIM = 6
X = torch.linspace(-1, 1, 2 * DIM).view(2, DIM)


class Owner:
    """What leads to the parent, kept in an object."""

    def __init__(self, parent: nn.Module) -> None:
        self.parent = weakref.ref(parent)

    def __call__(self) -> Any:
        return self.parent()


def in_a_tuple(parent: nn.Module) -> Callable[[], Any]:
    held = (weakref.ref(parent),)
    return lambda: held[0]()


def in_a_set(parent: nn.Module) -> Callable[[], Any]:
    held = weakref.WeakSet([parent])
    return lambda: next(iter(held))


def by_a_method(parent: Any) -> Callable[[], Any]:
    held = weakref.WeakMethod(parent.itself)
    return lambda: held()()  # type: ignore[misc]


class Child(nn.Module):
    def __init__(self, parent: nn.Module, hold: Callable[[nn.Module], Callable[[], Any]]) -> None:
        super().__init__()
        self.f, self.parent = nn.Linear(DIM, DIM), hold(parent)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.parent().noted(x))  # type: ignore[no-any-return]


class Parent(nn.Module):
    """It counts its children's calls, which is a part of what it computes."""

    def __init__(self, hold: Callable[[nn.Module], Callable[[], Any]], looks: bool) -> None:
        super().__init__()
        self.count, self.looks = 0, looks
        self.register_buffer("mean", torch.zeros(DIM))
        self.child = Child(self, hold)

    def itself(self) -> nn.Module:
        return self

    def noted(self, x: Tensor) -> Tensor:
        self.count += 1
        self.mean.mul_(0.9)
        return x * (1 + self.count)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.looks and x.sum().item() > 1e9 else self.child(x)


@pytest.mark.parametrize("looks", [False, True], ids=["fake", "real"])
@pytest.mark.parametrize("hold", [Owner, weakref.ref, in_a_tuple, in_a_set, by_a_method])
def test_a_weak_reference_leads_to_the_copy_wherever_it_is_held(hold: Any, looks: bool) -> None:
    model = Parent(hold, looks)
    assert len(eulernet.find_steps(model, example_inputs=X)) == 1
    assert model.count == 0
    assert model.child.parent() is model


def cached_table() -> Callable[[int], Tensor]:
    table, length = torch.empty(0), 0

    def get(n: int) -> Tensor:
        nonlocal table, length
        if length != n:
            table, length = torch.ones(n, 1), n
        return table

    return get


class WithAFunction(nn.Module):
    def __init__(self, get: Callable[[int], Any]) -> None:
        super().__init__()
        self.f, self.get = nn.Linear(DIM, DIM), get

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x * self.get(len(x)))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [5, 8])
def test_variables_of_a_function_are_the_models_own(rows: int) -> None:
    get = cached_table()
    model = nn.Sequential(WithAFunction(get), WithAFunction(get))
    model(torch.ones(5, DIM))
    before = [cell.cell_contents for cell in get.__closure__ or ()]  # type: ignore[attr-defined]
    eulernet.patch(model, 0.3, example_inputs=torch.ones(rows, DIM))
    after = [cell.cell_contents for cell in get.__closure__ or ()]  # type: ignore[attr-defined]
    assert all(a is b for a, b in zip(after, before, strict=True))
    for n in (rows, 3):
        assert model(torch.ones(n, DIM)).shape == (n, DIM)


def counter(n: int) -> Callable[[int], int]:
    at = 0

    def following(_: int) -> int:
        nonlocal at
        at = (at + 1) % n
        return at + 1

    return following


def test_a_counter_of_a_function_stays_where_it_is() -> None:
    following = counter(7)
    eulernet.find_steps(nn.Sequential(WithAFunction(following), WithAFunction(following)), example_inputs=X)
    assert following(0) == 2


class Reader(nn.Module):
    """Two functions share a variable, which holds the state."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.f, self.read, self.write = nn.Linear(DIM, DIM), read, write

    def forward(self) -> None:
        x = self.read()
        self.write(x + self.f(x))


class Memory(nn.Module):
    def __init__(self, first: Tensor | None) -> None:
        super().__init__()
        state: Any = first

        def read() -> Any:
            return state

        def write(value: Tensor) -> None:
            nonlocal state
            state = value

        self.stem, self.read, self.write = nn.Linear(DIM, DIM), read, write
        self.blocks = nn.ModuleList([Reader(read, write), Reader(read, write)])

    def forward(self, x: Tensor) -> Any:
        self.write(self.stem(x))
        for block in self.blocks:
            block()
        return self.read()


@pytest.mark.parametrize("first", [None, X], ids=["nothing", "a tensor"])
def test_functions_that_share_a_variable_share_it_in_the_copy(first: Tensor | None) -> None:
    model = Memory(first)
    assert [step.depth for step in eulernet.find_steps(model, example_inputs=X)] == [2, 2]
    assert model.read() is first


# ---- outside of the model

PLACES: dict[str, Any] = {"deque": deque(maxlen=4), "set": set(), "queue": queue.Queue(), "dictionary": UserDict()}
TABLES: list[Any] = [None] * 12
BANK: list[Any] = []
STATISTICS: dict[str, Any] = {"mean": torch.zeros(DIM), "n": 0}
calls = 0


def put(where: str, value: Any) -> None:
    place = PLACES[where]
    match where:
        case "deque":
            place.append(value)
        case "set":
            place.add(value)
        case "queue":
            place.put(value)
        case "dictionary":
            place["value"] = value


def held(where: str) -> list[Any]:
    place = PLACES[where]
    return list(place.queue if where == "queue" else place.values() if where == "dictionary" else place)


class Outside(nn.Module):
    """It writes somewhere outside of itself each time that it runs."""

    ready = False

    def __init__(self, where: str, looks: bool = False) -> None:
        super().__init__()
        self.f, self.where, self.looks = nn.Linear(DIM, DIM), where, looks

    def forward(self, x: Tensor) -> Tensor:
        global calls
        mean = x.detach().mean(0)
        if self.looks and mean.sum().item() > 1e9:
            return x
        if self.where in PLACES:
            put(self.where, mean)
        elif self.where == "list":
            TABLES[5] = torch.full((DIM,), 5.0) if TABLES[5] is None else TABLES[5]
        elif self.where == "bank":
            BANK.append(mean)
            STATISTICS["mean"] = 0.9 * STATISTICS["mean"] + 0.1 * mean
            STATISTICS["n"] += 1
        elif not Outside.ready:
            Outside.ready = True
            calls += 1
        return x + self.f(x)


@pytest.mark.parametrize("where", PLACES)
def test_a_container_holds_no_fake_tensor(where: str) -> None:
    kept = torch.ones(DIM)
    put(where, kept)
    eulernet.find_steps(nn.Sequential(Outside(where), Outside(where)), example_inputs=X)
    assert [type(value) for value in held(where)] == [Tensor] and held(where)[0] is kept


def test_entries_of_a_list_stay_in_their_places() -> None:
    TABLES[7] = last = torch.ones(DIM)
    eulernet.find_steps(Outside("list"), example_inputs=X)
    assert TABLES[7] is last and [value is None for value in TABLES] == [n != 7 for n in range(12)]


def test_flags_and_counters_are_put_back() -> None:
    eulernet.patch(Outside("flag"), 0.3, example_inputs=X)
    assert (Outside.ready, calls) == (False, 0)


def test_what_a_run_with_values_left_is_put_back() -> None:
    model = nn.Sequential(Outside("bank", looks=True), Outside("bank", looks=True))
    model(X)
    bank, statistics = list(BANK), dict(STATISTICS)
    eulernet.find_steps(model, example_inputs=torch.ones(3, DIM))
    assert len(BANK) == len(bank) == 2 and all(a is b for a, b in zip(BANK, bank, strict=True))
    assert all(STATISTICS[key] is value for key, value in statistics.items())


# ---- functions that are no free functions


class Sum:
    def combine(self, x: Tensor, f: Tensor, other: Tensor | None = None) -> Tensor:
        return x + f

    @classmethod
    def of(cls, x: Tensor, f: Tensor) -> Tensor:
        return x + f


class Meta(type):
    def both(cls, x: Tensor, f: Tensor, other: Tensor | None = None) -> Tensor:
        return x + f


class Made(metaclass=Meta):
    pass


JOIN = Sum()


def without_a_trace(function: Callable[..., Any]) -> Callable[..., Any]:
    def inner(*args: Any) -> Any:
        return function(*args)

    return inner


@without_a_trace
def hidden(x: Tensor, f: Tensor) -> Tensor:
    return x + f


def named(x: Tensor, f: Tensor) -> Tensor:
    return x + f


renamed = functools.wraps(named)(without_a_trace(named))


class Joining(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.f, self.how = nn.Linear(DIM, DIM), how

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        if self.how == "an object's method":
            return JOIN.combine(x, self.f(x), c)
        if self.how == "a class method":
            return Sum.of(x, self.f(x))
        if self.how == "a method of a class's class":
            return Made.both(x, self.f(x), c)
        return hidden(x, self.f(x)) if self.how == "decorated" else renamed(x, self.f(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "how", ["an object's method", "a class method", "a method of a class's class", "decorated", "renamed"]
)
def test_what_adds_is_called_with_its_own_arguments(how: str) -> None:
    model, c = Joining(how), torch.ones_like(X)
    expected = X + 0.3 * model.f(X)
    eulernet.patch(model, 0.3, example_inputs=(X, c))
    torch.testing.assert_close(model(X, c), expected)
