"""h as a parameter: its gradients against references, its names and ties, and that it is a parameter like any other."""

import copy
import io
import math
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

import eulernet
from eulernet import EulernetError, Step
from eulernet._run.learned import stage, step_parameters
from tests.helpers.refusals import refused
from tests.helpers.trapped import assert_identical, both_modes, build, every_trap, run
from tests.traps import TRAPS, Trap
from tests.traps.base import DIM, Block, Form
from tests.traps.forms import InPlaceMinus, NarrowingInPlaceAddition, Plus
from tests.traps.steps import TwoTowers

# Where Dynamo looks at the attributes of a tensor, torch warns of .grad; as an error that would stop the compilation.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning",
    "ignore:the stream from the model:eulernet.EulernetWarning",  # test_traps.py asserts that long steps are named
)

X = torch.linspace(-1, 1, 2 * DIM).view(2, DIM)


def log_h(step: Step, keyed: bool = False) -> str:
    """The name of the parameter of a step, by the rule that the docstring of `patch` gives."""
    module, _, number = step.name.partition(":")
    if keyed:
        return "_".join(("log_h", *module.split("."), *([number] if number else []), "bias"))
    name = f"log_h_{number}_bias" if number else "log_h_bias"
    return name if module == "<root>" else f"{module}.{name}"


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
def test_one_is_bit_identical(cls: type[Trap], training: bool) -> None:
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


def test_second_derivatives() -> None:
    _, model, inputs = learning(Plus, 0.3)
    parameter = model.log_h_bias

    def loss(log: Tensor) -> Tensor:
        return functional_call(model, {"log_h_bias": log}, inputs).square().sum()

    assert torch.autograd.gradgradcheck(loss, (parameter.detach().requires_grad_(),))


# ---------------------------------------------------------------------------------------------------- names and sharing


class Two(nn.Module):
    """A block of two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + self.b(x)


class Net(nn.Module):
    """Two stages of two blocks, and a block beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer2 = nn.Sequential(Two(), Two())
        self.last = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer2(self.layer1(x)))


NAMES = [
    *("layer1.0.log_h_bias", "layer1.1.log_h_bias", "layer2.0.log_h_0_bias", "layer2.0.log_h_1_bias"),
    *("layer2.1.log_h_0_bias", "layer2.1.log_h_1_bias", "last.log_h_bias"),
]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def factors(model: nn.Module) -> list[float | None]:
    return [step.h for step in eulernet.steps(model)]


def logs(model: nn.Module) -> list[str]:
    return [name for name in model.state_dict() if "log_h" in name]


@pytest.mark.parametrize(
    ("trainable", "groups"),
    [
        (True, [[name] for name in NAMES]),
        ("step", [[name] for name in NAMES]),
        ("stage", [NAMES[:2], NAMES[2:6], NAMES[6:]]),
        ("model", [NAMES]),
    ],
)
def test_names_and_ties(trainable: Any, groups: list[list[str]]) -> None:
    model = net()
    before = list(model.state_dict())
    eulernet.patch(model, 0.25, example_inputs=X, trainable=trainable)
    assert sorted(logs(model)) == sorted(NAMES)
    assert [name for name in model.state_dict() if "log_h" not in name] == before
    tied = [{id(model.get_parameter(name)) for name in group} for group in groups]
    assert all(len(ids) == 1 for ids in tied) and len(set.union(*tied)) == len(groups)
    parameters = list(step_parameters(model))
    assert len(parameters) == len(groups)
    assert {id(p) for p in parameters} == {id(p) for name, p in model.named_parameters() if "log_h" in name}
    for parameter in parameters:
        assert isinstance(parameter, nn.Parameter) and parameter.requires_grad
        assert parameter.shape == (1,) and parameter.dtype == torch.float32
        assert parameter.item() == pytest.approx(math.log(0.25), rel=1e-7)
    assert factors(model) == pytest.approx([0.25] * 7, rel=1e-7)
    assert "h=0.25" in repr(model.layer1) and "h=(0.25, 0.25)" in repr(model.layer2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layer1.0", "layer1"),
        ("layer10.12:1", "layer10"),
        ("blocks.3:0", "blocks"),
        ("stages.1.blocks.4", "stages.1.blocks"),
        ("encoder.layer.7.attention.output", "encoder.layer"),
        ("0", ""),
        ("mixer.block2:0", "mixer.block2"),
        ("<root>:1", "<root>"),
    ],
)
def test_stages(name: str, expected: str) -> None:
    assert stage(Step(0, name, "Block", "identity", (), 1, 0, 4)) == expected


