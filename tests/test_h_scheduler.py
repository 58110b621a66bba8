"""h over training: `HScheduler`, its curves, its state and what it refuses."""

import copy
import io
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import eulernet
from eulernet import EulernetError, HScheduler, schedules
from tests.helpers.refusals import refused
from tests.helpers.scheduled import DIM, X, factors, net, patched

CURVES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda a, b, t: (1 - t) * a + t * b,
    "cosine": lambda a, b, t: (a + b) / 2 + (a - b) / 2 * math.cos(math.pi * t),
    "exponential": lambda a, b, t: math.exp((1 - t) * math.log(a) + t * math.log(b)),
}

kinds = pytest.mark.parametrize("kind", CURVES)


# --------------------------------------------------------------------------------------------------- over training time


@kinds
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.1), (0.01, 1.0), (0.3, 0.3)])
def test_h_follows_the_curve_and_stays_at_the_end(kind: Any, start: float, end: float) -> None:
    model = patched()
    schedule = HScheduler(model, start, end, total_steps=7, kind=kind)
    assert factors(model) == schedule.get_last_h() == [start] * 4
    seen = []
    for i in range(1, 10):
        schedule.step()
        assert factors(model) == schedule.get_last_h()
        seen.append(factors(model)[0])
        assert seen[-1] == pytest.approx(CURVES[kind](start, end, min(i / 7, 1)), rel=1e-14)
    assert seen[6:] == [end] * 3
    if start == end:
        assert set(seen) == {start}


@pytest.mark.parametrize("one", ["auto", schedules.decreasing(), [0.1, 0.2, 0.3, 0.4], {"0": 0.5, "*": 0.25}, 2])
def test_both_ends_are_given_as_for_patch(one: Any) -> None:
    expected = factors(patched(4, one))
    model = patched()
    schedule = HScheduler(model, end=one, total_steps=2)
    assert factors(model) == [1.0] * 4
    schedule.step()
    assert factors(model) == pytest.approx([(1 + h) / 2 for h in expected], rel=1e-15)
    schedule.step()
    assert factors(model) == expected
    HScheduler(model, start=one, total_steps=2)
    assert factors(model) == expected


def test_steps_of_a_saved_model_are_an_end() -> None:
    steps = eulernet.Steps.from_json(eulernet.steps(patched(4, [0.1, 0.2, 0.3, 0.4])).to_json())
    model = patched()
    schedule = HScheduler(model, end=steps, total_steps=1)
    schedule.step()
    assert factors(model) == [0.1, 0.2, 0.3, 0.4]


