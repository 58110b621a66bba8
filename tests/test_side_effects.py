"""Looking at a model and patching it change nothing else: no value, no cache, no random number, no flag."""

import copy
import functools
import gc
import random
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

import eulernet
from eulernet import EulernetError
from tests.helpers.trapped import build, every_trap
from tests.traps import Trap
from tests.traps.base import DIM, Block
from tests.traps.branches import EncoderPostNorm
from tests.traps.classes import make_class
from tests.traps.steps import Stage

# Long steps are left alone here, of which patch warns (test_traps.py).
pytestmark = pytest.mark.filterwarnings("ignore:the stream from the model:eulernet.EulernetWarning")

TABLES: dict[int, Tensor] = {}
HISTORY: list[tuple[int, ...]] = []


@functools.lru_cache(maxsize=8)
def positions(length: int) -> Tensor:
    """A cache of the process, as rt_detr, maskformer and dinov3_vit have one."""
    return torch.arange(length, dtype=torch.float32).unsqueeze(1).expand(length, 6).clone()


@functools.cache
def pair(length: int) -> tuple[Tensor, list[Tensor]]:
    """The tensors are inside of what is cached."""
    return torch.ones(length, 6), [torch.ones(6)]


def table(length: int) -> Tensor:
    """A dictionary of the module that fills while the model runs."""
    if length not in TABLES:
        TABLES[length] = torch.full((length, 6), 0.5)
    return TABLES[length]


