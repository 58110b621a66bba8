"""What is made of what is seen wherever it is computed, and where it cannot be seen, that is said."""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import eulernet
from eulernet._find.trace import Tracer
from tests.traps.base import DIM, linear
from tests.traps.provenance import (
    Flex,
    InAThread,
    LambdaBlock,
    LambdaOverBlock,
    LooksAtValues,
    Residual,
    ScriptedBranch,
    ThroughNumpy,
    Uncopyable,
    with_older_norm,
)

X = torch.randn(4, DIM)


def names(model: nn.Module) -> list[str]:
    return [step.name for step in eulernet.find_steps(model, example_inputs=X)]


@pytest.mark.parametrize("real", [False, True], ids=["fake", "real"])
def test_functions_that_hold_modules_are_copied_with_the_model(real: bool) -> None:
    block = LambdaBlock()
    model = LooksAtValues(block) if real else block
    before = copy.deepcopy(model.state_dict())
    found = eulernet.find_steps(model, example_inputs=X)
    assert found.unreached == () and len(found) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert block.branch.__closure__[0].cell_contents is block.mlp  # the owner's function is the owner's


def test_a_block_that_a_function_holds_is_a_step() -> None:
    model = LambdaOverBlock()
    eulernet.patch(model, 0.3, example_inputs=X)
    torch.testing.assert_close(model(X), X + 0.3 * model.block.branch(X))


def test_h_folds_into_maps_behind_a_function() -> None:
    model = LambdaBlock().double().eval()
    x = X.double()
    eulernet.patch(model, 0.3, example_inputs=x)
    expected = x + 0.3 * model.branch(x)
    eulernet.fold(model, example_inputs=x)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=["weight", "spectral"])
def test_weights_that_hooks_compute_are_parameters(norm: Any) -> None:
    model, x = with_older_norm(norm).eval().double(), X.double()
    model(x)  # the hooks make weights of the new dtype
    found = eulernet.find_steps(model, example_inputs=x)
    assert [(step.name, step.kind) for step in found] == [("0", "projection"), ("1", "projection")]
    y = x
    eulernet.patch(model, 0.3, example_inputs=x)
    for unit in model.children():
        y = unit.project(y) + 0.3 * unit.f(y)
    torch.testing.assert_close(model(x), y)
    if norm is nn.utils.weight_norm:
        eulernet.fold(model, example_inputs=x)
        torch.testing.assert_close(model(x), y)
    else:
        with pytest.raises(eulernet.EulernetError, match="no last affine map"):  # W over its norm takes no factor
            eulernet.fold(model, example_inputs=x)


@pytest.mark.parametrize("times", [0, 1, 3])
def test_steps_are_the_same_however_often_the_model_has_run(times: int) -> None:
    model = nn.Sequential(Residual(linear()), ScriptedBranch(), Residual(linear()))
    for _ in range(times):
        model(X).sum().backward()
    for _ in range(2):  # and looking at it changes nothing
        found = eulernet.find_steps(model, example_inputs=X)
        assert [step.name for step in found] == ["0", "1", "2"] and found.notes == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eulernet.patch(model, 0.3, example_inputs=X)
    assert len(eulernet.steps(model)) == 3


def test_attention_as_a_higher_order_operator_is_a_branch() -> None:
    pytest.importorskip("torch", "2.9", reason="modes see no higher-order operators")
    model, x = nn.Sequential(Flex(), Flex()).eval(), torch.randn(2, 16, DIM)
    found = eulernet.find_steps(model, example_inputs=x)
    assert [step.name for step in found] == ["0", "1"]
    assert torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG is False


def test_values_that_leave_pytorch_are_noted() -> None:
    found = eulernet.find_steps(ThroughNumpy(), example_inputs=X)
    assert [step.name for step in found] == ["<root>"]
    (note,) = found.notes
    assert "numpy" in note and "provenance.py" in note and "not traced back" in note


def test_results_of_a_thread_are_noted() -> None:
    found = eulernet.find_steps(InAThread(), example_inputs=X)
    assert [step.name for step in found] == ["<root>"]
    (note,) = found.notes
    assert "in a thread" in note


def test_what_cannot_be_copied_is_shared() -> None:
    model = nn.Sequential(Uncopyable(), Uncopyable())
    kept = [vars(block).copy() for block in model]
    model(X)
    assert names(model) == ["0", "1"]
    eulernet.patch(model, 0.3, example_inputs=X)
    for block, attributes in zip(model, kept, strict=True):
        assert all(vars(block)[name] is value for name, value in attributes.items())
        assert not isinstance(block.last["output"], torch._subclasses.FakeTensor)
        assert next(block.stream) == 0  # type: ignore[call-overload]
    y = X
    for block in model:
        y = y + 0.3 * block.f(y)
    torch.testing.assert_close(model(X), y)


class Forgetful(nn.Module):
    """Attention of timm: a table of biases is kept in eval mode, and dropped by `train`."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = {"here": torch.randn(DIM)}

    def train(self, mode: bool = True) -> Forgetful:
        if mode:
            self.tables.clear()
        return super().train(mode)


def test_what_the_model_drops_as_it_is_traced_gives_its_id_to_none() -> None:
    """Else the input may get it, and be taken for a constant of the model: EfficientFormerV2, one time in ten."""
    model = Forgetful()
    tracer, kept = Tracer(model), weakref.ref(model.tables["here"])
    model.train()
    assert kept() is not None
    del tracer
    assert kept() is None
