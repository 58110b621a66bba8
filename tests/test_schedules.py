"""h from depth: each rule against its formula. h over training time: values, resuming, compiled graphs, refusals."""

import copy
import io
import json
import math
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import eulernet
from eulernet import EulernetError, HScheduler, Step, schedules
from tests.helpers.refusals import refused
from tests.traps.base import Block

DIM = 8
X = torch.linspace(-1, 1, 2 * DIM).view(2, DIM)


def net(depth: int = 4) -> nn.Sequential:
    return nn.Sequential(*(Block() for _ in range(depth)))


def patched(depth: int = 4, h: Any = 0.1) -> nn.Sequential:
    return eulernet.patch(net(depth), h, example_inputs=X)


def factors(model: nn.Module) -> list[float | None]:
    return [step.h for step in eulernet.steps(model)]


# ----------------------------------------------------------------------------------------------------- rules from depth

RULES: dict[Any, Callable[[int, int], float]] = {  # the rule -> its formula in D and l
    schedules.constant(0.3): lambda depth, position: 0.3,
    schedules.inverse_sqrt(): lambda depth, position: depth**-0.5,
    schedules.inverse_sqrt(2): lambda depth, position: 2 * depth**-0.5,
    schedules.inverse(): lambda depth, position: 1 / depth,
    schedules.inverse(c=0.5): lambda depth, position: 0.5 / depth,
    schedules.decreasing(): lambda depth, position: position**-0.5 / math.log1p(position),
}


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


