"""The engine of the studies, against plain loops."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eulernet
from reproductions import trial
from reproductions.errors import DataError
from reproductions.training import grid
from reproductions.training import loop as train
from reproductions.training import network as made
from reproductions.training.loop import SideBySide, Training
from reproductions.training.network import build
from reproductions.trial import Trial
from tests.helpers.studied import CPU, TINY, source_of

# ---- one training


def alone(one: Trial, root: Path) -> tuple[nn.Module, list[float]]:
    """The same training, written as anybody would."""
    source = source_of(one, root)
    network = build(one)
    optimizer = torch.optim.SGD(network.parameters(), lr=one.learning_rate, momentum=0.9)
    losses = []
    for epoch in range(one.epochs):
        for group in optimizer.param_groups:
            group["lr"] = one.learning_rate / 10 ** sum(epoch >= m * one.epochs for m in one.milestones)
        total = 0.0
        for rows in source.draw(one.seed, epoch).split(one.batch_size):
            inputs, labels = source.batch(rows)
            loss = nn.functional.cross_entropy(network(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
        losses.append(total / len(source))
    return network, losses


def trained(one: Trial, root: Path) -> Training:
    training = Training(one, source_of(one, root), CPU)
    together = SideBySide([training])
    while not training.done:
        together.epoch()
    return training


@pytest.mark.parametrize(
    "one",
    [
        replace(TINY, h=0.3),
        replace(TINY, norm=False, seed=4),
        Trial(data="ag-news", model="vdcnn", depth=9, size=64, batch_size=32, epochs=1, milestones=(), h=0.1),
    ],
    ids=["images", "no BN", "texts"],
)
def test_a_training_is_that_of_a_plain_loop(one: Trial, root: Path) -> None:
    network, losses = alone(one, root)
    training = trained(one, root)
    for (name, mine), theirs in zip(training.network.state_dict().items(), network.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert training.curve["train_loss"] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("h", [0.3, "auto", "1/D"])
@pytest.mark.parametrize(
    "one", [TINY, Trial(data="ag-news", model="vdcnn", depth=9, norm=False)], ids=["images", "texts"]
)
def test_a_copied_network_is_one_that_was_patched_itself(one: Trial, h: float | str) -> None:
    built = [build(replace(one, h=h, seed=seed)) for seed in (0, 1, 0)]
    torch.manual_seed(0)
    network = made._plain(one.model, one.depth, one.norm, one.class_count)
    eulernet.patch(network, h=trial.RULES.get(h, h), example_inputs=made.example(network))
    inputs = torch.rand(4, 3, 8, 8) if one.data == "cifar10" else torch.randint(70, (4, 64))
    assert torch.equal(network(inputs), built[0](inputs)) and torch.equal(built[0](inputs), built[2](inputs))
    assert not torch.equal(built[0](inputs), built[1](inputs))
    assert [s.h for s in eulernet.steps(network)] == [s.h for s in eulernet.steps(built[0])]
    assert {*built[0].parameters()}.isdisjoint(built[2].parameters())


def test_h_is_a_scaled_start_and_a_squared_learning_rate_of_the_last_maps(root: Path) -> None:
    losses = [
        trained(replace(TINY, **change), root).curve["train_loss"]
        for change in ({"h": 0.1}, {"initial": 0.1, "rate": 0.01}, {"initial": 0.1}, {"rate": 0.01}, {})
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)  # rounding in fp32, over 6 iterations
    for other in losses[2:]:
        assert losses[0] != pytest.approx(other, rel=2e-4)


def test_a_patched_trained_network_learns_as_one_with_the_matching_learning_rates(root: Path, tmp_path: Path) -> None:
    """`preserve=True` changes neither the function nor, with these learning rates, what becomes of it."""
    base = replace(TINY, classes=(0, 5), train=120)
    further = replace(base, classes=(5, 10), start=base, learning_rate=0.5)
    arms = [replace(further, **change) for change in ({"h": 0.1}, {"rate": 0.01}, {})]
    several = [replace(one, seed=seed) for one in (base, *arms) for seed in (0, 1)]
    place = grid.Place(tmp_path, root, CPU, at_once=2)
    losses = {record["key"]: record["result"]["curve"]["train_loss"] for record in grid.run(place, several)}
    for seed in (0, 1):
        patched, matching, plain = (losses[replace(one, seed=seed).key] for one in arms)
        assert patched == pytest.approx(matching, rel=3e-4)  # rounding in fp32, records of five digits
        assert patched != pytest.approx(plain, rel=6e-4)
    place.network(replace(base, seed=1).key).unlink()
    other = replace(arms[0], seed=1, learning_rate=0.2)
    with pytest.raises(DataError, match=rf"{replace(base, seed=1).key}\.pt is missing, the network that {other.key}"):
        grid.run(place, [replace(base, seed=1), other])


def test_trials_side_by_side_are_those_one_at_a_time(root: Path, tmp_path: Path) -> None:
    several = [replace(TINY, seed=seed, h=h) for seed in (0, 1) for h in (1.0, 0.1)]
    one = grid.run(grid.Place(tmp_path / "one", root, CPU), several)
    four = grid.run(grid.Place(tmp_path / "four", root, CPU, at_once=4), several)
    assert [r["result"] for r in one] == [r["result"] for r in four]
    assert len({json.dumps(r["result"]) for r in one}) == 4


def test_a_captured_iteration_is_replayed_for_all_whole_batches_after_the_warm_up(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of things on a CUDA device, with a graph that runs what it stands for."""
    one = replace(TINY, epochs=3)
    replayed: list[int] = []

    class Graph:
        def __init__(self, together: SideBySide, size: int) -> None:
            self.together, self.size = together, size

        def replay(self) -> None:
            replayed.append(self.size)
            self.together._each(self.size)

    monkeypatch.setattr(SideBySide, "_capture", lambda self, size: Graph(self, size))
    together = SideBySide([Training(one, source_of(one, root), CPU)])
    assert not together.captures
    together.captures = True
    for _ in range(3):
        together.epoch()
    assert replayed == [32] * 3  # of six whole batches; those of 8 samples run as they are
    assert together.trainings[0].curve == trained(one, root).curve