class Caching(nn.Module):
    """Caches of its own, of its class, of the module and of the process, counters, random numbers of all kinds."""

    shared: ClassVar[Tensor | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.bias = nn.Parameter(torch.randn(5))
        self.bias_cache: dict[str, Tensor] = {}
        self.last: Tensor | None = None
        self.lengths: list[int] = []
        self.calls = 0

    def attention_bias(self, x: Tensor) -> Tensor:
        """Levit's, efficientformer's, tiny_vit's: filled in evaluation, emptied by ``train``."""
        if self.training:
            return self.bias.outer(self.bias)
        key = str(x.device)
        if key not in self.bias_cache:
            self.bias_cache[key] = self.bias.outer(self.bias)
        return self.bias_cache[key]

    def train(self, mode: bool = True) -> "Caching":
        super().train(mode)
        if mode and self.bias_cache:
            self.bias_cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.lengths.append(x.shape[1])
        y = x + positions(x.shape[1]) + table(x.shape[1]) + pair(x.shape[1])[0] + pair(x.shape[1])[1][0]
        y = self.attention_bias(x) @ y * (1 + 0 * random.random() + 0 * float(np.random.rand()))
        y = self.norm(y.mT).mT + 0 * torch.rand(1)
        x = x + self.drop(self.a(y + x))
        self.last = x.detach()
        if Caching.shared is None:
            Caching.shared = torch.ones(6)
        return x * Caching.shared


X = torch.linspace(-1, 1, 60).view(2, 5, 6)


@pytest.fixture(autouse=True)
def _empty_caches() -> None:
    positions.cache_clear()
    pair.cache_clear()
    TABLES.clear()
    Caching.shared = None


def patch(model: nn.Module, inputs: Any) -> None:
    eulernet.patch(model, 0.3, example_inputs=inputs)


def find(model: nn.Module, inputs: Any) -> None:
    eulernet.find_steps(model, example_inputs=inputs)


both = pytest.mark.parametrize("look", [find, patch])


def values(model: nn.Module) -> list[tuple[str, int, int, Tensor]]:
    """Every parameter and buffer: which object it is, how often it was written, and its value."""
    return [
        (name, id(value), value._version, value.detach().clone())
        for name, value in (*model.named_parameters(), *model.named_buffers())
    ]


def assert_same_values(model: nn.Module, before: list[tuple[str, int, int, Tensor]]) -> None:
    for actual, expected in zip(values(model), before, strict=True):
        assert actual[:3] == expected[:3]
        assert torch.equal(actual[3], expected[3])


def random_states() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return torch.get_rng_state().tolist(), random.getstate(), kind, keys.tolist(), rest


def fakes() -> list[FakeTensor]:
    gc.collect()
    return [x for x in gc.get_objects() if issubclass(type(x), FakeTensor)]


# ------------------------------------------------------------------------------------------------ parameters, buffers


@both
@every_trap
def test_parameters_and_buffers_stay(cls: type[Trap], look: Callable[..., None]) -> None:
    model, inputs = build(cls, training=True)
    before, given = values(model), [x.clone() for x in inputs]
    look(model, inputs)
    assert_same_values(model, before)
    assert all(torch.equal(x, y) and x._version == 0 for x, y in zip(inputs, given, strict=True))


@both
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.filterwarnings("ignore:Stage seems to be trained")
def test_batch_norm_statistics_stay(look: Callable[..., None], training: bool) -> None:
    model, inputs = build(Stage, training=training)
    model(*inputs)
    before = values(model)
    look(model, inputs)
    assert_same_values(model, before)


@both
def test_gradients_and_requires_grad_stay(look: Callable[..., None]) -> None:
    model, inputs = build(Stage)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    model(*inputs).sum().backward()
    before = [(p.requires_grad, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    x = inputs[0].requires_grad_()
    look(model, x)
    for parameter, (requires_grad, grad, value) in zip(model.parameters(), before, strict=True):
        assert parameter.requires_grad is requires_grad and parameter.grad is grad
        assert grad is None or torch.equal(grad, value)
    assert x.grad is None and x.is_leaf and x.requires_grad


@both
def test_tied_parameters_stay_tied(look: Callable[..., None]) -> None:
    model = nn.Sequential(Block(), Block())
    model[1].a.weight = model[0].a.weight
    look(model, torch.randn(2, 5, DIM))
    assert model[1].a.weight is model[0].a.weight


# --------------------------------------------------------------------------------------------------- flags and hooks


@both
@pytest.mark.parametrize("flags", ["eval", "train", "mixed"])
def test_training_flags_stay(look: Callable[..., None], flags: str) -> None:
    model, inputs = build(Stage)
    model.train(flags == "train")
    if flags == "mixed":  # a frozen batch norm in a model that is being trained
        for i, module in enumerate(model.modules()):
            module.training = i % 3 == 0
    before = [module.training for module in model.modules()]
    look(model, inputs)
    assert [module.training for module in model.modules()] == before


@both
def test_train_is_not_called_on_the_model(look: Callable[..., None]) -> None:
    class Watched(Block):
        switches = 0

        def train(self, mode: bool = True) -> "Watched":
            vars(self).update(switches=self.switches + 1)
            return super().train(mode)

    model = Watched()
    look(model, torch.randn(2, 5, DIM))
    assert model.switches == 0


@both
def test_hooks_stay_and_do_not_run(look: Callable[..., None]) -> None:
    model, inputs = build(Stage, training=True)
    seen: list[str] = []
    block = model.blocks[0]
    block.register_forward_pre_hook(lambda *args: seen.append("pre"))
    block.register_forward_hook(lambda *args: seen.append("post"))
    block.register_full_backward_pre_hook(lambda *args: seen.append("backward"))
    block.register_state_dict_pre_hook(lambda *args: seen.append("state_dict"))
    next(model.parameters()).register_hook(lambda grad: seen.append("grad"))
    everywhere = nn.modules.module.register_module_forward_hook(lambda *args: seen.append("global"))
    names = [name for name in vars(block) if "hooks" in name]
    before = [{name: dict(vars(module)[name]) for name in names} for module in model.modules()]
    try:
        look(model, inputs)
    finally:
        everywhere.remove()
    assert [{name: dict(vars(module)[name]) for name in names} for module in model.modules()] == before
    assert seen == []


@both
def test_grad_mode_and_default_settings_stay(look: Callable[..., None]) -> None:
    model, inputs = build(EncoderPostNorm)

    def settings() -> tuple[Any, ...]:
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch.is_autocast_enabled("cpu"),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
            len(torch.overrides._get_current_function_mode_stack()),
            torch.utils._python_dispatch._get_current_dispatch_mode(),
        )

    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode(), torch.autocast("cpu")):
        with context:
            before = settings()
            look(model, inputs)
            assert settings() == before
        eulernet.unpatch(model)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_model_patched_without_grad_can_be_trained(context: Any) -> None:
    model, inputs = build(Stage, training=True)
    with context():
        eulernet.patch(model, 0.3, example_inputs=inputs)
    model(*inputs).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    eulernet.set_h(model, 0.4)


# ------------------------------------------------------------------------------------------------------ random numbers


@both
@pytest.mark.parametrize("real", [False, True], ids=["fake", "real"])
def test_random_numbers_stay(look: Callable[..., None], real: bool) -> None:
    class LooksAtValues(Caching):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum().item() < 1e9 else x

    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    model = LooksAtValues() if real else Caching()
    before = random_states()
    look(model, X)
    assert random_states() == before


def test_the_random_generators_of_a_model_stay() -> None:
    class Own(Block):
        def __init__(self) -> None:
            super().__init__()
            self.rng = np.random.default_rng(0)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * (1 + 0 * self.rng.random()))

    model = Own()
    before = model.rng.bit_generator.state
    patch(model, torch.randn(2, 5, DIM))
    assert model.rng.bit_generator.state == before