def train(model: nn.Module, optimizer: Any, schedule: HScheduler, steps: range) -> list[float]:
    losses = []
    for i in steps:
        torch.manual_seed(i)
        optimizer.zero_grad()
        loss = (model(torch.randn(4, DIM)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@kinds
def test_resuming_in_the_middle_is_the_undisturbed_run_bit_for_bit(kind: Any) -> None:
    undisturbed = patched()
    begin = copy.deepcopy(undisturbed)

    def parts(model: nn.Module, **arguments: Any) -> tuple[Any, HScheduler]:
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), HScheduler(model, **arguments)

    optimizer, schedule = parts(undisturbed, start=1.0, end="auto", total_steps=11, kind=kind)
    losses = train(undisturbed, optimizer, schedule, range(16))

    first = copy.deepcopy(begin)
    optimizer, schedule = parts(first, start=1.0, end="auto", total_steps=11, kind=kind)
    assert train(first, optimizer, schedule, range(6)) == losses[:6]
    file = io.BytesIO()
    torch.save({"m": first.state_dict(), "o": optimizer.state_dict(), "s": schedule.state_dict()}, file)
    file.seek(0)

    again = copy.deepcopy(begin)  # the optimiser and the schedule are made with other arguments, which are replaced
    optimizer, schedule = parts(again, start=0.5, total_steps=3)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["m"])
    optimizer.load_state_dict(saved["o"])
    schedule.load_state_dict(saved["s"])
    assert factors(again) == factors(first)
    assert train(again, optimizer, schedule, range(6, 16)) == losses[6:]
    assert factors(again) == factors(undisturbed) == [0.5] * 4
    for (name, p), q in zip(again.named_parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_state_is_json() -> None:
    schedule = HScheduler(patched(), total_steps=3, end=[0.1, 0.2, 0.3, 0.4])
    schedule.step()
    state = json.loads(json.dumps(schedule.state_dict()))
    assert state == schedule.state_dict()
    other = HScheduler(patched(), total_steps=9)
    other.load_state_dict(state)
    assert other.state_dict() == schedule.state_dict() and other.get_last_h() == schedule.get_last_h()


def test_changing_the_state_that_was_returned_changes_nothing() -> None:
    schedule = HScheduler(patched(), total_steps=3)
    schedule.state_dict()["start"][0] = 9.0
    schedule.get_last_h()[0] = 9.0
    assert schedule.get_last_h() == [1.0] * 4


@pytest.mark.usefixtures("recompiled")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_annealing_compiles_once(training: bool) -> None:
    """More values of h than Dynamo's limit of recompilations, each with the values that eager mode computes."""
    model = patched().train(training)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    schedule = HScheduler(compiled, total_steps=torch._dynamo.config.recompile_limit + 5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(schedule.total_steps + 2):
            torch.testing.assert_close(compiled(X), model(X), rtol=1e-5, atol=1e-6)  # fused in another order
            schedule.step()
    assert counter.frame_count == 1
    assert factors(model) == [0.1] * 4


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_a_wrapped_model_is_scheduled(wrap: Any) -> None:
    model = patched()
    schedule = HScheduler(wrap(model), total_steps=2, end=0.5)
    schedule.step()
    assert factors(model) == [0.75] * 4


def test_the_schedule_follows_a_model_that_is_moved() -> None:
    model = patched()
    schedule = HScheduler(model, total_steps=2, end=0.5)
    model.double()
    schedule.step()
    torch.testing.assert_close(model[0](X.double()), model[0].reference(X.double(), 0.75), rtol=1e-14, atol=1e-14)


def test_set_h_in_between_lasts_until_the_next_step() -> None:
    model = patched()
    schedule = HScheduler(model, total_steps=1, end=0.5)
    schedule.step()
    eulernet.set_h(model, 0.2)
    schedule.step()
    assert factors(model) == [0.5] * 4


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"total_steps": 0}, ["total_steps", "at least 1", "not 0"]),
        ({"total_steps": 2.5}, ["total_steps", "2.5"]),
        ({"total_steps": True}, ["total_steps", "True"]),
        ({"total_steps": None}, ["total_steps", "None"]),
        ({"total_steps": 3, "kind": "step"}, ["kind", "'linear', 'cosine', 'exponential'", "'step'"]),
        ({"total_steps": 3, "kind": None}, ["kind", "None"]),
        ({"total_steps": 3, "kind": ["linear"]}, ["kind"]),
        ({"total_steps": 3, "start": 0}, ["start", "positive", "not 0"]),
        ({"total_steps": 3, "end": -0.1}, ["end", "positive", "-0.1"]),
        ({"total_steps": 3, "end": [0.1]}, ["end", "1 values", "4 steps"]),
        ({"total_steps": 3, "end": "automatic"}, ["end", "automatic", '"auto"']),
        ({"total_steps": 3, "end": {"7": 0.1}}, ["end", "'7'", "matches no step"]),
    ],
    ids=str,
)
def test_a_wrong_argument_changes_nothing(arguments: dict[str, Any], words: list[str]) -> None:
    model = patched(4, 0.25)
    refused(model, lambda: HScheduler(model, **arguments), *map(re.escape, words))
    assert factors(model) == [0.25] * 4


def test_a_model_that_is_not_patched_or_no_model() -> None:
    model = net()
    refused(model, lambda: HScheduler(model, total_steps=3), "not patched", r"eulernet\.patch\(model")
    with pytest.raises(EulernetError, match=r"nn\.Module"):
        HScheduler("resnet50", total_steps=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", ["patch", "unpatch"])
def test_a_schedule_of_a_model_that_was_patched_again_says_so(change: str) -> None:
    """It would go on to set factors that nothing reads."""
    model = patched()
    schedule = HScheduler(model, total_steps=4)
    schedule.step()
    state = schedule.state_dict()
    if change == "patch":
        eulernet.patch(model, 0.3, example_inputs=X)
    else:
        eulernet.unpatch(model)
    for call in (schedule.step, lambda: schedule.load_state_dict(state)):
        with pytest.raises(EulernetError, match=r"patched again or unpatched.*load_state_dict"):
            call()
    assert schedule.state_dict() == state
    if change == "patch":
        assert factors(model) == [0.3] * 4
        another = HScheduler(model, total_steps=1)
        another.load_state_dict(schedule.state_dict())  # as the error says
        assert factors(model) == schedule.get_last_h()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda s: s.pop("kind"), "no kind"),
        (lambda s: s.clear(), "no end, kind, last_step"),
        (lambda s: s.update(last_step=-1), "last_step"),
        (lambda s: s.update(total_steps="many"), "total_steps.*'many'"),
        (lambda s: s.update(kind="cubic"), "'cubic'"),
        (lambda s: s.update(start=[1.0, 1.0]), "start.*2 values"),
        (lambda s: s.update(end=[0.1, 0.1, math.nan, 0.1]), "end.*positive"),
        (lambda s: s.update(steps=["0", "1"]), "2 steps, this one has 4.*2, 3"),
        (lambda s: s.update(steps=["1", "0", "2", "3"]), "order"),
    ],
)
def test_a_wrong_state_changes_nothing(edit: Callable[[dict[str, Any]], Any], words: str) -> None:
    model = patched()
    schedule = HScheduler(model, total_steps=4)
    schedule.step()
    before = schedule.state_dict()
    state = {**before, "last_step": 3}
    edit(state)
    with pytest.raises(EulernetError, match=words):
        schedule.load_state_dict(state)
    assert schedule.state_dict() == before and factors(model) == schedule.get_last_h()
