"""h from depth: each rule against its formula."""

import copy
import json
import math
import pickle
import re
from typing import Any

import pytest
from torch import Tensor, nn

import eulernet
from eulernet import EulernetError, Step, schedules
from tests.helpers.refusals import refused
from tests.helpers.scheduled import DIM, RULES, Repeated, Towers, X, factors, net, patched

# ----------------------------------------------------------------------------------------------------- rules from depth


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("depth", [1, 2, 9, 24])
def test_a_rule_gives_its_formula(rule: Any, depth: int) -> None:
    expected = [RULES[rule](depth, position) for position in range(1, depth + 1)]
    assert factors(patched(depth, rule)) == pytest.approx(expected, rel=1e-15)


def test_the_first_step_of_decreasing_is_above_one() -> None:
    assert factors(patched(3, schedules.decreasing())) == pytest.approx(
        [1 / math.log(2), 1 / (math.sqrt(2) * math.log(3)), 1 / (math.sqrt(3) * math.log(4))], rel=1e-15
    )


def test_auto_is_inverse_sqrt() -> None:
    model = patched(9, "auto")
    assert factors(model) == [1 / 3] * 9 == factors(patched(9, schedules.inverse_sqrt()))
    eulernet.set_h(model, 0.1)
    assert factors(eulernet.set_h(model, "auto")) == [1 / 3] * 9


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_rule_is_its_repr_and_equal_to_its_copies(rule: Any) -> None:
    assert eval(repr(rule), vars(schedules)) == rule == copy.deepcopy(rule) == pickle.loads(pickle.dumps(rule))
    with pytest.raises(AttributeError):
        rule.c = 2


@pytest.mark.parametrize("name", ["constant", "inverse_sqrt", "inverse"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "1", None, True, 1j])
def test_a_rule_refuses_a_constant_that_is_not_positive(name: str, value: Any) -> None:
    with pytest.raises(EulernetError, match=rf"positive.*{re.escape(repr(value))}.*{name}\("):
        getattr(schedules, name)(value)


def test_a_vit_of_12_blocks_has_24_steps() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224")
    steps = eulernet.steps(eulernet.patch(model, "auto"))
    assert [step.position for step in steps] == list(range(1, 25))
    assert [step.h for step in steps] == [1 / math.sqrt(24)] * 24
    # A source that counts the 12 blocks has L = 12.
    assert schedules.inverse(c=2)(steps[0]) == 1 / 12
    assert schedules.inverse_sqrt(c=2**0.5)(steps[0]) == pytest.approx(12**-0.5, rel=1e-15)


def test_a_module_that_is_called_several_times_has_the_position_of_its_first_call() -> None:
    steps = eulernet.find_steps(Repeated(), example_inputs=X)
    assert [(step.name, step.calls, step.position, step.depth) for step in steps] == [
        ("first", 1, 1, 5),
        ("middle", 3, 2, 5),
        ("last", 1, 5, 5),
    ]
    assert schedules.decreasing()(steps[1]) == 1 / (math.sqrt(2) * math.log(3))


def test_each_stream_has_its_own_depth_and_positions() -> None:
    steps = eulernet.find_steps(Towers(), example_inputs=(X, X))
    assert [(step.depth, step.position) for step in steps] == [(3, 1), (3, 2), (3, 3), (2, 1), (2, 2)]


def test_both_branches_of_a_parallel_step_have_one_position() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.a(x) + self.b(x)

    steps = eulernet.find_steps(nn.Sequential(Parallel(), Parallel()), example_inputs=X)
    assert [(step.kind, step.position, step.depth) for step in steps] == [("parallel", 1, 2), ("parallel", 2, 2)]


def test_positions_go_to_json() -> None:
    steps = eulernet.steps(patched(3))
    assert [step["position"] for step in json.loads(steps.to_json())["steps"]] == [1, 2, 3]
    assert eulernet.Steps.from_json(steps.to_json()) == steps


def test_a_rule_that_was_not_called_is_refused() -> None:
    model = net()
    rule = schedules.inverse
    refused(model, lambda: eulernet.patch(model, rule, example_inputs=X), "h=inverse is a class", r"inverse\(\)")


@pytest.mark.parametrize("word", ["Auto", "", "inverse", "0.1"])
def test_another_word_than_auto_is_refused(word: str) -> None:
    model = net()
    refused(model, lambda: eulernet.patch(model, word, example_inputs=X), re.escape(repr(word)), '"auto"', "inverse")
    eulernet.patch(model, 0.25, example_inputs=X)
    refused(model, lambda: eulernet.set_h(model, word), re.escape(repr(word)), '"auto"')
    assert factors(model) == [0.25] * 4


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_rule_takes_a_step() -> None:
    step = Step(0, "0", "Block", "identity", (), 1, 0, depth=16, position=1)
    assert schedules.inverse_sqrt()(step) == 0.25