class Repeated(nn.Module):
    """One block that is called three times, between two that are called once, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = Block(), Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self.middle(x)
        return self.last(x)


def test_a_module_that_is_called_several_times_has_the_position_of_its_first_call() -> None:
    steps = eulernet.find_steps(Repeated(), example_inputs=X)
    assert [(step.name, step.calls, step.position, step.depth) for step in steps] == [
        ("first", 1, 1, 5),
        ("middle", 3, 2, 5),
        ("last", 1, 5, 5),
    ]
    assert schedules.decreasing()(steps[1]) == 1 / (math.sqrt(2) * math.log(3))


class Towers(nn.Module):
    """Two streams, of three and of two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = net(3), net(2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(y)


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


# ------------------------------------------------------------------------------------------------------------ suggest_h


@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_the_bounds_are_those_of_the_propositions(gain: float) -> None:
    depth = 20
    for row in eulernet.suggest_h(depth, gain=gain).bounds:
        expected = [RULES.get(row.rule, lambda d, p, h=row.h[0]: h)(depth, p) for p in range(1, depth + 1)]
        assert row.h == pytest.approx(expected, rel=1e-15)
        assert 10**row.log10_gradient == pytest.approx(math.prod(1 + h * gain for h in row.h), rel=1e-12)
        assert row.noise == pytest.approx(sum(row.h) * gain, rel=1e-12)
    text = str(eulernet.suggest_h(depth, gain=gain))
    assert f"x {(1 + 20**-0.5 * gain) ** 20:.3g}" in text and f"e + {20**0.5 * gain:.3g}" in text
    for words in ("(sqrt(d) + h W)^D", "e + h D W", f"W = {gain:g}"):
        assert words in text


def test_no_depth_is_too_large() -> None:
    rows = eulernet.suggest_h(5000).bounds
    assert rows[0].log10_gradient == pytest.approx(5000 * math.log10(2), rel=1e-12)
    assert "1e1505" in str(eulernet.suggest_h(5000))


@pytest.mark.parametrize(("depth", "shallow"), [(1, True), (9, True), (24, False), (54, False)])
def test_it_is_said_where_a_model_is_shallow(depth: int, shallow: bool) -> None:
    assert any(f"D = {depth} is shallow" in note for note in eulernet.suggest_h(depth).notes) == shallow


def test_each_depth_of_a_model_has_its_rows() -> None:
    suggestion = eulernet.suggest_h(Towers(), example_inputs=(X, X))
    assert [row.depth for row in suggestion.bounds] == [3] * 5 + [2] * 5
    assert "D = 3: a.0 to a.2" in str(suggestion) and "D = 2: b.0 to b.1" in str(suggestion)


def test_a_module_that_is_called_several_times_has_one_value_in_all_its_runs() -> None:
    model = Repeated()
    for row in eulernet.suggest_h(model, example_inputs=X).bounds:
        steps = eulernet.steps(eulernet.patch(model, row.rule, example_inputs=X))
        assert sorted(row.h) == sorted(step.h for step in steps for _ in range(step.calls) if step.h)
        assert row.depth == len(row.h) == 5


def test_a_side_branch_of_a_stream_has_the_steps_that_lead_to_it() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.long, self.side = net(2), net(3), net(1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.trunk(x)
            return self.long(x), self.side(x)

    rows = eulernet.suggest_h(Fork(), example_inputs=X).bounds
    expected = [schedules.decreasing()(step) for step in eulernet.find_steps(net(5), example_inputs=X)]
    assert [row.h for row in rows if row.rule == schedules.decreasing()] == [tuple(expected), tuple(expected[:3])]


def test_a_model_stays_as_it_is_and_may_be_patched() -> None:
    model = patched(3, [0.1, 0.2, 0.3])
    for one in (model, nn.DataParallel(model)):
        assert eulernet.suggest_h(one, example_inputs=X).bounds[0].depth == 3
    assert factors(model) == [0.1, 0.2, 0.3]


class Scaled(nn.Module):
    """A block with a scale at the end of its branch."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.a = nn.Linear(DIM, DIM)
        self.gamma = nn.Parameter(torch.full((DIM,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.a(x)


class Normed(nn.Module):
    """A block with a norm at the end of its branch."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM)
        nn.init.constant_(self.norm.weight, value)
        nn.init.zeros_(self.a.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.a(x))


@pytest.mark.parametrize(
    ("make", "value", "zero"),
    [(Scaled, 1e-6, "0.gamma"), (Scaled, 0.1, None), (Normed, 0.0, "0.norm.weight"), (Normed, 1.0, None)],
)
def test_branches_that_are_zero_at_initialisation_are_named(make: Any, value: float, zero: str | None) -> None:
    model = nn.Sequential(make(value), make(value), make(1.0))
    notes = eulernet.suggest_h(model, example_inputs=X).notes
    assert [note for note in notes if "zero at initialisation" in note] == (
        [] if zero is None else [note for note in notes if note.startswith("2 of 3 blocks") and zero in note]
    )
    assert any("eulernet.diagnose" in note for note in notes)


@pytest.mark.parametrize("zero", [True, False])
def test_the_default_initialisation_of_timm(zero: bool) -> None:
    timm = pytest.importorskip("timm")
    notes = eulernet.suggest_h(timm.create_model("resnet26", zero_init_last=zero)).notes
    assert any("8 of 8 blocks" in note and "layer1.0.bn3.weight" in note for note in notes) == zero


@pytest.mark.parametrize("value", [0, -3, True, 2.0, "resnet50", None, nn.Linear])
def test_suggest_h_refuses_what_is_no_depth(value: Any) -> None:
    with pytest.raises(EulernetError, match=re.escape(repr(value)) + r".*eulernet\.suggest_h\(54\)"):
        eulernet.suggest_h(value)


def test_suggest_h_of_a_model_without_steps() -> None:
    with pytest.raises(EulernetError, match="no residual steps"):
        eulernet.suggest_h(nn.Linear(DIM, DIM), example_inputs=X)
    with pytest.raises(EulernetError, match=r"gain.*positive.*-1"):
        eulernet.suggest_h(9, gain=-1)


# --------------------------------------------------------------------------------------------------- over training time

CURVES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda a, b, t: (1 - t) * a + t * b,
    "cosine": lambda a, b, t: (a + b) / 2 + (a - b) / 2 * math.cos(math.pi * t),
    "exponential": lambda a, b, t: math.exp((1 - t) * math.log(a) + t * math.log(b)),
}
kinds = pytest.mark.parametrize("kind", CURVES)


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


@pytest.fixture
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh")
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
def test_a_wrapped_model(wrap: Any) -> None:
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


def test_a_rule_takes_a_step() -> None:
    step = Step(0, "0", "Block", "identity", (), 1, 0, depth=16, position=1)
    assert schedules.inverse_sqrt()(step) == 0.25
