"""A patched model has the state, the names and the hooks of the original."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import eulernet
from tests.helpers.copied import FACTORS, Net, factors
from tests.traps.base import DIM, Block
from tests.traps.classes import Extended, ZeroArgumentSuper

# ------------------------------------------------------------------------------------------------- state and identity


def test_state_dict_has_the_same_keys_and_loads_both_ways(original: Net, model: Net, x: Tensor) -> None:
    assert list(model.state_dict()) == list(original.state_dict())
    other = Net().eval()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), original(x))
    expected = model(x)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    assert not torch.equal(model(x), expected)
    model.load_state_dict(original.state_dict(), strict=True)
    assert torch.equal(model(x), expected)
    assert factors(model) == FACTORS  # what was loaded holds no h


def test_names_of_everything_are_the_originals(original: Net, model: Net) -> None:
    assert [name for name, _ in model.named_modules()] == [name for name, _ in original.named_modules()]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in original.named_parameters()]
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in original.named_buffers()]
    for (name, module), (_, other) in zip(model.named_modules(), original.named_modules(), strict=True):
        assert isinstance(module, type(other)), name
        assert type(module).__name__ == type(other).__name__
        assert type(module).__qualname__ == type(other).__qualname__
        assert type(module).__module__ == type(other).__module__


def test_a_patched_block_is_its_class_only(model: Net) -> None:
    assert isinstance(model.plain, Block)
    assert not isinstance(model.plain, Extended)
    assert issubclass(type(model.extended), Extended)
    assert isinstance(model.extended, Block)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_h_keeps_its_value_when_the_model_changes_dtype(model: Net, x: Tensor, dtype: torch.dtype) -> None:
    """A registered buffer would be rounded by ``half``."""
    eulernet.set_h(model, 0.1)
    model.to(dtype).to(torch.float64)
    reference = model.plain.reference(x.double(), 0.1)
    torch.testing.assert_close(model.plain(x.double()), reference, rtol=1e-14, atol=1e-14)
    assert factors(model) == [0.1] * 6


def test_repr_shows_h(model: Net) -> None:
    text = repr(model)
    for factor in FACTORS:
        assert f"h={factor}" in text
    assert "h=" not in repr(eulernet.unpatch(model))


def test_a_block_with_an_own_extra_repr_shows_both(x: Tensor) -> None:
    model = ZeroArgumentSuper()
    before = repr(model)
    eulernet.patch(model, 0.25, example_inputs=torch.randn(2, DIM, 4, 4))
    (line,) = [line for line in repr(model).splitlines() if "ResidualConv" in line]
    assert "kernel_size=(3, 3)" in line and "h=0.25" in line
    eulernet.unpatch(model)
    assert repr(model) == before


# ------------------------------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_run(original: Net, x: Tensor, when: str) -> None:
    seen: list[str] = []

    def register(model: Net) -> None:
        model.plain.register_forward_pre_hook(lambda module, args: seen.append("pre"))
        model.plain.register_forward_hook(lambda module, args, out: seen.append("post"))
        model.extended.register_forward_hook(lambda module, args, out: out * 2)  # which patch warns of
        model.plain.register_full_backward_hook(lambda module, grads, out: seen.append("backward"))

    if when == "before":
        register(original)
    with pytest.warns(eulernet.EulernetWarning, match="extended: forward hooks") if when == "before" else nullcontext():
        patched = eulernet.patch(copy.deepcopy(original), 1.0, example_inputs=x)
    if when == "after":
        register(original)
        register(patched)
    assert seen == []
    x.requires_grad_()
    expected = original(x)
    expected.sum().backward()
    assert seen == ["pre", "post", "backward"]
    actual = patched(x)
    actual.sum().backward()
    assert seen == ["pre", "post", "backward"] * 2
    assert torch.equal(actual, expected)
    eulernet.unpatch(patched)
    assert torch.equal(patched(x), expected)
    assert seen == ["pre", "post", "backward"] * 2 + ["pre", "post"]


def test_a_module_replaced_after_patching_is_the_one_that_runs(model: Net, x: Tensor) -> None:
    model.plain.a = nn.Linear(DIM, DIM)
    torch.testing.assert_close(model.plain(x), model.plain.reference(x, FACTORS[0]))
