"""A model is not refused for one addition: what cannot be scaled is named, the rest is patched."""

import pytest
import torch
from torch import Tensor, nn

import eulernet
from tests.traps.base import DIM, linear


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x)


class OnceInTwo(Block):
    """What is traced is not what runs next: the addition is a step in every other call only."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        if type(self).calls % 4 in (1, 2):
            return x + self.a(x)
        return torch.stack((x, self.a(x))).sum(0)


def without_source() -> nn.Module:
    namespace: dict[str, object] = {"__name__": "nowhere", "nn": nn, "Block": Block}
    exec("class Sourceless(Block):\n    def forward(self, x):\n        return self.a(x) + x\n", namespace)
    return namespace["Sourceless"]()  # type: ignore[operator, no-any-return]


def test_a_block_without_source_is_named_and_the_rest_is_patched() -> None:
    model, x = nn.Sequential(Block(), without_source(), Block()), torch.randn(2, DIM)
    with pytest.warns(eulernet.EulernetWarning, match=r"not scaled: 1 \(Sourceless\): .*has no source"):
        eulernet.patch(model, [0.3, 0.5, 0.7], example_inputs=x)
    assert [(step.name, step.h) for step in eulernet.steps(model)] == [("0", 0.3), ("2", 0.7)]
    y = x + 0.3 * model[0].a(x)
    y = model[1](y)
    torch.testing.assert_close(model(x), y + 0.7 * model[2].a(y))


@pytest.mark.parametrize("include", ["1", ["0", "1"]])
def test_where_include_names_it_there_is_an_error(include: object) -> None:
    model, x = nn.Sequential(Block(), without_source(), Block()), torch.randn(2, DIM)
    with pytest.raises(eulernet.EulernetError, match=r"1 \(Sourceless\): .*has no source.*exclude='1'"):
        eulernet.patch(model, 0.3, example_inputs=x, include=include)
    assert not eulernet.is_patched(model)
    with pytest.warns(eulernet.EulernetWarning, match="not scaled: 1"):
        eulernet.patch(model, 0.3, example_inputs=x, include="*")


def test_where_nothing_is_left_there_is_an_error() -> None:
    model, x = nn.Sequential(without_source(), without_source()), torch.randn(2, DIM)
    with pytest.raises(eulernet.EulernetError, match=r"0 \(Sourceless\): .*has no source"):
        eulernet.patch(model, 0.3, example_inputs=x)


def test_what_does_not_run_as_a_step_is_left_out_of_the_proof() -> None:
    model, x = nn.Sequential(Block(), OnceInTwo(), Block()), torch.randn(2, DIM)
    with pytest.warns(eulernet.EulernetWarning, match=r"not scaled: 1 \(OnceInTwo\): the addition at .* ran 1 times"):
        eulernet.patch(model, 0.3, example_inputs=x, trainable=True)
    assert [step.name for step in eulernet.steps(model)] == ["0", "2"]
    assert [name for name, _ in model.named_parameters() if "log_h" in name] == ["0.log_h_bias", "2.log_h_bias"]
    assert type(model[1]) is OnceInTwo


class GivenAgain(nn.Module):
    """A map of the first state is added behind each block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.maps = (nn.ModuleList(linear() for _ in range(3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for block, again in zip(self.blocks, self.maps, strict=True):
            x = x + torch.tanh(block(x))
            x = x + again(first)
        return x


def test_a_state_that_is_given_again_through_a_map_is_named_and_not_scaled() -> None:
    model, x = GivenAgain(), torch.randn(2, 5, DIM)
    with pytest.warns(eulernet.EulernetWarning, match="not scaled, because not supported"):
        eulernet.patch(model, 0.3, example_inputs=x)
    assert [step.name for step in eulernet.steps(model)] == ["blocks.0", "blocks.1", "blocks.2"]
    y = x
    for block, again in zip(model.blocks, model.maps, strict=True):
        y = y + 0.3 * torch.tanh(block(y)) + again(x)
    torch.testing.assert_close(model(x), y)