def test_stages_of_a_resnet() -> None:
    timm = pytest.importorskip("timm")
    model = eulernet.patch(timm.create_model("resnet10t"), 0.5, trainable="stage", include=["layer1", "layer3"])
    assert logs(model) == ["layer1.0.log_h_bias", "layer3.0.log_h_bias"]
    assert len(list(step_parameters(model))) == 2


def test_only_one_of_two_steps_of_a_module() -> None:
    model = eulernet.patch(net(), 0.5, example_inputs=X, include="layer2.0:1", trainable=True)
    assert logs(model) == ["layer2.0.log_h_1"]
    torch.testing.assert_close(model.layer2[0](X), (x := X + model.layer2[0].a(X)) + 0.5 * model.layer2[0].b(x))


class Repeated(nn.Module):
    """One block, called three times, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return x


def test_a_repeated_block_sums_the_gradients_of_its_calls() -> None:
    model = eulernet.patch(Repeated().double(), 0.3, example_inputs=X.double(), trainable=True)
    assert logs(model) == ["block.log_h_bias"]
    h = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = X.double()
    for _ in range(3):
        x = model.block.reference(x, h)
    (expected,) = torch.autograd.grad(x.square().sum(), h)
    model(X.double()).square().sum().backward()
    torch.testing.assert_close(model.block.log_h_bias.grad, (h * expected).detach().view(1), rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------------------------------- as parameters


@pytest.mark.parametrize("trainable", ["step", "stage", "model"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_moves_h_and_the_output(trainable: Any, optimizer: Any) -> None:
    model = eulernet.patch(net(), 0.25, example_inputs=X, trainable=trainable)
    others = [p for name, p in model.named_parameters() if "log_h" not in name]
    groups = [{"params": others, "lr": 0.0}, {"params": list(step_parameters(model)), "weight_decay": 0.0}]
    moved = optimizer(groups, lr=0.01)
    before, output = factors(model), model(X)
    for _ in range(3):
        moved.zero_grad()
        (model(X) - 3).square().sum().backward()
        moved.step()
    assert all(h > 0 and h != old for h, old in zip(factors(model), before, strict=True))
    assert (model(X) - 3).square().sum() < (output - 3).square().sum()
    assert len(set(factors(model))) == {"step": 7, "stage": 3, "model": 1}[trainable]
    eulernet.unpatch(model)
    fixed = eulernet.patch(model, 1.0, example_inputs=X)
    assert logs(fixed) == []


def test_h_is_positive_whatever_is_learned() -> None:
    model = eulernet.patch(net(), 0.25, example_inputs=X, trainable=True)
    for parameter in step_parameters(model):
        nn.init.constant_(parameter, -50.0)
    assert factors(model) == pytest.approx([math.exp(-50)] * 7)
    torch.testing.assert_close(model(X), X)


@pytest.mark.parametrize("trainable", ["step", "stage", "model"])
def test_a_state_dict_loads_into_a_model_that_was_patched_alike(trainable: Any) -> None:
    model = eulernet.patch(net(), 0.25, example_inputs=X, trainable=trainable)
    with torch.no_grad():
        for i, parameter in enumerate(step_parameters(model)):
            parameter.fill_(-0.1 * (i + 1))
    other = eulernet.patch(Net(), 1.0, example_inputs=X, trainable=trainable)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(X), model(X)) and factors(other) == factors(model)
    assert len(list(step_parameters(other))) == len(list(step_parameters(model)))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*log_h"):
        Net().load_state_dict(model.state_dict(), strict=True)


def by_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_save(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, by_pickle, by_save], ids=lambda make: make.__name__)
@pytest.mark.parametrize("trainable", ["step", "stage", "model"])
def test_a_copy_learns_by_itself(trainable: Any, make: Callable[[nn.Module], Any]) -> None:
    model = eulernet.patch(net(), 0.25, example_inputs=X, trainable=trainable)
    expected = model(X)
    other = make(model)
    assert torch.equal(other(X), expected) and eulernet.steps(other) == eulernet.steps(model)
    assert len(list(step_parameters(other))) == len(list(step_parameters(model)))
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    eulernet.set_h(other, 2.0)
    assert torch.equal(model(X), expected) and not torch.equal(other(X), expected)
    eulernet.unpatch(other)
    assert torch.equal(model(X), expected) and logs(other) == [] and len(logs(model)) == 7


def test_functional_call_and_vmap_see_the_factors() -> None:
    model = eulernet.patch(net(), 0.25, example_inputs=X, trainable=True)
    parameters = dict(model.named_parameters())
    ones = {name: torch.zeros_like(p) if "log_h" in name else p for name, p in parameters.items()}
    assert torch.equal(functional_call(model, ones, (X,)), net()(X))

    values = torch.tensor([0.1, 0.5, 1.0])
    stacked = {
        name: torch.stack([p * 0 + h.log() for h in values]) for name, p in parameters.items() if "log_h" in name
    }
    rest = {name: p for name, p in parameters.items() if name not in stacked}
    outputs = torch.func.vmap(lambda logs: functional_call(model, {**rest, **logs}, (X,)))(stacked)
    for h, output in zip(values, outputs, strict=True):
        torch.testing.assert_close(output, eulernet.set_h(copy.deepcopy(model), h)(X))


def test_replicas_of_data_parallel() -> None:
    """They hold what `torch.nn.parallel.replicate` gives them as plain attributes, not the original's parameters."""
    model = eulernet.patch(net(), 0.25, example_inputs=X, trainable=True)
    block = model.layer1[0]
    replica = block._replicate_for_data_parallel()
    replica.norm, replica.a = block.norm, block.a
    replica.log_h_bias = torch.zeros(1, requires_grad=True)
    assert torch.equal(replica(X), block.reference(X, 1.0))
    torch.testing.assert_close(block(X), block.reference(X, 0.25))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_it_follows_the_dtype_of_the_module(dtype: torch.dtype) -> None:
    model = eulernet.patch(net(), 0.1, example_inputs=X, trainable="stage").to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    # log_h is rounded to half a unit in the last place, at most eps * |log_h| / 2.
    error = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * abs(math.log(0.1)) / 2
    assert factors(model) == pytest.approx([0.1] * 7, rel=1.01 * error)
    assert model(X.to(dtype)).dtype == dtype
    made = eulernet.patch(net().to(dtype), 0.1, example_inputs=X.to(dtype), trainable=True)
    assert {p.dtype for p in made.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_originals_dtypes(dtype: torch.dtype) -> None:
    """A factor in float32 makes no branch in half precision wider."""
    original = net()
    model = eulernet.patch(copy.deepcopy(original), 1.0, example_inputs=X, trainable=True)
    with torch.autocast("cpu", dtype):
        output, expected = model(X), original(X)
    assert output.dtype == expected.dtype and torch.equal(output, expected)
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in step_parameters(model))


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


