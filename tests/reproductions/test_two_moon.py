"""Two moons: the networks against PyTorch's own training, the data and the study."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import eulernet
from reproductions.cli import RESULTS
from reproductions.data.two_moons import two_moons
from reproductions.records import read_records
from reproductions.studies import fig4_two_moon as two_moon
from reproductions.training import two_moon as trainings
from tests.helpers.studied import run_cli

TINY = replace(two_moon.PRESETS["smoke"], steps=4, epochs=3)


# ---- two moons


def test_moons_without_noise_lie_on_two_half_circles() -> None:
    x, labels = two_moons(200, 0.0, torch.Generator().manual_seed(0))
    upper, lower = x[labels == 0] + torch.tensor([0.5, 0.25]), x[labels == 1] - torch.tensor([0.5, 0.25])
    torch.testing.assert_close(upper.norm(dim=1), torch.ones(100))
    torch.testing.assert_close(lower.norm(dim=1), torch.ones(100))
    assert (upper[:, 1] >= 0).all() and (lower[:, 1] <= 0).all()


def test_noise_has_the_standard_deviation_asked_for() -> None:
    clean, _ = two_moons(20_000, 0.0, torch.Generator().manual_seed(0))
    noisy, _ = two_moons(20_000, 0.25, torch.Generator().manual_seed(0))
    assert (noisy - clean).std().item() == pytest.approx(0.25, rel=0.02)  # 4 standard errors of 40,000 draws


@pytest.mark.parametrize("arm", [two_moon.PLAIN, two_moon.EULER, trainings.Arm(rate=0.01)], ids=str)
def test_trainings_at_once_are_those_of_torch_optim_one_by_one(arm: trainings.Arm) -> None:
    group = [trainings.Trial(arm, rate, seed) for rate in (0.01, 0.1) for seed in (3, 5)]
    results, together = trainings.train(group, TINY)
    for index, trial in enumerate(group):
        network, loss = train_alone(trial)
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(together[name][index], parameter.detach(), rtol=1e-4, atol=1e-6)
        assert results[index]["train_loss"] == pytest.approx(loss, rel=1e-4)


def train_alone(trial: trainings.Trial) -> tuple[nn.Module, float]:
    """The same training, written as anybody would."""
    network = trainings.build(trial.arm, TINY, trial.seed)
    second = {p for block in network.blocks for p in block.second.parameters()}
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in network.parameters() if p not in second], "lr": trial.learning_rate},
            {"params": list(second), "lr": trial.learning_rate * trial.arm.rate},
        ],
        momentum=TINY.momentum,
    )
    generator = torch.Generator().manual_seed(trial.seed)
    x, y = two_moons(TINY.train_points, TINY.noise, generator)
    for _ in ("validation", "test"):
        two_moons(TINY.test_points, TINY.noise, generator)
    for _ in range(TINY.epochs):
        for batch in torch.randperm(TINY.train_points, generator=generator).split(TINY.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
    return network, nn.functional.cross_entropy(network(x), y).item()


def test_h_is_a_scaled_start_and_a_squared_learning_rate_of_the_last_maps() -> None:
    protocol, h = replace(TINY, steps=10), 0.1
    torch.set_default_dtype(torch.float64)
    try:
        curves = [
            trainings.train([trainings.Trial(arm, 0.1, seed) for seed in range(3)], protocol)[0]
            for arm in (trainings.Arm(h=h), trainings.Arm(initial=h, rate=h**2), trainings.Arm())
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    by_h, by_parameters, plain = ([result["train_loss"] for result in results] for results in curves)
    assert by_h == pytest.approx(by_parameters, rel=1e-9)  # float64 rounding, over 6 iterations
    assert by_h != pytest.approx(plain, rel=1e-2)


def test_controls_are_the_two_halves_of_h() -> None:
    assert two_moon.ARMS[2].initial == two_moon.EULER.h
    assert two_moon.ARMS[3].rate == pytest.approx(two_moon.EULER.h**2)


def test_identity_amplifies_noise_by_one() -> None:
    identity = trainings.Arm(initial=0.0)
    result = trainings.train([trainings.Trial(identity, 0.0, 0)], TINY)[0][0]
    assert result["noise_amplification"] == pytest.approx(1.0, abs=1e-5)
    assert result["relative_noise_amplification"] == pytest.approx(1.0, abs=1e-5)


def test_scaling_amplifies_noise_and_features_alike() -> None:
    """Four blocks x + x make 16 x: the noise is 16 times as large, and no larger beside the features."""
    network = trainings.build(two_moon.PLAIN, replace(TINY, hidden=4))
    for block in network.blocks:
        block.first.weight.data = torch.cat([torch.eye(2), -torch.eye(2)])
        block.second.weight.data = torch.cat([torch.eye(2), -torch.eye(2)], dim=1)
        block.first.bias.data.zero_()
        block.second.bias.data.zero_()
    parameters = {name: value[None] for name, value in network.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        measured = trainings._amplification(
            network, parameters, torch.randn(1, 50, 2), 0.05, [generator], torch.tensor([0])
        )
    assert measured["noise_amplification"].item() == pytest.approx(16.0, rel=1e-4)
    assert measured["relative_noise_amplification"].item() == pytest.approx(1.0, rel=1e-4)


def test_the_same_seed_gives_the_same_results_and_another_seed_others() -> None:
    def results(seed: int) -> list[dict[str, object]]:
        return trainings.train([trainings.Trial(two_moon.EULER, 0.1, seed)], TINY)[0]

    assert results(1) == results(1)
    assert results(1) != results(2)


def test_learns_where_it_should_and_fails_where_it_must() -> None:
    protocol = replace(two_moon.PRESETS["smoke"], steps=50, epochs=20)
    good = trainings.train([trainings.Trial(two_moon.EULER, 0.1, 0)], protocol)[0][0]
    bad = trainings.train([trainings.Trial(two_moon.PLAIN, 1.0, 0)], protocol)[0][0]
    assert not good["failed"] and good["test_accuracy"] > 0.75
    assert bad["failed"] and bad["test_accuracy"] < 0.75


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(0.3, False), (0.65, False), (0.66, True), (math.log(2), True), (math.inf, True), (math.nan, True)],
)
def test_a_loss_tells_whether_a_training_failed(loss: float, expected: bool) -> None:
    assert trainings.failed(loss) is expected


def test_best_learning_rate_is_chosen_on_validation_points() -> None:
    def record(rate: float, validation: float, test: float) -> dict[str, object]:
        return {
            "config": {**asdict(two_moon.EULER), "learning_rate": rate},
            "result": {"failed": False, "validation_accuracy": validation, "test_accuracy": test},
        }

    records = [record(0.1, 0.8, 0.9), record(0.1, 0.8, 0.9), record(0.3, 0.9, 0.7), record(0.3, 0.9, 0.7)]
    assert two_moon.best_learning_rate(records) == 0.3


def test_two_moon_command_writes_what_figures_draws_again(tmp_path: Path) -> None:
    printed = run_cli("two-moon", "--preset", "smoke", "--seeds", 2, "--out", tmp_path / "study")
    records = read_records(tmp_path / "study")
    assert len(records) == len(two_moon.ARMS) * len(two_moon.LEARNING_RATES) * 2
    assert {record["study"] for record in records} == {"two-moon"}
    trials = [
        trainings.Trial(
            trainings.Arm(*(record["config"][name] for name in ("h", "initial", "rate"))),
            record["config"]["learning_rate"],
            record["config"]["seed"],
        )
        for record in records
    ]
    assert trials == two_moon.trainings(2)
    for record in records:
        assert record["config"]["steps"] == two_moon.PRESETS["smoke"].steps
        assert record["environment"]["torch"] == torch.__version__
        assert record["environment"]["device"].startswith("cpu") and record["seconds"] > 0
        assert 0 <= record["result"]["test_accuracy"] <= 1
        assert len(record["result"]["train_loss_curve"]) == 8
    assert "Failed trainings of 2" in printed and "paired by seed" in printed

    pictures = {
        name: (tmp_path / "study" / name).read_bytes()
        for name in ("features.png", "learning_rates.png", "at_a_glance.png")
    }
    for name in pictures:
        (tmp_path / "study" / name).unlink()
    run_cli("figures", "--results", tmp_path)
    assert {name: (tmp_path / "study" / name).read_bytes() for name in pictures} == pictures


def test_pictured_networks_come_back_with_their_step_factor(tmp_path: Path) -> None:
    records, networks = two_moon.run(TINY, seeds=1)
    two_moon.save_networks(tmp_path, networks)
    loaded = two_moon.load_networks(tmp_path)
    assert not eulernet.is_patched(loaded["h = 1"][0])
    assert [step.h for step in eulernet.steps(loaded["h = 0.1"][0])] == [0.1] * TINY.steps
    for arm in (two_moon.PLAIN, two_moon.EULER):
        own = two_moon.select(records, arm, two_moon.best_learning_rate(two_moon.select(records, arm)))[0]
        generator = torch.Generator().manual_seed(two_moon.PICTURED_SEED)
        x, y = two_moons(TINY.train_points, TINY.noise, generator)
        network, config = loaded[str(arm)]
        assert config == own["config"]
        loss = nn.functional.cross_entropy(network(x), y).item()
        assert loss == pytest.approx(own["result"]["train_loss"], rel=1e-5)


def test_stored_results_are_those_of_the_study_as_it_is() -> None:
    records = read_records(RESULTS / "two-moon")
    expected = [
        {**asdict(trial.arm), "learning_rate": trial.learning_rate, "seed": trial.seed, **asdict(trainings.Protocol())}
        for trial in two_moon.trainings(10)
    ]
    assert [record["config"] for record in records] == expected
    assert all(record["result"]["failed"] == trainings.failed(loss_of(record)) for record in records)


def loss_of(record: dict[str, dict[str, float | None]]) -> float:
    loss = record["result"]["train_loss"]
    return math.nan if loss is None else loss
