"""What cannot be patched is named, not lost."""

import copy
import functools
import operator
import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eulernet
from tests.helpers.trapped import build
from tests.traps import UNSUPPORTED, Trap
from tests.traps.base import DIM, Block, linear

# A model with a long step is patched here as any other; test_what_patch_warns_of asserts the warning.
pytestmark = pytest.mark.filterwarnings("ignore:the stream from the model:eulernet.EulernetWarning")


# --------------------------------------------------------------------------- what cannot be patched is named, not lost


@pytest.mark.parametrize("cls", UNSUPPORTED, ids=lambda cls: cls.__name__)
def test_what_cannot_be_rewritten_is_named_and_left_alone(cls: type[Trap]) -> None:
    model, inputs = build(cls)
    found = eulernet.find_steps(model, example_inputs=inputs)
    assert len(found) == 0
    (line,) = found.unsupported
    assert "<root>" in line and "unsupported.py" in line
    with pytest.raises(eulernet.EulernetError, match="<root>"):
        eulernet.patch(model, 0.3, example_inputs=inputs)
    assert type(model) is cls and not eulernet.is_patched(model)


class Coupled(nn.Module):
    """A reversible block: two streams, each changed by what is computed from the other."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = linear(), linear()

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a = a + self.f(b)
        b = b + self.g(a)
        return a, b


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Coupled() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        for block in self.blocks:
            a, b = block(a, b)
        return torch.cat((a, b), dim=-1)


def test_of_coupled_streams_the_half_that_is_not_scaled_is_named() -> None:
    model, x = Reversible(), torch.randn(2, 5, 2 * DIM)
    found = eulernet.find_steps(model, example_inputs=x)
    assert [step.name for step in found] == ["blocks.0", "blocks.1", "blocks.2"] and not found.long
    assert [line.split()[0] for line in found.unsupported] == ["blocks.1", "blocks.2", "blocks.0"]
    with pytest.warns(UserWarning, match=r"not scaled.*blocks\.\{0-2\}.*reversible network"):
        eulernet.patch(model, 0.3, example_inputs=x)


class UnequalHalves(Reversible):
    """Of five features and three."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.f, block.g = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.split((5, 3), dim=-1)
        for block in self.blocks:
            a, b = block(a, b)
        return torch.cat((a, b), dim=-1)


def test_of_unequal_halves_the_one_that_is_not_scaled_is_named_too() -> None:
    model, x = UnequalHalves(), torch.randn(2, 5, 8)
    found = eulernet.find_steps(model, example_inputs=x)
    assert [step.name for step in found] == ["blocks.0", "blocks.1", "blocks.2"] and not found.long
    assert sorted(line.split()[0] for line in found.unsupported) == ["blocks.0", "blocks.1", "blocks.2"]
    with pytest.warns(UserWarning, match=r"not scaled.*blocks\.\{0-2\}.*reversible network"):
        eulernet.patch(model, 0.3, example_inputs=x)