# -------------------------------------------------------------------------------------------------------------- caches


@both
def test_the_models_own_caches_and_counters_stay(look: Callable[..., None]) -> None:
    model = Caching().eval()
    look(model, X)
    assert model.bias_cache == {} and model.last is None and model.lengths == [] and model.calls == 0
    model(X)
    cached, last = model.bias_cache["cpu"], model.last
    look(model, X)
    assert model.bias_cache.keys() == {"cpu"} and model.bias_cache["cpu"] is cached and model.last is last
    assert model.lengths == [5] and model.calls == 1


@both
@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
def test_caches_of_the_process_keep_no_fake_tensors(look: Callable[..., None], filled: bool) -> None:
    model = Caching().eval()
    expected = None
    if filled:
        expected = model(X)
        real = positions(5), TABLES[5], pair(5), Caching.shared
    look(model, X)
    shared = [] if Caching.shared is None else [Caching.shared]
    for cached in (positions(5), table(5), *tree_leaves(pair(5)), *shared):
        assert type(cached) is Tensor
        cached.sum().item()  # a fake tensor has no value
    if filled:
        assert positions(5) is real[0] and TABLES[5] is real[1] and pair(5)[0] is real[2][0]
        assert Caching.shared is real[3]
    eulernet.unpatch(model)
    output = model(X)
    assert type(output) is Tensor and output.isfinite().all()
    assert expected is None or torch.equal(output, expected)


class Slotted:
    __slots__ = ("mask",)


class Kept:
    """A cache of a class, made by the model, or there before."""

    mask: ClassVar[Tensor | None] = None
    length: ClassVar[int] = 0


class Rope(nn.Module):
    """Shared by all blocks and held by none."""

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor | None = None


OUTSIDE: dict[str, Any] = {
    "object": types.SimpleNamespace(mask=None, length=0), "slots": Slotted(), "class": Kept, "module": Rope(),
    "within an object": types.SimpleNamespace(cache=types.SimpleNamespace(mask=None, length=0)),
}  # fmt: skip
DICTS: dict[str, Any] = {
    "dict": {}, "ordered": OrderedDict(), "default": defaultdict(lambda: torch.ones(5, 5).tril()), "entry": {},
}  # fmt: skip
_global_mask = None
_global_length = 0


def remembering() -> Callable[[int], Tensor]:
    mask, kept = None, 0

    def get(length: int) -> Tensor:
        nonlocal mask, kept
        if kept != length:
            mask, kept = torch.ones(length, length).tril(), length
        assert mask is not None
        return mask

    return get


CLOSURE = remembering()


