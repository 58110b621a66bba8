"""The gradients of a learned h, against references and finite differences, eager and compiled."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import eulernet
from eulernet._run.learned import step_parameters
from tests.helpers.learned import X, log_h, net
from tests.helpers.trapped import assert_identical, both_modes, build, every_trap, run
from tests.traps import TRAPS, Trap
from tests.traps.base import Block, Form
from tests.traps.forms import InPlaceMinus, NarrowingInPlaceAddition, Plus
from tests.traps.steps import TwoTowers

# Where Dynamo looks at the attributes of a tensor, torch warns of .grad; as an error that would stop the compilation.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning",
    "ignore:the stream from the model:eulernet.EulernetWarning",  # test_traps.py asserts that long steps are named
)


def learning(cls: type[Trap], h: list[float] | float, **kwargs: Any) -> tuple[Trap, Trap, tuple[Any, ...]]:
    """The original, a copy whose h is learned, with the factors in the order of ``expected``, and the input."""
    model, inputs = build(cls, torch.float64, **kwargs)
    values = h if isinstance(h, float) else dict(zip((step.name for step in model.expected), h, strict=True)).get
    rule = values if isinstance(values, float) else lambda step: values(step.name)
    return model, eulernet.patch(copy.deepcopy(model), rule, example_inputs=inputs, trainable=True), inputs


# ------------------------------------------------------------------------------------------------------------ gradients


@both_modes
@every_trap
def test_values_and_gradients_are_those_of_the_reference(cls: type[Trap], training: bool) -> None:
    """In float64; the reference is the same forward written by hand, with factors that autograd sees."""
    factors = [0.3 + 0.1 * i for i in range(len(cls.expected))]
    model, learned, inputs = learning(cls, factors, training=training)
    outputs, gradients = run(learned, inputs)
    h = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in factors]
    references, reference_gradients = run(model, inputs, model.reference, h=h)
    names = {log_h(step, cls.keyed): h for step, h in zip(model.expected, h, strict=True)}
    ours = dict(zip([name for name, _ in learned.named_parameters()], gradients[len(inputs) : -1], strict=True))
    theirs = dict(
        zip([name for name, _ in model.named_parameters()], reference_gradients[len(inputs) : -1], strict=True)
    )
    for name, factor in names.items():  # h = exp(log_h), so dL / dlog_h = h * dL / dh
        theirs[name] = None if factor.grad is None else (factor * factor.grad).detach().view(1)
    assert ours.keys() == theirs.keys()
    # As in test_traps.py: where the branch is bfloat16, h * F is rounded to it. A gradient of h is a sum of products.
    eps = torch.finfo(torch.bfloat16).eps
    rounded = any(x is not None and x.dtype == torch.bfloat16 for x in (*outputs, *ours.values()))
    tolerance = {"rtol": 4 * eps, "atol": 4 * eps} if rounded else {"rtol": 1e-11, "atol": 1e-11}
    pairs = [*zip(outputs, references, strict=True), *((ours[n], theirs[n]) for n in theirs)]
    pairs += zip(gradients[: len(inputs)], reference_gradients[: len(inputs)], strict=True)
    for x, y in pairs:
        assert (x is None) == (y is None)
        if y is not None:
            torch.testing.assert_close(x, y, **tolerance)


# The narrowing one adds in bfloat16, where differences are too coarse.
FORMS = [cls for cls in TRAPS if issubclass(cls, Form) and cls is not NarrowingInPlaceAddition]


@pytest.mark.parametrize("cls", FORMS, ids=lambda cls: cls.__name__)
def test_gradients_are_those_of_finite_differences(cls: type[Trap]) -> None:
    _, model, inputs = learning(cls, 0.4)
    names = [log_h(step) for step in eulernet.steps(model)]
    parameters = dict(model.named_parameters())
    assert {p.dtype for p in parameters.values()} == {torch.float64}

    def loss(*logs: Tensor) -> Tensor:
        outputs = functional_call(model, {**parameters, **dict(zip(names, logs, strict=True))}, inputs)
        return sum(y.square().sum() for y in tree_leaves(outputs))  # type: ignore[return-value]

    torch.manual_seed(0)
    assert torch.autograd.gradcheck(loss, tuple(parameters[name].detach().requires_grad_() for name in names))


@both_modes
@every_trap
def test_an_h_of_one_is_bit_identical(cls: type[Trap], training: bool) -> None:
    """exp(0) is 1, and a product with 1 is exact: outputs and gradients are the original's."""
    model, inputs = build(cls, training=training)
    learned = eulernet.patch(copy.deepcopy(model), 1.0, example_inputs=inputs, trainable=True)
    outputs, gradients = run(learned, inputs)
    expected, expected_gradients = run(model, inputs)
    for x, y in zip(outputs, expected, strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype and x.stride() == y.stride()
    names = [None] * len(inputs) + [name for name, _ in learned.named_parameters()] + [None]
    kept = [g for name, g in zip(names, gradients, strict=True) if name is None or "log_h" not in name]
    assert_identical(kept, expected_gradients)


def test_a_frozen_factor_has_no_gradient_and_the_rest_has() -> None:
    model = eulernet.patch(net(), 0.3, example_inputs=X, trainable=True)
    fixed = eulernet.patch(copy.deepcopy(eulernet.unpatch(copy.deepcopy(model))), 0.3, example_inputs=X)
    for parameter in step_parameters(model):
        parameter.requires_grad_(False)
    model(X).sum().backward()
    fixed(X).sum().backward()
    for name, parameter in fixed.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
    assert all(p.grad is None for p in step_parameters(model))


def test_second_derivatives_are_those_of_the_reference() -> None:
    _, model, inputs = learning(Plus, 0.3)
    parameter = model.log_h_bias

    def loss(log: Tensor) -> Tensor:
        return functional_call(model, {"log_h_bias": log}, inputs).square().sum()

    assert torch.autograd.gradgradcheck(loss, (parameter.detach().requires_grad_(),))


# -------------------------------------------------------------------------------------------------------- as parameters


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    model = eulernet.patch(net(), 0.25, example_inputs=X, trainable="stage")

    def gradients(forward: Any) -> list[Tensor]:
        model.zero_grad()
        forward(X.clone().requires_grad_()).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    def checkpointed(x: Tensor) -> Tensor:
        for block in (*model.layer1, *model.layer2, model.last):
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return x

    expected, actual = gradients(model), gradients(checkpointed)
    assert len(actual) == len(list(model.parameters()))
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def test_the_branch_of_an_addition_in_place_keeps_the_memory() -> None:
    """`out += x`: whoever holds `out` sees the sum, and autograd the branch."""
    _, model, inputs = learning(InPlaceMinus, 0.3)
    outputs, _ = run(model, inputs)
    with torch.no_grad():
        assert torch.equal(model(*inputs), outputs[0])


@pytest.mark.usefixtures("recompiled")
@pytest.mark.parametrize("cls", [*FORMS[:4], TwoTowers], ids=lambda cls: cls.__name__)
def test_compiled_gradients_are_the_eager_ones(cls: type[Trap]) -> None:
    _, model, inputs = learning(cls, 0.3)
    expected, expected_gradients = run(copy.deepcopy(model), inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual, gradients = run(model, inputs, lambda *inputs: compiled(*inputs))
    for x, y in zip((*actual, *gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("recompiled")
def test_learning_compiles_once() -> None:
    model = eulernet.patch(net(), 0.25, example_inputs=X, trainable=True)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(torch._dynamo.config.recompile_limit + 3):
            loss = compiled(X).square().sum()
            torch.testing.assert_close(loss, model(X).square().sum())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        eulernet.set_h(model, 0.5)
        torch.testing.assert_close(compiled(X), model(X))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("recompiled")
def test_blocks_share_one_compilation() -> None:
    blocks = nn.Sequential(*(Block() for _ in range(6)))
    eulernet.patch(blocks, [0.1 * (i + 1) for i in range(6)], example_inputs=X, trainable=True)
    counter = CompileCounter()
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    blocks(X.clone().requires_grad_())  # the first block's input as the others'
    assert counter.frame_count == 1
