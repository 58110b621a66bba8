"""Sums without a source to rewrite: what is proven of them, and what is refused in words."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import eulernet
from tests.helpers.trapped import assert_identical, build
from tests.traps.base import DIM, Trap
from tests.traps.difference import (
    Addcmul,
    ByHand,
    InAnAutogradFunctionThatIsRunAgain,
    IndexAdd,
    PartOfTheWay,
    PartOfTheWayFromTheCandidate,
    Reduced,
    RunAgainInItsBackward,
    ScriptedSum,
    SumOfAMappedSkip,
    SumOfAStack,
    SumOfATuple,
    SumsInALoop,
)
from tests.traps.refused import (
    Beside,
    Compiled,
    WithoutItsParameters,
    doubled,
    halved,
    keeping,
    overwritten,
    reading,
    skip_made_inside,
    written_by_addcmul,
)

X = torch.randn(4, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PLAIN = [SumOfATuple, SumOfAMappedSkip, Reduced, SumOfAStack, Addcmul, IndexAdd, ScriptedSum, SumsInALoop]


def patched(cls: type[Trap], h: float = 0.3, **options: Any) -> tuple[Any, tuple[Any, ...]]:
    model, inputs = build(cls, torch.float64)
    return eulernet.patch(model, h, example_inputs=inputs, **options), inputs


def expected(cls: type[Trap], h: float) -> Tensor:
    model, inputs = build(cls, torch.float64)
    return model.reference(*inputs, h=[h] * len(cls.expected))  # type: ignore[no-any-return]


@pytest.mark.parametrize("cls", PLAIN, ids=lambda cls: cls.__name__)
def test_the_last_map_takes_over_h(cls: type[Trap]) -> None:
    model, inputs = patched(cls)
    eulernet.fold(model, example_inputs=inputs)
    assert type(model) is cls
    torch.testing.assert_close(model(*inputs), expected(cls, 0.3), rtol=1e-12, atol=1e-12)
    model, inputs = patched(cls, preserve=True)
    assert eulernet.is_patched(model)
    torch.testing.assert_close(model(*inputs), expected(cls, 1.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", [PartOfTheWay, PartOfTheWayFromTheCandidate])
def test_what_is_no_plain_sum_is_not_folded(cls: type[Trap]) -> None:
    model, inputs = patched(cls)
    with pytest.raises(eulernet.EulernetError, match="goes a part of the way from one tensor to another"):
        eulernet.fold(model, example_inputs=inputs)
    torch.testing.assert_close(model(*inputs), expected(cls, 0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", [SumOfATuple, SumOfAMappedSkip, SumOfAStack, ScriptedSum, SumsInALoop])
def test_copies_pickles_and_checkpoints(cls: type[Trap]) -> None:
    model, inputs = patched(cls, trainable=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(*inputs), model(*inputs))
    gradients = []
    for run in (model, functools.partial(checkpoint, model, use_reentrant=False)):
        model.zero_grad()
        run(*inputs).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert all(g is not None for g in gradients[-1])
    assert_identical(*gradients)


@pytest.mark.parametrize("cls", [SumOfATuple, SumOfAStack, Addcmul, PartOfTheWay, SumsInALoop])
def test_compiled_once_for_all_h_without_a_break(cls: type[Trap]) -> None:
    model, inputs = patched(cls)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for h in (0.3, 0.7, 1.0):
        eulernet.set_h(model, h)
        torch.testing.assert_close(compiled(*inputs), expected(cls, h), rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1
    assert torch.equal(compiled(*inputs), build(cls, torch.float64)[0](*inputs))


def test_a_plain_sum_beside_a_function_that_a_checkpoint_runs_again_is_rewritten() -> None:
    """By difference it would be off by the rounding of the sum."""
    model, _ = build(InAnAutogradFunctionThatIsRunAgain)
    x = torch.randn(64, DIM)
    reference = model.reference(x, h=[1.0, 0.25])
    eulernet.patch(model, [1.0, 0.25], example_inputs=x)
    assert torch.equal(model(x), reference)


def test_h_is_learned_where_the_backward_runs_again() -> None:
    model, inputs = patched(RunAgainInItsBackward, trainable=True)
    reference, _ = build(RunAgainInItsBackward, torch.float64)
    h = torch.tensor([0.3, 0.3], dtype=torch.float64, requires_grad=True)
    inputs[0].requires_grad_()
    model(*inputs).square().sum().backward()
    reference.reference(*inputs, h=h).square().sum().backward()
    assert h.grad is not None
    torch.testing.assert_close(torch.cat((model.log_h_0_bias.grad, model.log_h_1_bias.grad)), 0.3 * h.grad)


def test_a_learned_h_that_would_get_no_gradient_is_refused_in_words() -> None:
    with pytest.raises(eulernet.EulernetError, match=r"hands no gradient to log_h_0"):
        patched(WithoutItsParameters, trainable=True)
    model, inputs = patched(WithoutItsParameters)
    torch.testing.assert_close(model(*inputs), expected(WithoutItsParameters, 0.3))


def test_a_sum_is_found_whether_or_not_the_model_ran_before() -> None:
    """Python calls C by another instruction once it has done so for some times."""
    torch.manual_seed(0)
    model, inputs = build(SumOfATuple, torch.float64)
    for _ in range(3):
        for _ in range(10):
            model(*inputs)
        found = eulernet.find_steps(model, example_inputs=inputs)
        assert (len(found), found.unsupported) == (1, ())


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TorchScript is deprecated

    @torch.jit.script
    def biased(x: Tensor, f: Tensor, bias: Tensor) -> Tensor:
        """As Megatron's, which adds a bias and drops."""
        return x + torch.dropout(f + bias, 0.0, True)


