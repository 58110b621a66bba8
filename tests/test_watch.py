"""What `watch` records, against norms computed by hand; and that it leaves nothing behind and changes no number."""

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import eulernet
from eulernet import EulernetError
from tests.helpers.checks import snapshot
from tests.helpers.networks import ResNet, Tokens, linear, mlp

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


def train(model: nn.Module, x: Tensor, iterations: int, log: Any = None, lr: float = 0.01) -> list[Tensor]:
    """Some iterations of SGD; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for _ in range(iterations):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        if log is not None:
            log.step()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def norm(*tensors: Tensor | None) -> float:
    return torch.cat([t.double().flatten() for t in tensors if t is not None]).norm().item()


# ---- the numbers
def test_step_sizes_are_those_of_a_linear_network() -> None:
    """||h w x|| / ||x||, each step with its own h."""
    model = eulernet.patch(linear(3, 0.5), h=[0.1, 0.2, 0.4], example_inputs=X)
    with eulernet.watch(model) as log:
        train(model, X, 1, log)
    assert log.records[0]["step_size"] == pytest.approx({"0": 0.05, "1": 0.1, "2": 0.2}, rel=1e-12)


def test_norms_are_those_of_weights_and_gradients() -> None:
    """By default one norm for each module that holds a step; weights are those before the optimiser's step."""
    model, x = ResNet(8, (4, 6, 8)), torch.randn(4, 3, 8, 8)
    eulernet.patch(model, h=0.3, example_inputs=x)
    model.blocks[1].bn1.weight.requires_grad_(False)
    expected = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with eulernet.watch(model) as log:
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            log.step()
            blocks = {f"blocks.{i}": list(block.parameters()) for i, block in enumerate(model.blocks)}
            weights = {name: norm(*parameters) for name, parameters in blocks.items()}
            gradients = {name: norm(*(p.grad for p in parameters)) for name, parameters in blocks.items()}
            expected.append((weights, gradients))
            optimizer.step()
    assert [record["iteration"] for record in log.records] == [0, 1, 2]
    for record, (weights, gradients) in zip(log.records, expected, strict=True):
        assert record["weight"] == pytest.approx(weights, rel=1e-6)
        assert record["gradient"] == pytest.approx(gradients, rel=1e-6)
        assert list(record["step_size"]) == ["blocks.0", "blocks.1", "blocks.2"]


def test_layers_are_chosen_by_pattern() -> None:
    """As in Fig. 2: the weights of one layer; a module's norm is over all that is below it."""
    model, x = ResNet(14, (4, 6, 8)), torch.randn(4, 3, 8, 8)
    eulernet.patch(model, h=0.3, example_inputs=x)
    with eulernet.watch(model, layers=["blocks.*.conv2.weight", "blocks.1", "head", "<root>"], every=2) as log:
        train(model, x, 1, log)
    names = [f"blocks.{i}.conv2.weight" for i in range(6)] + ["blocks.1", "head", "<root>"]
    assert list(log.records[0]["weight"]) == list(log.records[0]["gradient"]) == names
    assert log.records[0]["gradient"]["<root>"] == pytest.approx(norm(*(p.grad for p in model.parameters())), rel=1e-6)
    with eulernet.watch(model, layers="stem.0.weight") as log:
        log.step()
    assert log.records[0]["weight"] == pytest.approx({"stem.0.weight": norm(model.stem[0].weight)}, rel=1e-6)


def test_without_gradients_they_are_left_out() -> None:
    model = eulernet.patch(linear(2, 0.5), h=0.1, example_inputs=X)
    with eulernet.watch(model) as log:
        log.step()
    assert log.records == [{"iteration": 0, "weight": {"0": 1.0, "1": 1.0}, "gradient": {}, "step_size": {}}]
    assert len(log.notes) == 1 and "no step was seen to run" in log.notes[0]


def test_every_k_th_iteration_is_recorded() -> None:
    model = eulernet.patch(mlp(3), h=0.1, example_inputs=torch.zeros(2, 8))
    x = torch.randn(4, 8)
    all_of_them: list[Any] = []
    some: list[Any] = []
    for every, into in ((1, all_of_them), (3, some)):
        twin = copy.deepcopy(model)
        with eulernet.watch(twin, every=every) as log:
            train(twin, x, 8, log)
        into += log.records
    assert [record["iteration"] for record in some] == [0, 3, 6]
    assert some == all_of_them[::3]