@pytest.fixture
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("cls", [*FORMS[:4], TwoTowers], ids=lambda cls: cls.__name__)
def test_compiled_gradients_are_the_eager_ones(cls: type[Trap]) -> None:
    _, model, inputs = learning(cls, 0.3)
    expected, expected_gradients = run(copy.deepcopy(model), inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual, gradients = run(model, inputs, lambda *inputs: compiled(*inputs))
    for x, y in zip((*actual, *gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_fresh")
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


@pytest.mark.usefixtures("_fresh")
def test_blocks_share_one_compilation() -> None:
    blocks = nn.Sequential(*(Block() for _ in range(6)))
    eulernet.patch(blocks, [0.1 * (i + 1) for i in range(6)], example_inputs=X, trainable=True)
    counter = CompileCounter()
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    blocks(X.clone().requires_grad_())  # the first block's input as the others'
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
def test_export_holds_the_parameters(strict: bool) -> None:
    model = eulernet.patch(net(), 0.25, example_inputs=X, trainable=True)
    program = torch.export.export(model, (X,), strict=strict)
    assert set(program.state_dict) == set(model.state_dict())
    torch.testing.assert_close(program.module()(X + 1), model(X + 1))


def test_fx_holds_the_parameters() -> None:
    model = eulernet.patch(net(), 0.25, example_inputs=X, trainable=True)
    traced = torch.fx.symbolic_trace(model)
    eulernet.set_h(model, 0.5)  # the same parameters
    assert logs(traced) == logs(model)
    torch.testing.assert_close(traced(X), model(X))


# ------------------------------------------------------------------------------------------------ patch, set_h, unpatch


def test_unpatch_removes_the_parameters_and_nothing_else() -> None:
    model = net()
    before = [(name, id(p)) for name, p in model.named_parameters()]
    output = model(X)
    eulernet.patch(model, 0.25, example_inputs=X, trainable="stage")
    assert not torch.equal(model(X), output)
    eulernet.unpatch(model)
    assert [(name, id(p)) for name, p in model.named_parameters()] == before
    assert type(model.last) is Block and torch.equal(model(X), output)


def test_patching_again_starts_anew() -> None:
    model = eulernet.patch(net(), 0.25, example_inputs=X, trainable="model")
    eulernet.patch(model, 0.5, example_inputs=X, include="layer2", trainable=True)
    assert logs(model) == NAMES[2:6]
    assert factors(model) == pytest.approx([0.5] * 4, rel=1e-7)
    eulernet.patch(model, 0.5, example_inputs=X)
    assert logs(model) == [] and factors(model) == [0.5] * 7
    assert len(eulernet.find_steps(eulernet.patch(model, 0.5, example_inputs=X, trainable=True), example_inputs=X)) == 7


def test_set_h_writes_into_the_parameters() -> None:
    model = eulernet.patch(net(), 0.25, example_inputs=X, trainable=True)
    parameters = list(step_parameters(model))
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    values = [0.1 * (i + 1) for i in range(7)]
    eulernet.set_h(model, values)
    assert [id(p) for p in step_parameters(model)] == [id(p) for p in optimizer.param_groups[0]["params"]]
    assert factors(model) == pytest.approx(values, rel=1e-6)
    assert [p.item() for p in parameters] == pytest.approx([math.log(h) for h in values], rel=1e-6)
    steps = eulernet.Steps.from_json(eulernet.steps(model).to_json())
    assert [step.h for step in steps] == factors(model)
    other = eulernet.patch(net(), steps, example_inputs=X)
    torch.testing.assert_close(other(X), model(X))


def test_one_h_for_several_steps_takes_one_value() -> None:
    model = net()
    rule = lambda step: 1 / (1 + step.index)  # noqa: E731
    words = ["layer1.0 and layer1.1 share one learned h", "1 and 0.5", 'trainable="step"']
    refused(model, lambda: eulernet.patch(model, rule, example_inputs=X, trainable="stage"), *map(re.escape, words))
    by_stage = {"layer1": 0.5, "layer2": 0.25, "last": 1.0}
    eulernet.patch(model, by_stage, example_inputs=X, trainable="stage")
    before = factors(model)
    assert before == pytest.approx([0.5] * 2 + [0.25] * 4 + [1.0], rel=1e-7)
    refused(model, lambda: eulernet.set_h(model, rule), *map(re.escape, words))
    assert factors(model) == before
    eulernet.set_h(model, {"layer1": 0.1, "*": 0.2})
    assert factors(model) == pytest.approx([0.1] * 2 + [0.2] * 5, rel=1e-6)


def test_what_was_learned_becomes_fixed() -> None:
    model = eulernet.patch(net(), [0.1 * (i + 1) for i in range(7)], example_inputs=X, trainable=True)
    learned, output = factors(model), model(X)
    eulernet.patch(model, eulernet.steps(model), example_inputs=X)
    assert logs(model) == [] and factors(model) == learned
    torch.testing.assert_close(model(X), output)


@pytest.mark.parametrize("value", ["steps", "", None, 1, 0, ["step"], torch.ones(1), torch.ones(2)], ids=repr)
def test_other_words_are_refused(value: Any) -> None:
    model = net()
    refused(
        model, lambda: eulernet.patch(model, 0.1, example_inputs=X, trainable=value), "trainable=", "stage", "model"
    )


def test_a_name_that_is_taken() -> None:
    model = net()
    model.layer1[1].log_h_bias = 3
    call = lambda: eulernet.patch(model, 0.1, example_inputs=X, trainable=True)  # noqa: E731
    refused(model, call, r"layer1\.1 \(Block\)", "log_h_bias of its own", re.escape("exclude='layer1.1'"))
    eulernet.patch(model, 0.1, example_inputs=X, exclude="layer1.1", trainable=True)
    assert len(logs(model)) == 6 and model.layer1[1].log_h_bias == 3


def test_the_meta_device_is_refused() -> None:
    """A parameter without a value would be filled with whatever `to_empty` finds."""
    with torch.device("meta"):
        model = Net()
    call = lambda: eulernet.patch(model, 0.1, example_inputs=X.to("meta"), trainable=True)  # noqa: E731
    refused(model, call, "meta device", "to_empty")
    learned = eulernet.patch(net(), 0.1, example_inputs=X, trainable=True).to("meta")
    with pytest.raises(EulernetError, match="meta device"):
        eulernet.steps(learned)
    assert "h=exp(log_h_bias)" in repr(learned)


def test_a_model_patched_in_inference_mode_can_be_trained() -> None:
    model = net()
    with torch.inference_mode():
        eulernet.patch(model, 0.25, example_inputs=X, trainable=True)
    model(X).sum().backward()
    assert all(p.grad is not None for p in step_parameters(model))


def test_a_schedule_refuses_a_learned_h() -> None:
    model = eulernet.patch(net(), 0.25, example_inputs=X, trainable=True)
    refused(model, lambda: eulernet.HScheduler(model, total_steps=3), "learned", "trainable=", r"eulernet\.patch\(")


def test_averages_hold_the_learned_factors() -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = eulernet.patch(net(), 0.25, example_inputs=X, trainable=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    eulernet.set_h(model, 1.0)
    average.update_parameters(model)
    # The mean of log_h, so the geometric mean of h.
    assert factors(average.module) == pytest.approx([0.5] * 7, rel=1e-6)


def test_inputs_are_left_as_they_were() -> None:
    x = tree_map_only(Tensor, torch.clone, X)
    eulernet.patch(net(), 0.25, example_inputs=x, trainable=True)
    assert torch.equal(x, X) and not x.requires_grad


# ---------------------------------------------------------------------------------------------------------- distributed


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# The warnings are of torch's own code: a deprecated backend's name, a hook on an input that needs no gradient.
def distributed(test: Any) -> Any:
    test = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")(test)
    test = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")(test)
    return pytest.mark.usefixtures("_one_process")(test)


def learn(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()


@distributed
@pytest.mark.parametrize("trainable", ["step", "stage"])
def test_ddp_learns_as_one_process(trainable: Any) -> None:
    model = eulernet.patch(net(), 0.25, example_inputs=X, trainable=trainable)
    wrapped = DistributedDataParallel(copy.deepcopy(model))
    for each in (model, wrapped):
        learn(each, list(each.parameters()))
    assert factors(wrapped) == factors(model) != [0.25] * 7
    eulernet.set_h(wrapped, 0.5)
    torch.testing.assert_close(wrapped(X), eulernet.set_h(model, 0.5)(X))


@distributed
def test_fsdp_learns_as_one_process() -> None:
    """FSDP2 keeps its part of a parameter in place of it, and takes no scalars and no mixture of dtypes."""
    model = eulernet.patch(net(), 0.25, example_inputs=X, trainable=True)
    shards = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (1,))
    for block in (*shards.layer1, *shards.layer2):
        fully_shard(block, mesh=mesh)
    fully_shard(shards, mesh=mesh)
    for each in (model, shards):
        learn(each, list(each.parameters()))
    assert factors(shards) == factors(model) != [0.25] * 7
    assert "h=exp(log_h_bias)" in repr(shards.last)
    eulernet.set_h(shards, 0.5)
    assert factors(shards) == pytest.approx([0.5] * 7, rel=1e-7)
    torch.testing.assert_close(shards(X), eulernet.set_h(model, 0.5)(X))