@pytest.mark.parametrize("name", ["adam", "rmsprop", "adagrad"])
def test_other_optimisers_take_the_learning_rate_as_it_stands(name: Any, root: Path) -> None:
    training = Training(replace(TINY, optimizer=name, rate=0.5), source_of(TINY, root), CPU)
    training.set_rate(0)
    assert type(training.optimizer).__name__.lower() == name
    assert [group["lr"] for group in training.optimizer.param_groups] == pytest.approx([0.05, 0.025])
    assert sum(len(group["params"]) for group in training.optimizer.param_groups) == len(
        [*training.network.parameters()]
    )


def test_the_last_maps_are_found_wherever_the_network_is() -> None:
    """On a GPU an example that lies on the CPU would not do; the meta device is as strict."""
    one, meta = replace(TINY, rate=0.01), torch.device("meta")
    optimizer = made.make_optimizer(one, build(one).to(meta), meta)
    assert [group["rate"] for group in optimizer.param_groups] == pytest.approx([1.0, 0.01])


def test_logged_norms_are_those_of_the_layers(root: Path) -> None:
    one = replace(TINY, log=True, epochs=1)
    source, network = source_of(one, root), build(one)
    inputs, labels = source.batch(source.draw(0, 0)[:32])
    network.train()
    nn.functional.cross_entropy(network(inputs), labels).backward()
    log = trained(one, root).result()["log"]
    assert set(log) == {"iterations", "layer 2", "layer 3", "layer 7"}  # of 7 convolutions
    second = network.stages[0][0].conv1.weight
    assert log["layer 2"]["weight"][0] == pytest.approx(second.norm().item(), rel=1e-6)
    assert log["layer 2"]["gradient"][0] == pytest.approx(second.grad.norm().item(), rel=1e-5)
    last = network.stages[2][0].conv2.weight
    assert log["layer 7"]["gradient"][0] == pytest.approx(last.grad.norm().item(), rel=1e-5)


def test_clipping_bounds_the_first_step(root: Path) -> None:
    one = replace(TINY, clip=1e-3, train=32, epochs=1)
    before, after = build(one), trained(one, root).network
    moved = sum((a - b).square().sum() for a, b in zip(after.parameters(), before.parameters(), strict=True)).sqrt()
    assert moved.item() == pytest.approx(0.05 * 1e-3, rel=1e-2)  # learning rate x clipped norm; rounding in fp32


def test_feature_steps_are_relative_changes_of_identity_blocks(root: Path) -> None:
    network, source = build(replace(TINY, depth=14)), source_of(TINY, root)
    with torch.no_grad():
        network.eval()
        x = network.bn(network.conv(source.prepare(source.tests["test"][0]))).relu()
        y = network.stages[0][0](x)
    expected = ((y - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)).mean().item()
    found = train.feature_steps(network, source)
    assert len(found) == 4 and found[0] == pytest.approx(expected, rel=1e-5)


def test_reestimated_statistics_are_means_over_batches(root: Path) -> None:
    training = trained(replace(TINY, train=64, epochs=1), root)
    batches = [training.source.batch(rows)[0] for rows in training.source.draw(0, 1).split(32)]
    with torch.no_grad():
        means = torch.stack([training.network.conv(x).mean(dim=(0, 2, 3)) for x in batches]).mean(dim=0)
    training.reestimate()
    torch.testing.assert_close(training.network.bn.running_mean, means)
    assert training.network.bn.momentum == 0.1


def test_bf16_keeps_the_residual_stream_in_fp32(root: Path) -> None:
    training = Training(replace(TINY, precision="bf16", h=0.01), source_of(TINY, root), CPU)
    seen: dict[str, list[torch.dtype]] = {"block": [], "branch": []}
    for block in (m for m in training.network.modules() if isinstance(m, made.ConvBlock)):
        block.register_forward_hook(lambda module, inputs, output: seen["block"].append(output.dtype))
        block.conv2.register_forward_hook(lambda module, inputs, output: seen["branch"].append(output.dtype))
    training.begin()
    training.step(32)
    assert seen == {"block": [torch.float32] * 3, "branch": [torch.bfloat16] * 3}


def test_a_training_that_diverges_is_a_result(root: Path, tmp_path: Path) -> None:
    wild = replace(TINY, learning_rate=1e30, norm=False, epochs=50)
    (record,) = grid.run(grid.Place(tmp_path, root, CPU), [wild])
    assert record["result"]["failed"] and record["result"]["train_loss"] is None
    assert len(record["result"]["curve"]["train_loss"]) < 50
    assert 0 <= record["result"]["test_accuracy"] <= 1
