"""A learned h as a parameter of its model: its name, who shares it, and what PyTorch does with it."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import eulernet
from eulernet import Step
from eulernet._run.learned import stage, step_parameters
from tests.helpers.copied import by_pickle, by_save
from tests.helpers.learned import NAMES, Net, X, factors, logs, net
from tests.traps.base import Block

# Where Dynamo looks at the attributes of a tensor, torch warns of .grad; as an error that would stop the compilation.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning",
    "ignore:the stream from the model:eulernet.EulernetWarning",  # test_traps.py asserts that long steps are named
)


# ---------------------------------------------------------------------------------------------------- names and sharing


@pytest.mark.parametrize(
    ("trainable", "groups"),
    [
        (True, [[name] for name in NAMES]),
        ("step", [[name] for name in NAMES]),
        ("stage", [NAMES[:2], NAMES[2:6], NAMES[6:]]),
        ("model", [NAMES]),
    ],
)
def test_parameters_have_the_names_and_ties_that_were_asked_for(trainable: Any, groups: list[list[str]]) -> None:
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
def test_the_stage_of_a_step_is_read_off_its_name(name: str, expected: str) -> None:
    assert stage(Step(0, name, "Block", "identity", (), 1, 0, 4)) == expected


def test_a_stage_of_a_resnet_shares_one_parameter() -> None:
    timm = pytest.importorskip("timm")
    model = eulernet.patch(timm.create_model("resnet10t"), 0.5, trainable="stage", include=["layer1", "layer3"])
    assert logs(model) == ["layer1.0.log_h_bias", "layer3.0.log_h_bias"]
    assert len(list(step_parameters(model))) == 2


def test_one_of_two_steps_of_a_module_is_learned_alone() -> None:
    model = eulernet.patch(net(), 0.5, example_inputs=X, include="layer2.0:1", trainable=True)
    assert logs(model) == ["layer2.0.log_h_1_bias"]
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


def test_replicas_of_data_parallel_use_the_parameters_that_they_are_given() -> None:
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