class Scripted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return biased(x, torch.tanh(self.a(x)), self.a.bias)


@pytest.mark.parametrize("runs", [0, 1, 3])
def test_a_script_that_autograd_has_specialised_is_as_it_was(runs: int) -> None:
    model, x = Scripted(), torch.randn(2, DIM)
    for _ in range(runs):
        model(x).sum().backward()
    eulernet.patch(model, 0.3, example_inputs=x)
    expected = x + 0.3 * (torch.tanh(model.a(x)) + model.a.bias)
    torch.testing.assert_close(model(x), expected)


# ---- what is refused

REFUSED = {
    overwritten: "was written into",
    written_by_addcmul: "was written into",
    halved: "does more with it",
    keeping: "the sum is kept, or read",
    reading: "the sum is kept, or read",
    skip_made_inside: "is not at hand",
    doubled: "does more with it",
}


@pytest.mark.parametrize(("function", "why"), REFUSED.items(), ids=[f.__name__ for f in REFUSED])
def test_what_is_not_proven_is_named_and_left_alone(function: Any, why: str) -> None:
    torch.manual_seed(0)
    model = Beside(function).double()
    y = X + 0.3 * model.a(X)
    left = function(model, y)
    with pytest.warns(eulernet.EulernetWarning, match=f"<root>.*{why}"):
        eulernet.patch(model, 0.3, example_inputs=X)
    assert len(eulernet.steps(model)) == 1
    torch.testing.assert_close(model(X), left)


def test_a_function_that_was_compiled_is_scaled_from_outside() -> None:
    @torch.compile(backend="eager")
    def add(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = eulernet.patch(Compiled(add).double(), 0.3, example_inputs=X)
    with torch.no_grad():
        torch.testing.assert_close(both(X), X + 0.3 * both.a(X))


def test_gradients_by_hand_are_those_of_h_times_the_branch() -> None:
    model = eulernet.patch(Compiled(ByHand.apply).double(), 0.3, example_inputs=X)
    assert torch.autograd.gradcheck(model, (X.clone().requires_grad_(),))
    model(X).sum().backward()
    torch.testing.assert_close(model.a.bias.grad, torch.full_like(model.a.bias, 0.3 * len(X)))
