"""Additions in functions that no name leads to: what happens to them after the patch."""

import copy
import functools
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import eulernet
from eulernet import EulernetError
from tests.helpers.trapped import build
from tests.traps.base import DIM, Trap, linear
from tests.traps.callees import (
    BoundMethodInAnAttribute,
    ClosureInAnAttribute,
    DecoratedFunction,
    FunctionInADict,
    InAttribute,
    MethodsInADict,
    PartialInAnAttribute,
    Processor,
    SharedProcessor,
    add,
    make_add,
)


class OtherProcessor(Processor):
    def __call__(self, block: Any, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * block.f(x) + x


def test_another_object_at_the_place_is_refused_in_words() -> None:
    """As diffusers' `set_processor`: the h would be lost."""
    model, inputs = build(SharedProcessor)
    eulernet.patch(model, 0.3, example_inputs=inputs)
    model.blocks[1].processor = OtherProcessor(1.0)
    with pytest.raises(eulernet.EulernetError, match=r"OtherProcessor.__call__ is called where Processor"):
        model(*inputs)
    eulernet.patch(model, h=eulernet.steps(model), example_inputs=inputs)
    x = inputs[0]
    x = (x + 0.3 * (0.5 * model.blocks[0].f(x))) / 2
    torch.testing.assert_close(model(*inputs), x + 0.3 * (0.5 * model.blocks[1].f(x)))
    model.blocks[1].processor = torch.add
    with pytest.raises(eulernet.EulernetError, match="something that is no function in Python is called where"):
        model(*inputs)


def test_another_function_of_the_same_source_is_taken() -> None:
    model, inputs = build(ClosureInAnAttribute)
    eulernet.patch(model, 0.3, example_inputs=inputs)
    model.fusion = make_add(2.0)
    torch.testing.assert_close(model(*inputs), inputs[0] + 0.3 * 2 * model.a(inputs[0]))


def test_functions_are_not_kept_alive() -> None:
    model, inputs = build(ClosureInAnAttribute)
    eulernet.patch(model, 0.3, example_inputs=inputs)
    model(*inputs)
    kept = weakref.ref(model.fusion)
    model.fusion = make_add(2.0)
    model(*inputs)
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("cls", [SharedProcessor, PartialInAnAttribute, DecoratedFunction, FunctionInADict])
def test_copies_and_pickles_have_an_h_of_their_own(cls: type[Trap]) -> None:
    model, inputs = build(cls)
    eulernet.patch(model, 0.3, example_inputs=inputs)
    expected = model(*inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(*inputs), expected)
        assert not torch.allclose(eulernet.set_h(other, 1.0)(*inputs), expected)
    assert torch.equal(model(*inputs), expected)


@pytest.mark.parametrize(
    "cls",
    [SharedProcessor, PartialInAnAttribute, ClosureInAnAttribute, BoundMethodInAnAttribute, DecoratedFunction],
)
def test_one_graph_over_all_changes_of_h(cls: type[Trap]) -> None:
    model, inputs = build(cls)
    eulernet.patch(model, 0.3, example_inputs=inputs)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for h in (0.3, 1.0, 0.7):
            eulernet.set_h(model, h)
            torch.testing.assert_close(compiled(*inputs), model(*inputs))
    assert counter.frame_count == 1


def test_fold_absorbs_what_is_added_elsewhere() -> None:
    model, inputs = build(SharedProcessor, torch.float64)
    eulernet.patch(model, [0.3, 0.6], example_inputs=inputs)
    expected = model(*inputs)
    eulernet.fold(model, example_inputs=inputs)
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-12, atol=1e-12)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x)


class Reduced(Block):
    """The function is called in C, by a function whose name is what the source calls."""

    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(add, (x, self.a(x)))


class Mapped(Block):
    def forward(self, x: Tensor) -> Tensor:
        return next(map(add, (x,), (self.a(x),)))


class Lambda(Block):
    def __init__(self) -> None:
        super().__init__()
        self.add = lambda x, f: x + f

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.a(x))


@pytest.mark.parametrize("cls", [Reduced, Mapped, Lambda])
def test_what_is_called_in_between_is_scaled_or_named(cls: type[Block]) -> None:
    model, x = nn.Sequential(Block(), cls()), torch.randn(2, DIM)
    found = eulernet.find_steps(model, example_inputs=x)
    before = model(x)
    if len(found) == 2:
        eulernet.patch(model, 0.3, example_inputs=x)
        y = x + 0.3 * model[0].a(x)
        torch.testing.assert_close(model(x), y + 0.3 * model[1].a(y))
    else:
        (line,) = found.unsupported
        assert line.startswith("1 (") and ("in between" in line or "lambda" in line or "by name" in line)
        with pytest.warns(eulernet.EulernetWarning, match="not scaled"):
            eulernet.patch(model, 0.3, example_inputs=x)
    eulernet.unpatch(model)
    assert torch.equal(model(x), before)
    assert not any("_euler" in name for module in model.modules() for name in vars(module))


class Summing:
    def __call__(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch


class SummingBySuper(Summing):
    def __call__(self, x: Tensor, branch: Tensor) -> Tensor:
        return super().__call__(x, branch)


class BySuper(Block):
    def __init__(self) -> None:
        super().__init__()
        self.sums = [SummingBySuper()]

    def forward(self, x: Tensor) -> Tensor:
        return self.sums[0](x, self.a(x))


def test_a_callee_that_calls_super_finds_it() -> None:
    """Its rewritten function has a first parameter of its own, which `super()` is not to take for the object."""
    model, x = nn.Sequential(BySuper(), BySuper()), torch.randn(2, DIM)
    eulernet.patch(model, 0.3, example_inputs=x)
    y = x + 0.3 * model[0].a(x)
    torch.testing.assert_close(model(x), y + 0.3 * model[1].a(y))


def test_the_owners_function_is_left_as_it_was() -> None:
    before = dict(vars(add)), add.__code__
    model = InAttribute()
    eulernet.patch(model, 0.3, example_inputs=torch.randn(2, DIM))
    assert (dict(vars(add)), add.__code__) == before and model.fusion is add


@pytest.mark.parametrize("chosen", [0, 1])
def test_of_several_functions_called_at_one_place_one_may_be_chosen(chosen: int) -> None:
    model, (x,) = build(MethodsInADict)
    original = copy.deepcopy(model)
    eulernet.patch(model, 0.3, example_inputs=x, include=f"<root>:{chosen}")
    h = [0.3 if i == chosen else 1.0 for i in range(2)]
    torch.testing.assert_close(model(x), original.reference(x, h=h))
    model.ways["third"] = lambda x: x
    with pytest.raises(EulernetError, match="<lambda> is called where MethodsInADict"):
        model(x)
