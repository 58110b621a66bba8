"""`patch`, `set_h` and `unpatch` where h is learned."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import eulernet
from eulernet import EulernetError
from eulernet._run.learned import step_parameters
from tests.helpers.learned import NAMES, Net, X, factors, logs, net
from tests.helpers.refusals import refused
from tests.traps.base import Block

# Where Dynamo looks at the attributes of a tensor, torch warns of .grad; as an error that would stop the compilation.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning",
    "ignore:the stream from the model:eulernet.EulernetWarning",  # test_traps.py asserts that long steps are named
)


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