class Copied(nn.Module):
    """Streams that begin as copies, as those of RevNet and Reformer, changed in turn or at once."""

    def __init__(self, at_once: bool) -> None:
        super().__init__()
        self.at_once = at_once
        self.block, self.f, self.g = Block(), *(nn.ModuleList(linear() for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        a, b = (self.f[0](x), self.g[0](x)) if self.at_once else (x, x)
        for f, g in zip(self.f, self.g, strict=True):
            if self.at_once:
                a, b = a + f(torch.relu(b)), b + g(torch.relu(a))
            else:
                a = a + f(b)
                b = b + g(a)
        return torch.cat((a, b), dim=-1)


@pytest.mark.parametrize(("at_once", "steps", "named"), [(False, 3, 1), (True, 1, 1)])
def test_of_two_streams_that_begin_alike_no_sum_is_lost(at_once: bool, steps: int, named: int) -> None:
    model, x = Copied(at_once), torch.randn(2, 5, DIM)
    found = eulernet.find_steps(model, example_inputs=x)
    assert (len(found), len(found.unsupported)) == (steps, named) and not found.left_out
    with pytest.warns(UserWarning, match=r"not scaled.*reversible network"):
        eulernet.patch(model, 0.3, example_inputs=x)


class AtOnce(Copied):
    """Two streams from two inputs, mapped or not."""

    def __init__(self, stem: bool) -> None:
        super().__init__(at_once=True)
        self.stem = stem

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.stem:
            a, b = self.block(a), self.block.a(b)
        for f, g in zip(self.f, self.g, strict=True):
            a, b = a + f(b), b + g(a)
        return torch.cat((a, b), dim=-1)


@pytest.mark.parametrize(("stem", "steps"), [(True, 1), (False, 0)])
def test_two_streams_from_two_inputs_that_change_each_other_at_once_are_named(stem: bool, steps: int) -> None:
    found = eulernet.find_steps(AtOnce(stem), example_inputs=(torch.randn(2, 5, DIM), torch.randn(2, 5, DIM)))
    assert len(found) == steps and not found.left_out
    (line,) = found.unsupported
    assert "reversible network" in line


class ByParts(nn.Module):
    """The real and the imaginary part of a state are changed by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, z: Tensor) -> Tensor:
        size = z.abs()
        return torch.complex(z.real + self.a(size), z.imag + self.b(size))


def test_the_parts_of_a_complex_state_are_states() -> None:
    model, z = ByParts(), torch.randn(2, 5, DIM, dtype=torch.complex64)
    steps = eulernet.patch(model, [0.3, 0.4], example_inputs=z) and eulernet.steps(model)
    assert [(step.name, step.kind, step.h) for step in steps] == [
        ("<root>:0", "identity", 0.3),
        ("<root>:1", "identity", 0.4),
    ]
    expected = torch.complex(z.real + 0.3 * model.a(z.abs()), z.imag + 0.4 * model.b(z.abs()))
    torch.testing.assert_close(model(z), expected)


class Placed(nn.Module):
    """What a branch gives is added to some places of a copy, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.block = linear(), Block()

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y.index_put_((torch.tensor([0, 1]),), self.a(x[:2]), accumulate=True)
        return self.block(y)


def test_what_is_added_to_places_of_a_copy_is_named() -> None:
    model, x = Placed(), torch.randn(3, DIM)
    with pytest.warns(UserWarning, match=r"not scaled.*index_put adds"):
        eulernet.patch(model, 0.3, example_inputs=x)
    assert [step.name for step in eulernet.steps(model)] == ["block"]


def test_a_graph_of_fx_is_named_and_left_alone() -> None:
    """Its forward is written anew by `deepcopy`, `recompile` and, in torchvision's feature extractors, `train`."""
    model, x = torch.fx.symbolic_trace(Block()), torch.randn(2, 5, DIM)
    with pytest.raises(eulernet.EulernetError, match=r"<root>.*torch\.fx.*patch the model that it was made from"):
        eulernet.patch(model, 0.3, example_inputs=x)
    original = Block()
    again = torch.fx.symbolic_trace(eulernet.patch(original, 0.3, example_inputs=x))
    torch.testing.assert_close(copy.deepcopy(again)(x), original.reference(x, 0.3))


class OwnForward(nn.Module):
    """A block whose instance may get a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x)


def other_forward(self: Any, x: Tensor) -> Tensor:
    return x + 2 * self.a(x)


def own_bound(block: OwnForward) -> None:
    """A method bound to the instance, as kernel libraries do."""
    block.forward = types.MethodType(other_forward, block)


def own_partial(block: OwnForward) -> None:
    """A wrapper around the class's forward, as accelerate's hooks are."""
    old = block.forward

    def new_forward(module: OwnForward, *args: Any, **kwargs: Any) -> Tensor:
        return 3 * old(*args, **kwargs)

    block.forward = functools.update_wrapper(functools.partial(new_forward, block), old)


def own_closure(block: OwnForward) -> None:
    """A function without a first argument for the module."""
    a = block.a
    block.forward = lambda x: x + a(x)


@pytest.mark.parametrize("own", [own_bound, own_partial, own_closure])
def test_an_own_forward_is_handled_or_refused(own: Any) -> None:
    """The instance's forward hides the class's: a patch of the class alone would do nothing at all."""
    model = nn.Sequential(OwnForward(), OwnForward())
    own(model[0])
    x = torch.randn(2, 6)
    before, state = model(x), vars(model[0]).copy()
    expected = {
        own_bound: lambda x: x + 0.3 * (2 * model[0].a(x)),
        own_partial: lambda x: 3 * (x + 0.3 * model[0].a(x)),
        own_closure: lambda x: x + 0.3 * model[0].a(x),
    }[own](x)
    names = [step.name for step in eulernet.find_steps(model, example_inputs=x)]
    if names == ["1"]:
        assert any("0" in line for line in eulernet.find_steps(model, example_inputs=x).unsupported)
        with pytest.warns(eulernet.EulernetWarning, match="forward"):
            eulernet.patch(model, 0.3, example_inputs=x)
        expected = model[0](x)
    else:
        assert names == ["0", "1"]
        eulernet.patch(model, 0.3, example_inputs=x)
    torch.testing.assert_close(model(x), expected + 0.3 * model[1].a(expected))
    eulernet.unpatch(model)
    assert torch.equal(model(x), before)
    assert vars(model[0]).keys() == state.keys() and vars(model[0])["forward"] is state["forward"]


def scripted_sum(x: Tensor, f: Tensor) -> Tensor:
    return x + torch.dropout(f, 0.0, False)


class Beside(nn.Module):
    """A plain step, and after it one that is written in a way that cannot be rewritten."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.block, self.a, self.form = OwnForward(), nn.Linear(6, 6, bias=False), form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, self.block(x))


def by_sum(model: Beside, x: Tensor) -> Tensor:
    return sum((x, model.a(x)))  # type: ignore[return-value]


def by_map(model: Beside, x: Tensor) -> Tensor:
    return next(map(operator.add, (x,), (model.a(x),)))


def by_addmm(model: Beside, x: Tensor) -> Tensor:
    return torch.addmm(x, model.a(x), model.a.weight.mT)


def by_product(model: Beside, x: Tensor) -> Tensor:
    """The map is the product itself, as in graph networks that hold their weight as a parameter."""
    return torch.addmm(x, x, model.a.weight.mT)


def by_product_from_the_left(model: Beside, x: Tensor) -> Tensor:
    return torch.addmm(x, model.a.weight[: len(x), : len(x)], x)


def by_batched_product(model: Beside, x: Tensor) -> Tensor:
    return torch.addbmm(x, x[None], model.a.weight.mT[None])


def by_part_of_a_product(model: Beside, x: Tensor) -> Tensor:
    """GCNII: (1 - beta) x + beta x W."""
    return torch.addmm(x, x, model.a.weight.mT, beta=0.8, alpha=0.2)


def by_index_add(model: Beside, x: Tensor) -> Tensor:
    return torch.index_add(x, 0, torch.arange(len(x)), model.a(x))


def by_outer_product(model: Beside, x: Tensor) -> Tensor:
    return torch.addr(x, model.a(x).mean(1), model.a(x).mean(0))


def by_sparse_product(model: Beside, x: Tensor) -> Tensor:
    return torch.sparse.addmm(x, torch.eye(len(x)).to_sparse(), model.a(x))


def by_bias(model: Beside, x: Tensor) -> Tensor:
    return nn.functional.linear(x.relu(), model.a.weight, x)


def by_scatter(model: Beside, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises scatter_reduce
        return x.scatter(0, torch.arange(len(x))[:, None].expand_as(x), model.a(x), reduce="add")


def by_put(model: Beside, x: Tensor) -> Tensor:
    return x.put(torch.arange(x.numel()).view_as(x), model.a(x), accumulate=True)


def by_running_sum(model: Beside, x: Tensor) -> Tensor:
    return torch.stack((x, model.a(x))).cumsum(0)[-1]


def by_running_difference(model: Beside, x: Tensor) -> Tensor:
    return -torch.stack((x, model.a(x))).diff(dim=0)[0]


def by_lists(model: Beside, x: Tensor) -> Tensor:
    return torch._foreach_add([x], [model.a(x)])[0]


def by_lists_in_place(model: Beside, x: Tensor) -> Tensor:
    branch, x = model.a(x), x.clone()
    torch._foreach_sub_([x], [branch])
    return x


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _scripted_sum = torch.jit.script(scripted_sum)


def by_script(model: Beside, x: Tensor) -> Tensor:
    return _scripted_sum(x, model.a(x))


PRODUCTS = [by_product, by_product_from_the_left, by_batched_product, by_outer_product, by_sparse_product, by_bias]
INTO_PLACES = [by_index_add, by_scatter, by_put]
SEVERAL = [by_running_sum, by_running_difference, by_lists, by_lists_in_place]
FORMS = [by_sum, by_map, by_addmm, *PRODUCTS, by_part_of_a_product, *INTO_PLACES, *SEVERAL, by_script]


@pytest.mark.parametrize("form", FORMS)
def test_a_step_that_cannot_be_rewritten_is_named(form: Any) -> None:
    """It is patched right or it is named: it is never skipped silently."""
    model, x = Beside(form), torch.randn(4, 6)
    found = eulernet.find_steps(model, example_inputs=x)
    before = model(x)
    y = x + 0.3 * model.block.a(x)
    if [step.name for step in found] == ["block"]:
        assert any("<root>" in line for line in found.unsupported)
        with pytest.warns(eulernet.EulernetWarning, match="<root>"):
            eulernet.patch(model, 0.3, example_inputs=x)
        torch.testing.assert_close(model(x), form(model, y))
    else:
        assert [step.name for step in found] == ["block", "<root>"]
        eulernet.patch(model, 0.3, example_inputs=x)
        torch.testing.assert_close(model(x), y + 0.3 * (form(model, y) - y))
    eulernet.unpatch(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("form", PRODUCTS)
def test_a_product_that_is_added_to_its_operand_is_a_step(form: Any) -> None:
    found = eulernet.find_steps(Beside(form), example_inputs=torch.randn(4, 6))
    assert [(step.name, step.kind) for step in found] == [("block", "identity"), ("<root>", "identity")]


def test_a_sum_over_another_axis_of_a_stack_is_no_step() -> None:
    """Over the samples, of which there are two: the shape is that of the state."""
    model = Beside(lambda model, x: torch.stack((x, model.a(x))).sum(1))
    found = eulernet.find_steps(model, example_inputs=torch.randn(2, 6))
    assert [step.name for step in found] == ["block"]
    assert any("<root>" in line for line in found.unsupported)


def test_a_hook_that_adds_and_is_not_run_is_named() -> None:
    kept: list[Tensor] = []
    layers = nn.Sequential(Block(), linear(), linear(), Block())
    layers[1].register_forward_hook(lambda module, args, output: args[0] + output)
    layers[2].register_forward_hook(lambda module, args, output: kept.append(output))
    layers[3].register_forward_hook(lambda module, args, output: None)
    with pytest.warns(eulernet.EulernetWarning, match="^1: forward hooks that return a value were not run"):
        eulernet.patch(layers, 0.5, example_inputs=torch.randn(2, 5, DIM))
    assert [step.name for step in eulernet.steps(layers)] == ["0", "3"] and not kept


class Skewed(nn.Module):
    """DINOv2: in training the branch goes to a part of the batch and is added by ``index_add``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            part = torch.arange(len(x) // 2)
            return torch.index_add(x, 0, part, self.a(x[part]), alpha=2.0)
        return x + self.a(x)


def test_a_step_that_is_added_otherwise_in_training_is_one_step() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Skewed(), OwnForward()), torch.randn(4, 6)
    eulernet.patch(model, 0.5, example_inputs=x)
    assert [step.name for step in eulernet.steps(model)] == ["0", "1"]
    branch = model[0].a(x[:2])
    torch.testing.assert_close(model[0].train()(x), torch.cat((x[:2] + 0.5 * 2 * branch, x[2:])))
    torch.testing.assert_close(model[0].eval()(x), x + 0.5 * model[0].a(x))


def test_a_model_whose_only_step_is_long_is_told_how_to_take_it() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.a(x)
            second = torch.relu(self.b(first))
            y = self.b(second)
            for skip in (second, first):
                y = skip + y
            return y

    model, x = Skips(), torch.randn(2, 8)
    with pytest.raises(eulernet.EulernetError, match=r'<root>, is long: .*: eulernet\.patch\(model, h, include="\*"\)'):
        eulernet.patch(model, 0.1, example_inputs=x)
    first = model.a(x)
    second = torch.relu(model.b(first))
    expected = first + 0.1 * (second + 0.1 * model.b(second))
    eulernet.patch(model, 0.1, example_inputs=x, include="*")
    torch.testing.assert_close(model(x), expected)


class ForwardKept(Block):
    """A method that its instance keeps as forward."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.fast

    def fast(self, x: Tensor) -> Tensor:
        return x + self.a(x)


class Coroutine(Block):
    async def add(self, x: Tensor) -> Tensor:
        return x + self.a(x)

    def forward(self, x: Tensor) -> Tensor:
        try:
            self.add(x).send(None)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        raise AssertionError


class Total:
    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __iadd__(self, other: Tensor) -> "Total":
        self.value = self.value + other
        return self


class AddedByAnOperator(Block):
    def forward(self, x: Tensor) -> Tensor:
        total = Total(x)
        total += self.a(x)
        return total.value


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (ForwardKept, "ForwardKept keeps its method fast as forward on the instance; write def forward"),
        (Coroutine, "Coroutine.add is a coroutine; write the addition in a function with def"),
        (AddedByAnOperator, r"made by Total.__iadd__, which line \d+ of AddedByAnOperator.forward runs without a call"),
    ],
)
def test_what_hides_an_addition_is_said(cls: type[nn.Module], words: str) -> None:
    model, x = nn.Sequential(Block(), cls()), torch.randn(2, DIM)
    with pytest.warns(eulernet.EulernetWarning, match=f"not scaled.*{words}"):
        eulernet.patch(model, 0.3, example_inputs=x)
    assert {step.name: step.h for step in eulernet.steps(model)}["0"] == 0.3


@torch.library.custom_op("eulernet_tests::add_norm", mutates_args=())
def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As vLLM and Mamba have it: the norm, and the sum."""
    residual = x + residual
    return torch.nn.functional.rms_norm(residual, (DIM,), weight), residual


@add_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("eulernet_tests::add_norm_", mutates_args=("x", "residual"))
def add_norm_(x: Tensor, residual: Tensor, weight: Tensor) -> None:
    residual.add_(x)
    x.copy_(torch.nn.functional.rms_norm(residual, (DIM,), weight))


def returned(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return add_norm(x, residual, weight)  # type: ignore[no-any-return]


def through_ops(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.eulernet_tests.add_norm(x, residual, weight)  # type: ignore[no-any-return]


def written(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x, residual = x.clone(), residual.clone()
    add_norm_(x, residual, weight)
    return x, residual


def written_through_ops(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x, residual = x.clone(), residual.clone()
    torch.ops.eulernet_tests.add_norm_(x, residual, weight)
    return x, residual


class WithOperators(nn.Module):
    def __init__(self, add: Any) -> None:
        super().__init__()
        self.block, self.add = Block(), add
        self.layers = nn.ModuleList(linear() for _ in range(3))
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.block(x)
        x = torch.tanh(residual)
        for layer in self.layers:
            x, residual = self.add(layer(x), residual, self.weight)
        return residual


@pytest.mark.parametrize("add", [returned, through_ops, written, written_through_ops])
def test_operators_of_others_that_add_and_do_more_are_named(add: Any) -> None:
    model, x = WithOperators(add), torch.randn(2, DIM)
    words = r"<root> \(.*test_unsupported.py.*eulernet_tests::add_norm adds and does something else in one operation"
    with torch.no_grad(), pytest.warns(eulernet.EulernetWarning, match=words):
        eulernet.patch(model, 0.3, example_inputs=x)
    assert [step.name for step in eulernet.steps(model)] == ["block"]


class InAPlainList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.known, self.others = Block(), [Block()]

    def forward(self, x: Tensor) -> Tensor:
        return self.others[0](self.known(x))  # type: ignore[no-any-return]


def test_a_module_that_model_modules_does_not_know_is_named_and_left_alone() -> None:
    """Neither set_h nor unpatch would reach it."""
    model, x = InAPlainList(), torch.randn(2, DIM)
    with pytest.warns(eulernet.EulernetWarning, match="does not know the module that makes it; use nn.ModuleList"):
        eulernet.patch(model, 0.3, example_inputs=x)
    assert type(model.others[0]) is Block and [step.name for step in eulernet.steps(model)] == ["known"]


class ReturnsAnObject(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.block, self.head, self.wrap = Block(), linear(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.head(self.block(x)))


class Holder:
    def __init__(self, y: Tensor) -> None:
        self.inner = [{"y": y}]


@pytest.mark.parametrize("wrap", [Holder, lambda y: torch.distributions.Normal(y, 1.0, validate_args=False)])
def test_what_an_object_holds_is_an_output(wrap: Any) -> None:
    found = eulernet.find_steps(ReturnsAnObject(wrap), example_inputs=torch.randn(2, DIM))
    assert found.outside.names == ("head",)


def test_where_no_output_is_seen_nothing_is_said_of_what_lies_outside() -> None:
    found = eulernet.find_steps(ReturnsAnObject(lambda y: lambda: y), example_inputs=torch.randn(2, DIM))
    assert found.outside.of == 0 and "lie in branches" not in str(found)
    assert any("returns a function, in which no tensor is seen" in note for note in found.notes)


class WithoutALength(tuple[int, ...]):
    """As e3nn's Irreps."""

    def __len__(self) -> int:
        raise NotImplementedError


def test_a_tuple_without_a_length_may_be_held() -> None:
    model = Block()
    model.held = [WithoutALength((1, 2))]
    assert len(eulernet.find_steps(model, example_inputs=torch.randn(2, DIM))) == 1