def test_repeated_calls_and_micro_batches_are_one_iteration() -> None:
    """The root of the sum of squares over all runs since the last record, by that of the skips."""
    block = linear(1, 0.5)[0]
    model = eulernet.patch(nn.Sequential(block, block), h=0.2, example_inputs=X)
    with eulernet.watch(model) as log:
        model(X).sum().backward()
        (100 * model(X)).sum().backward()
        log.step()
    assert log.records[0]["step_size"] == pytest.approx({"0": 0.1}, rel=1e-12)
    assert log.records[0]["gradient"]["0"] == pytest.approx(block.map.weight.grad.norm().item(), rel=1e-12)

    model = eulernet.patch(mlp(1)[:1].double(), h=1, example_inputs=torch.zeros(2, 8, dtype=torch.float64))
    xs = [torch.randn(2, 8, dtype=torch.float64) for _ in range(3)]
    with eulernet.watch(model) as log:
        for x in xs:
            model(x)
        log.step()
    eulernet.unpatch(model)
    branches = [model[0].second(torch.relu(model[0].first(x))) for x in xs]
    assert log.records[0]["step_size"]["0"] == pytest.approx(norm(*branches) / norm(*xs), rel=1e-12)


def test_validation_does_not_count() -> None:
    model = eulernet.patch(mlp(2).double(), h=0.1, example_inputs=torch.zeros(2, 8, dtype=torch.float64))
    x = torch.randn(4, 8, dtype=torch.float64)
    records = []
    for validate in (False, True):
        with eulernet.watch(model) as log:
            if validate:
                with torch.no_grad():
                    model(100 * x)
            model(x)
            log.step()
        records += log.records
    assert records[0] == records[1]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_step_size(use_reentrant: bool) -> None:
    """The branch runs twice, and the ratio is the same."""
    model = eulernet.patch(mlp(2)[:-1].double(), h=0.1, example_inputs=torch.zeros(2, 8, dtype=torch.float64))
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    with eulernet.watch(model) as log:
        model(x).sum().backward()
        log.step()
        checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
        log.step()
    assert log.records[1]["step_size"] == pytest.approx(log.records[0]["step_size"], rel=1e-12)


def test_mixed_precision_gives_the_norms_without_a_scaler() -> None:
    """Norms of half-precision tensors are taken in float32; gradients after `unscale_` are those without a scaler."""
    model, x = Tokens(2), torch.randint(11, (4, 6))
    eulernet.patch(model, h=0.5, example_inputs=x)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with eulernet.watch(model) as log:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        log.step()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        log.step()
    mixed, full = log.records
    assert mixed["weight"] == full["weight"]
    for kind in ("gradient", "step_size"):
        assert mixed[kind] == pytest.approx(full[kind], rel=0.05)  # bfloat16 has 8 bits


def test_norms_that_overflow_half_precision_are_computed_in_float32() -> None:
    model = eulernet.patch(
        linear(1, 100.0, width=64, dtype=torch.float16), h=1, example_inputs=torch.zeros(2, 64).half()
    )
    x = torch.full((64, 64), 300.0, dtype=torch.float16)
    with eulernet.watch(model) as log:
        model(x)
        log.step()
    assert log.records[0]["step_size"] == pytest.approx({"0": 100.0}, rel=1e-5)
    assert log.records[0]["weight"] == pytest.approx({"0": 800.0}, rel=1e-5)


# ---- where records go
def test_rows_are_written_as_json_lines(tmp_path: Path) -> None:
    model = eulernet.patch(mlp(3), h=0.1, example_inputs=torch.zeros(2, 8))
    path = tmp_path / "log.jsonl"
    for _ in range(2):  # a training that is resumed goes on in the same file
        with eulernet.watch(model, path=path) as log:
            train(model, torch.randn(4, 8), 40, log)
            assert len(path.read_text().splitlines()) >= 32  # not all is kept back until the end
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [*range(40), *range(40)]
    assert lines[40:] == log.records