def in_an_object(where: str, length: int) -> Tensor:
    holder: Any = OUTSIDE[where]
    holder = getattr(holder, "cache", holder)
    if getattr(holder, "length", None) != length or holder.mask is None:
        holder.mask = torch.ones(length, length).tril()
        if where != "slots":
            holder.length = length
    return holder.mask  # type: ignore[no-any-return]


def in_a_dict(where: str, length: int) -> Tensor:
    if where == "default":
        return DICTS[where][length]  # type: ignore[no-any-return]
    if length not in DICTS[where]:
        mask = torch.ones(length, length).tril()
        DICTS[where][length] = types.SimpleNamespace(mask=mask) if where == "entry" else mask
    found = DICTS[where][length]
    return found.mask if where == "entry" else found  # type: ignore[no-any-return]


def in_a_global(where: str, length: int) -> Tensor:
    global _global_mask, _global_length
    if _global_length != length:
        _global_mask, _global_length = torch.ones(length, length).tril(), length
    assert _global_mask is not None
    return _global_mask


@both
@pytest.mark.parametrize("where", [*OUTSIDE, *DICTS, "closure", "global"])
def test_a_cache_outside_of_the_model_holds_what_it_held(look: Callable[..., None], where: str) -> None:
    """It forgets the length of a mask together with the mask."""
    if where == "slots":
        OUTSIDE[where].mask = None
    mask = in_an_object if where in OUTSIDE else in_a_dict if where in DICTS else in_a_global

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + (CLOSURE(5) if where == "closure" else mask(where, 5)) @ self.a(x)

    model = nn.Sequential(nn.Linear(6, 6), Masked())
    look(model, X)
    eulernet.unpatch(model)
    for _ in range(2):
        output = model(X)
        assert type(output) is Tensor and output.isfinite().all()


def reached_by_a_weak_reference() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Counting(), Counting()])
            self.order = [weakref.ref(block) for block in self.blocks]

        def forward(self, x: Tensor) -> Tensor:
            for block in self.order:
                x = block()(x)  # type: ignore[misc]
            return x

    return Net()


def reached_by_a_closure() -> nn.Module:
    first, second = Counting(), Counting()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([first, second])

        def forward(self, x: Tensor, last: nn.Module = second) -> Tensor:
            return last(first(x))  # type: ignore[no-any-return]

    return Net()


class Counting(nn.Module):
    """Counts its calls and moves a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.calls = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.GELU()), 0
        self.register_buffer("moved", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.moved.mul_(0.9)
        return x + self.f(x)  # type: ignore[no-any-return]

    def step(self, x: Tensor) -> Tensor:
        self.moved.mul_(0.9)
        return x + self.f(x)  # type: ignore[no-any-return]


@both
@pytest.mark.parametrize("build", [reached_by_a_weak_reference, reached_by_a_closure])
def test_modules_that_the_copy_reaches_past_itself_do_not_run(look: Callable[..., None], build: Any) -> None:
    model = build()
    before = values(model)
    look(model, X[0])
    assert_same_values(model, before)
    assert [block.calls for block in model.blocks] == [0, 0]
    if look is patch:
        expected = X[0]
        for block in model.eval().blocks:
            expected = expected + 0.3 * block.f(expected)
        torch.testing.assert_close(model(X[0]), expected)


MOVED = torch.ones(6)


class PastTheCopy(nn.Module):
    """Calls a method of a module that a closure holds, and writes into a tensor of the process."""

    def __init__(self, first: Counting, looks: bool) -> None:
        super().__init__()
        self.block, self.a, self.looks = first, nn.Linear(6, 6), looks
        self.step = lambda x: type(self).reached.step(x)
        type(self).reached = first

    reached: ClassVar[Any]

    def forward(self, x: Tensor) -> Tensor:
        MOVED.mul_(0.5)
        if self.looks and x.sum() > 1e9:
            return x
        return x + self.a(type(self).reached.step(x))  # type: ignore[no-any-return]


@both
def test_nothing_is_written_past_the_copy(look: Callable[..., None]) -> None:
    model = PastTheCopy(Counting(), looks=False)
    before = copy.deepcopy(model.state_dict())
    look(model, X[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(MOVED, torch.ones(6))


def test_with_values_what_would_write_past_the_copy_is_refused() -> None:
    model = PastTheCopy(Counting(), looks=True)
    before = values(model)
    with pytest.raises(EulernetError, match="moved of Counting would be written into: a copy of the model is run"):
        patch(model, X[0])
    assert_same_values(model, before)
    MOVED.fill_(1)  # a tensor that is no part of the model


@pytest.mark.parametrize("measure", [eulernet.diagnose, lambda model, x: eulernet.calibrate(model, x, target=2.0)])
@pytest.mark.parametrize("build", [reached_by_a_weak_reference, reached_by_a_closure])
def test_measuring_leaves_the_modules_that_are_reached_past_the_copy(measure: Any, build: Any) -> None:
    model = build()
    before = values(model)
    measure(model, X[0])
    assert_same_values(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())


class AsksForTheClass(nn.Module):
    """A patched block is of a subclass, and goes another way here."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers, self.how = nn.ModuleList([Counting(), nn.Linear(6, 6)]), how

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.how == "number":
                x = layer(x) * (1.5 if type(layer) is Counting else 1)
            elif self.how == "difference":
                x = layer(x) if type(layer) is Counting else layer(x) - 1
            elif self.how == "table":
                x = {Counting: layer, nn.Linear: lambda x, f=layer: f(x).tanh()}[type(layer)](x)
            else:
                same = isinstance(layer, Counting) if self.how == "isinstance" else type(layer) is Counting
                x = layer(x) if same else layer(x).tanh()
        return x


