"""Layers of one's own: what they compute, and that their sums are steps like any."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import eulernet
from eulernet.nn import EulerStep, Recurrent, Residual
from tests.helpers.native import Classifier, Mixed, OwnCell, PlainResidual, branch

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CELLS: dict[str, Callable[[], nn.Module]] = {
    "GRU": lambda: nn.GRUCell(8, 8),
    "LSTM": lambda: nn.LSTMCell(8, 8),
    "RNN": lambda: nn.RNNCell(8, 8),
    "own": lambda: OwnCell(8),
}
SEQUENCE = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def hs(model: nn.Module) -> list[float | None]:
    return [step.h for step in eulernet.steps(model)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_euler_step_adds_h_times_the_second(dtype: torch.dtype) -> None:
    x, f = torch.randn(2, 4, 7).to(dtype)
    assert torch.equal(EulerStep(1.0)(x, f), x + f)
    assert torch.equal(EulerStep(0.25)(x, f), torch.add(x, f, alpha=0.25))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("h", [1.0, 0.3])
def test_a_residual_is_the_block_written_by_hand(h: float, training: bool) -> None:
    block = Residual(branch(3, 8, 2), h, "auto", nn.ReLU(), drop_path=0.3, layer_scale=0.5)
    plain = PlainResidual(copy.deepcopy(block), h)
    x = torch.randn(16, 3, 8, 8)
    results = []
    for model in (block, plain):
        model.train(training)
        if h != 1:
            model.double()
        torch.manual_seed(1)
        out = model(x.to(torch.float64 if h != 1 else torch.float32))
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        if h == 1:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_what_stands_around_the_sum_of_a_residual_is_handed_to_the_step() -> None:
    """Also where the first block that was made has none of it: all share one class."""
    bare, full = Residual(nn.Linear(4, 4)), Residual(nn.Linear(4, 4), 0.1, None, nn.ReLU(), 0.1, 0.1)
    assert type(bare) is type(full)
    called = type(bare).forward.__code__.co_names
    assert {"_euler_epilogue", "_euler_defer"} <= set(called) and "_euler_step" not in called


@pytest.mark.parametrize(
    "inner, x, projection",
    [
        (nn.Linear(4, 4), torch.zeros(2, 4), None),
        (nn.Linear(4, 6), torch.zeros(2, 4), nn.Linear(4, 6)),
        (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6)), torch.zeros(2, 5, 4), nn.Linear(4, 6)),
        (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), torch.zeros(2, 4), nn.Linear(4, 6)),
        (nn.Conv1d(4, 6, 3, 2, 1), torch.zeros(2, 4, 9), nn.Conv1d(4, 6, 1, 2)),
        (branch(4, 4), torch.zeros(2, 4, 8, 8), None),
        (
            branch(4, 6, 2),
            torch.zeros(2, 4, 9, 9),
            nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6)),
        ),
        (
            nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, (2, 1), 1)),
            torch.zeros(2, 4, 8, 8),
            nn.Sequential(nn.Conv2d(4, 6, 1, (2, 1), bias=False), nn.BatchNorm2d(6)),
        ),
        (nn.Conv3d(4, 6, 3, 2, 1), torch.zeros(2, 4, 8, 8, 8), nn.Conv3d(4, 6, 1, 2)),
    ],
    ids=str,
)
def test_the_shortcut_projects_where_shapes_differ(inner: nn.Module, x: Tensor, projection: nn.Module | None) -> None:
    before = {name: value.clone() for name, value in inner.state_dict().items()}
    block = Residual(inner, shortcut="auto", layer_scale=0.5)
    assert repr(block.shortcut) == repr(projection)
    assert block(x).shape == inner(x).shape
    assert block.layer_scale.lambda1.numel() == (6 if projection else 4)
    fresh = Residual(copy.deepcopy(inner), shortcut="auto").branch.state_dict()
    assert before.keys() == fresh.keys()


def test_the_branch_is_not_run_to_try_its_shapes() -> None:
    inner = branch(3, 8, 2)
    state = torch.get_rng_state()
    Residual(inner, layer_scale=0.1)
    assert torch.equal(state, torch.get_rng_state()) and int(inner[1].num_batches_tracked) == 0


@pytest.mark.parametrize("name", CELLS)
def test_with_h_1_a_recurrent_is_its_cell(name: str) -> None:
    cell = CELLS[name]()
    layer = Recurrent(cell, h=1.0)
    outputs, last = layer(SEQUENCE)
    state: Any = (torch.zeros(2, 8), torch.zeros(2, 8)) if name == "LSTM" else torch.zeros(2, 8)
    for x, output in zip(SEQUENCE, outputs, strict=True):
        before, state = state, cell(x, state)
        assert torch.equal(output, state[0] if name == "LSTM" else state)
        stepped = layer(x, before)
        assert all(map(torch.equal, stepped, state)) if name == "LSTM" else torch.equal(stepped, state)
    assert all(map(torch.equal, last, state)) if name == "LSTM" else torch.equal(last, state)


@pytest.mark.parametrize("name", CELLS)
def test_a_recurrent_goes_h_of_the_way(name: str) -> None:
    cell = CELLS[name]().double()
    sequence = SEQUENCE.double()
    outputs, _ = Recurrent(cell, h=0.3)(sequence)
    states = [torch.zeros(2, 8, dtype=torch.float64) for _ in range(2 if name == "LSTM" else 1)]
    for x, output in zip(sequence, outputs, strict=True):
        new = cell(x, tuple(states)) if name == "LSTM" else [cell(x, states[0])]
        states = [s + 0.3 * (n - s) for s, n in zip(states, new, strict=True)]
        torch.testing.assert_close(output, states[0], rtol=1e-12, atol=1e-14)


def test_time_may_be_the_second_dimension() -> None:
    cell = nn.GRUCell(8, 8)
    outputs, last = Recurrent(cell, h=0.3)(SEQUENCE)
    other, same = Recurrent(cell, h=0.3, batch_first=True)(SEQUENCE.transpose(0, 1))
    assert torch.equal(other.transpose(0, 1), outputs) and torch.equal(same, last)
    alone = Recurrent(cell, h=0.3, sequence=True, batch_first=True)(SEQUENCE[:, 0])[0]  # without a batch, as in torch
    torch.testing.assert_close(alone, outputs[:, 0])  # a product with a vector rounds otherwise


@pytest.mark.parametrize("name", CELLS)
def test_patch_settles_the_h_of_a_cell_by_the_length_of_the_sequence(name: str) -> None:
    model = eulernet.patch(Classifier(CELLS[name](), h="auto"), h="auto", example_inputs=SEQUENCE.transpose(0, 1))
    (step,) = eulernet.steps(model)
    assert (step.name, step.depth, step.h) == ("recurrent", 5, 5**-0.5)


def test_native_and_rewritten_steps_are_settled_by_one_call() -> None:
    model = Mixed(h="auto").eval()
    with pytest.raises(eulernet.EulernetError, match=r'not settled yet; call eulernet.patch\(model, h="auto"'):
        model(IMAGE)
    for call in (eulernet.steps, lambda m: eulernet.set_h(m, 0.1), lambda m: eulernet.HScheduler(m, total_steps=2)):
        with pytest.raises(eulernet.EulernetError, match="not settled yet"):
            call(model)
    assert "EulerStep(h=auto)" in repr(model)
    eulernet.patch(copy.deepcopy(model).double(), h="auto", example_inputs=IMAGE.double())
    eulernet.patch(model, h="auto", example_inputs=IMAGE)
    assert [(step.name, step.depth) for step in eulernet.steps(model)] == [
        *(("first", 4), ("second", 4), ("own", 4), ("step", 4))
    ]
    assert hs(model) == [0.5] * 4
    model(IMAGE)


def test_a_rule_waits_until_the_depth_is_known() -> None:
    model = nn.Sequential(Residual(nn.Linear(4, 4)), Residual(nn.Linear(4, 4)))
    with pytest.raises(eulernet.EulernetError, match="which nobody has traced yet"):
        eulernet.set_h(model, "auto")
    assert hs(model) == [0.1, 0.1]
    assert [step.index for step in eulernet.steps(model)] == [0, 1]
    eulernet.patch(model, 0.2, example_inputs=torch.zeros(2, 4))
    assert hs(eulernet.set_h(model, "auto")) == [1 / math.sqrt(2)] * 2


def test_the_layers_are_steps_from_the_start() -> None:
    model = Mixed(0.1)
    assert eulernet.is_patched(model) and hs(model) == [0.1] * 3
    assert {name for name in model.state_dict() if "h" in name.split(".")} == set()
    assert hs(eulernet.set_h(model, {"first": 0.5, "*": 0.25})) == [0.5, 0.25, 0.25]
    schedule = eulernet.HScheduler(model, 1.0, 0.5, total_steps=2)
    schedule.step()
    assert hs(model) == [0.75] * 3
    assert hs(copy.deepcopy(model)) == hs(pickle.loads(pickle.dumps(model))) == [0.75] * 3
    assert type(eulernet.unpatch(model).step) is EulerStep and not eulernet.is_patched(model)
    assert isinstance(Mixed().step, EulerStep)


def test_all_that_looks_at_steps_sees_them() -> None:
    model, data = Mixed(0.1), (IMAGE, torch.zeros(2, 16))

    assert eulernet.diagnose(model, data, nn.functional.mse_loss).depth == 3
    with eulernet.watch(model) as log:
        nn.functional.mse_loss(model(data[0]), data[1]).backward()
        log.step()
    assert len(log.records[0]["step_size"]) == 3
    model = Mixed()
    eulernet.patch(model, 0.5, trainable=True, example_inputs=IMAGE, include=["first", "step"])
    assert [name for name, _ in model.named_parameters() if "log_h" in name] == ["first.log_h_bias", "step.log_h_bias"]
    model = eulernet.patch(Mixed(), 0.5, example_inputs=IMAGE).eval()
    before = model(IMAGE)
    torch.testing.assert_close(eulernet.fold(model, example_inputs=IMAGE)(IMAGE), before)
    assert not eulernet.is_patched(model)


def test_another_h_compiles_nothing_again() -> None:
    model = nn.Sequential(Residual(nn.Linear(8, 8), 0.1), Recurrent(nn.GRUCell(8, 8), 1.0)).eval()
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for h in (1.0, 0.3, 0.7):
        eulernet.set_h(model, h)
        torch.testing.assert_close(compiled(SEQUENCE[0]), model(SEQUENCE[0]))
    assert graphs.frame_count == 1


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: EulerStep(0), "EulerStep: h must be a positive, finite number, not 0; for example h=0.1"),
        (lambda: EulerStep("auto0"), "EulerStep: h must be a positive"),
        (lambda: Residual(torch.relu), "x = EulerStep(h)(x, function(x))"),
        (lambda: Residual(nn.ReLU(), shortcut="auto"), 'shortcut="auto" has none; pass the projection'),
        (lambda: Residual(nn.ReLU(), layer_scale=0.1), "pass a tensor: layer_scale=torch.full((8,), 1e-5)"),
        (lambda: Residual(nn.Conv2d(3, 4, 3), shortcut="auto"), "pad the branch's convolutions"),
        (lambda: Residual(nn.Linear(2, 2), shortcut="conv"), 'must be a module, None or "auto"'),
        (lambda: Residual(nn.Linear(2, 2), activation=torch.relu), "for example nn.ReLU()"),
        (lambda: Residual(nn.Linear(2, 2), drop_path=1), "drop_path=1 must be a number from 0"),
        (lambda: Residual(nn.Linear(2, 2), layer_scale=-1), "layer_scale must be a positive"),
        (lambda: Recurrent(nn.GRU(4, 8)), "use Recurrent(nn.GRUCell(4, 8))"),
        (lambda: Recurrent(torch.tanh), "cell must be a module"),
        (lambda: Recurrent(OwnCell(8, says=False))(SEQUENCE), "pass the state: layer(xs, torch.zeros(2, 8))"),
    ],
)
def test_errors_say_what_to_write(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(eulernet.EulernetError) as error:
        make()
    assert words in str(error.value)