def test_what_was_recorded_is_written_when_training_fails(tmp_path: Path) -> None:
    model = eulernet.patch(linear(2, 0.5), h=0.1, example_inputs=X)
    path = tmp_path / "log.jsonl"
    with pytest.raises(ZeroDivisionError), eulernet.watch(model, path=path) as log:
        train(model, X, 3, log)
        raise ZeroDivisionError
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [0, 1, 2]
    assert "_euler_step" not in vars(model[0])


def test_a_writer_is_told_each_number() -> None:
    class Writer:
        def __init__(self) -> None:
            self.scalars: dict[tuple[str, int], float] = {}

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.scalars[tag, step] = value

    model, writer = eulernet.patch(linear(2, 0.5), h=0.1, example_inputs=X), Writer()
    with eulernet.watch(model, writer=writer, every=2) as log:
        train(model, X, 3, log)
    assert writer.scalars == {
        (f"{kind}/{name}", record["iteration"]): record[kind][name]
        for record in log.records
        for kind in ("weight", "gradient", "step_size")
        for name in ("0", "1")
    }


# ---- nothing is left, and nothing is disturbed
def test_training_gives_the_same_bits_and_nothing_is_left() -> None:
    x = torch.randn(4, 3, 8, 8)
    model = eulernet.patch(ResNet(8, (4, 6, 8)), h=0.3, example_inputs=x)
    twin = copy.deepcopy(model)
    before = snapshot(model)
    with eulernet.watch(model) as log:
        losses = train(model, x, 3, log)
    assert snapshot(model) == before
    assert all(torch.equal(a, b) for a, b in zip(losses, train(twin, x, 3), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_copies_made_meanwhile_are_independent() -> None:
    model = eulernet.patch(linear(2, 0.5), h=0.1, example_inputs=X)
    before = snapshot(copy.deepcopy(model))
    buffer = io.BytesIO()
    with eulernet.watch(model) as log:
        model(X).sum().backward()
        twin = copy.deepcopy(model)
        pickled = pickle.loads(pickle.dumps(model))
        torch.save(model.state_dict(), buffer)
        eulernet.set_h(twin, 1.0)
        eulernet.set_h(pickled, 1.0)
        for other in (twin, pickled):
            torch.testing.assert_close(other(X), 1.5**2 * X)
            assert [vars(m).keys() for m in other] == [vars(m).keys() for m in copy.deepcopy(other)]
        log.step()
        eulernet.diagnose(model, X)
        assert list(model.state_dict()) == ["0.map.weight", "1.map.weight"]
    assert log.records[0]["step_size"] == pytest.approx({"0": 0.05, "1": 0.05}, rel=1e-12)
    for other in (model, twin, pickled):
        assert [entry[2] for entry in snapshot(other)] == [entry[2] for entry in before]


def test_it_can_be_unpatched_meanwhile() -> None:
    model = linear(2, 0.5)
    before = snapshot(model)
    eulernet.patch(model, h=0.1, example_inputs=X)
    with eulernet.watch(model):
        eulernet.unpatch(model)
        torch.testing.assert_close(model(X), 1.5**2 * X)
    assert snapshot(model) == before


# As in test_compile.py: where Dynamo looks at the attributes of a tensor, torch 2.11 warns of .grad.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("how", ["wrapper", "inner", "in place"])
def test_a_compiled_model_is_watched_but_for_its_steps(how: str) -> None:
    """Weights and gradients are recorded, and that steps cannot be seen is said."""
    torch.compiler.reset()
    model = eulernet.patch(mlp(2), h=0.1, example_inputs=torch.zeros(2, 8))
    x = torch.randn(4, 8)
    expected = model(x)
    if how == "in place":
        compiled = model
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    with eulernet.watch(compiled if how == "wrapper" else model) as log:
        torch.testing.assert_close(compiled(x), expected)
        train(compiled, x, 2, log)
    assert [list(record["gradient"]) for record in log.records] == [["0", "1"]] * 2
    assert [record["step_size"] for record in log.records] == [{}, {}]
    assert len(log.notes) == 1 and "compiled model" in log.notes[0]
    torch.compiler.reset()


def test_a_data_parallel_wrapper_is_looked_into() -> None:
    model = eulernet.patch(linear(2, 0.5), h=0.1, example_inputs=X)
    with eulernet.watch(nn.DataParallel(model)) as log:
        train(model, X, 1, log)
    assert list(log.records[0]["step_size"]) == ["0", "1"]


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Around(nn.Module):
    """A module without parameters makes the addition."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.add = nn.Linear(4, 4), Add()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.f(x))


def test_a_step_in_a_module_without_parameters_stands_for_what_is_around_it() -> None:
    model = eulernet.patch(nn.Sequential(Around(), Around()), h=0.1, example_inputs=X.float())
    assert [step.name for step in eulernet.steps(model)] == ["0.add", "1.add"]
    with eulernet.watch(model) as log:
        train(model, X.float(), 1, log)
    assert list(log.records[0]["weight"]) == ["0", "1"]
    assert list(log.records[0]["step_size"]) == ["0.add", "1.add"]


class Slices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        x = x.clone()
        x[:, 1:] += y[:, 1:]
        return x


def test_a_step_whose_skip_is_not_seen() -> None:
    model = eulernet.patch(nn.Sequential(Slices()), h=0.1, example_inputs=X.float())
    with eulernet.watch(model) as log:
        train(model, X.float(), 1, log)
    assert log.records[0]["step_size"] == {} and "its skip is not seen" in log.notes[0]


# ---- a model that is not patched, and errors
def test_without_step_sizes_any_model_can_be_watched() -> None:
    model = linear(2, 0.5)
    with eulernet.watch(model, step_sizes=False, layers="*.map.weight") as log:
        train(model, X, 1, log)
    assert log.records[0]["weight"] == {"0.map.weight": 1.0, "1.map.weight": 1.0}
    assert log.records[0]["step_size"] == {} and not log.notes


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        (linear(2, 0.5), {}, r"Sequential is not patched, so the sizes.*eulernet.patch\(model, h=1\)"),
        (linear(2, 0.5), {"step_sizes": False}, "not patched: say which layers"),
        ("model", {}, "takes a torch.nn.Module, not str"),
        (None, {"every": 0}, "every must be a whole number, at least 1, not 0"),
        (None, {"every": 1.5}, "every must be a whole number, at least 1, not 1.5"),
        (None, {"every": True}, "every must be a whole number, at least 1, not True"),
        (None, {"layers": "layer1"}, "pattern 'layer1' names no module or parameter. There are for example <root>, 0"),
        (None, {"layers": ["0", "0.map.bias"]}, "pattern '0.map.bias' names no"),
        (None, {"layers": 3}, "layers=3 is no pattern on names"),
        (None, {"layers": [3]}, "layers: 3 is no pattern on names"),
        (None, {"layers": []}, "layers names nothing"),
        (None, {"writer": 3}, "int without add_scalar"),
        (None, {"path": "missing/log.jsonl"}, "there is no folder"),
    ],
)
def test_what_watch_cannot_do_is_refused(model: Any, arguments: dict[str, Any], words: str) -> None:
    model = eulernet.patch(linear(2, 0.5), example_inputs=X) if model is None else model
    with pytest.raises(EulernetError, match=words):
        eulernet.watch(model, **arguments)


def test_a_step_outside_of_the_block_is_refused() -> None:
    model = eulernet.patch(linear(2, 0.5), example_inputs=X)
    log = eulernet.watch(model)
    with pytest.raises(EulernetError, match="is for within the block"):
        log.step()
    with log:
        log.step()
    with pytest.raises(EulernetError, match="is for within the block"):
        log.step()
    assert len(log.records) == 1


def test_two_watches_at_a_time_are_refused() -> None:
    model = eulernet.patch(linear(2, 0.5), example_inputs=X)
    with eulernet.watch(model) as log:
        with pytest.raises(EulernetError, match="is watched already"), eulernet.watch(model):
            pass
        train(model, X, 1, log)
    assert list(log.records[0]["step_size"]) == ["0", "1"]