@pytest.mark.parametrize("how", ["type", "number", "difference", "table", "isinstance"])
def test_a_model_that_asks_for_the_class_of_a_block_is_refused(how: str) -> None:
    model = AsksForTheClass(how).eval()
    expected = model(X[0])
    if how == "isinstance":
        eulernet.patch(model, 1.0, example_inputs=X[0])
    else:
        says = {
            "table": "fails once it is patched: KeyError",
            "type": r"something else once it is patched \(more tanh",
            "number": r"something else once it is patched \(more mul 1 and fewer mul 1\.5",
            "difference": r"something else once it is patched \(more sub 1",
        }
        with pytest.raises(EulernetError, match=says[how]):
            eulernet.patch(model, 1.0, example_inputs=X[0])
    model.layers[0].moved.fill_(1)  # type: ignore[operator, union-attr]
    assert torch.equal(model(X[0]), expected)


class CachedMethod(nn.Module):
    """What was computed is kept by the module that computed it, as in transformers' xcodec."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    @functools.lru_cache  # noqa: B019
    def length(self, n: int) -> int:
        return 2 * n

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x[:, : self.length(3)])


@both
def test_the_cache_of_a_method_keeps_no_copy_of_the_model(look: Callable[..., None]) -> None:
    model = CachedMethod()
    look(model, torch.randn(5, 6))
    gc.collect()
    assert [m for m in gc.get_objects() if issubclass(type(m), CachedMethod)] == [model]


@both
def test_a_list_of_the_module_keeps_no_fake_tensors(look: Callable[..., None]) -> None:
    """A list that the model writes into cannot be told from one that it reads: no fake may stay in it."""
    seen: list[Tensor] = []

    class Writing(Block):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            seen.append(out)
            return out

    look(Writing(), torch.randn(2, 5, DIM))
    assert not any(isinstance(x, FakeTensor) for x in seen)


@both
@every_trap
def test_the_model_gives_real_tensors_afterwards(cls: type[Trap], look: Callable[..., None]) -> None:
    model, inputs = build(cls)
    look(model, inputs)
    for value in (*model.parameters(), *model.buffers(), *tree_leaves(model(*inputs)), *inputs):
        assert not isinstance(value, FakeTensor)
    assert all(type(x) is Tensor for x in tree_leaves(model(*inputs)))


@both
def test_nothing_of_the_trace_is_kept_alive(look: Callable[..., None]) -> None:
    """No copy of the model and no fake tensor outlives the call."""

    class Marked(Block):
        alive: ClassVar["weakref.WeakSet[Marked]"] = weakref.WeakSet()

        def __init__(self) -> None:
            super().__init__()
            Marked.alive.add(self)

        def __deepcopy__(self, memo: dict[int, Any]) -> "Marked":
            other = Marked.__new__(type(self))
            memo[id(self)] = other
            other.__dict__.update(copy.deepcopy(self.__dict__, memo))
            Marked.alive.add(other)
            return other

    before = len(fakes())
    model = Marked()
    look(model, torch.randn(2, 5, DIM))
    gc.collect()
    assert len(Marked.alive) == 1
    assert len(fakes()) == before


def test_classes_of_patched_models_are_collected() -> None:
    """Patching and dropping many models of local classes does not grow the process."""

    def once() -> "weakref.ref[type]":
        block = make_class(2.0)()
        patch(block, torch.randn(2, 5, DIM))
        return weakref.ref(type(block))

    references = [once() for _ in range(3)]
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_a_failing_model_leaves_nothing_behind() -> None:
    """The flags, the random numbers and the caches after a forward that raises in the middle."""

    class Failing(Caching):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("half-way")

    model = Failing().train()
    before, state = values(model), random_states()
    with pytest.raises(eulernet.EulernetError, match="half-way"):
        patch(model, X)
    assert_same_values(model, before)
    assert random_states() == state
    assert model.training and model.calls == 0
    assert type(positions(5)) is Tensor and type(table(5)) is Tensor
    assert torch.overrides._get_current_function_mode_stack() == []
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


# -------------------------------------------------------------------------------------------------------- large models


class LooksAtValues(nn.Module):
    """Which takes real tensors to trace."""

    runs: ClassVar[list[bool]] = []

    def __init__(self, alike: bool) -> None:
        super().__init__()
        self.a, self.alike = nn.Linear(6, 6), alike

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.sum().item() == 0:
            return x
        self.runs.append(self.training)
        return x + y if self.alike or self.training else y + x


@pytest.mark.parametrize(("alike", "runs"), [(True, [False, True, True]), (False, [False, True, False, True])])
def test_a_patch_runs_a_copy_three_times_where_both_modes_add_at_the_same_places(alike: bool, runs: list[bool]) -> None:
    """Each mode is traced; the patched copy is tried in each mode that adds at places of its own."""
    LooksAtValues.runs.clear()
    model = eulernet.patch(LooksAtValues(alike), 0.5, example_inputs=torch.ones(2, 6))
    assert LooksAtValues.runs == runs
    x = torch.randn(2, 6)
    for training in (False, True):
        torch.testing.assert_close(model.train(training)(x), x + 0.5 * model.a(x))


def test_a_large_model_on_meta_is_patched_without_allocating_it() -> None:
    """A GPT-2 as large as GPT-3 6.7B: 32 layers of two steps. An older Llama asks for autocast, unknown to meta."""
    transformers = pytest.importorskip("transformers")
    import resource

    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=4096, n_layer=32, n_head=32))
    assert sum(p.numel() for p in model.parameters()) > 6.5e9
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    inputs = {"input_ids": torch.zeros(1, 8, dtype=torch.long, device="meta")}
    eulernet.patch(model, 0.1, example_inputs=inputs)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    steps = eulernet.steps(model)
    assert len(steps) == 64 and {step.depth for step in steps} == {64} and {step.h for step in steps} == {0.1}
    assert all(p.is_meta for p in model.parameters())
    assert grown < 1024**2, "one of its 32 layers alone has 0.8 GB"


def test_a_model_on_meta_computes_once_it_has_values() -> None:
    with torch.device("meta"):
        model = Block()
    eulernet.patch(model, 0.3, example_inputs=torch.empty(2, 5, DIM, device="meta"))
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, DIM)
    torch.testing.assert_close(model(x), model.reference(x, 0.3))
