"""The reproductions: their numbers against closed forms and plain loops, their files, and what they say of bad data."""

import doctest
import io
import json
import math
import os
import pickle
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import eulernet
from reproductions import records
from reproductions.cli import RESULTS, app, main
from reproductions.data import cifar10 as data
from reproductions.data import two_moons as moons
from reproductions.data.cifar10 import load_cifar10
from reproductions.data.two_moons import two_moons
from reproductions.errors import DataError
from reproductions.evidence import statistics
from reproductions.evidence.statistics import Estimate
from reproductions.records import read_records, write_records
from reproductions.studies import fig1_euler as euler
from reproductions.studies import fig4_two_moon as two_moon
from reproductions.studies import timm_on_cifar10 as cifar10
from reproductions.training import two_moon as trainings

TINY = replace(two_moon.PRESETS["smoke"], steps=4, epochs=3)


def run_cli(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


# ---- the package
@pytest.mark.parametrize(
    "module", [data, euler, moons, records, statistics, two_moon], ids=lambda module: module.__name__
)
def test_examples_in_docstrings_run(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


def test_the_library_does_not_import_the_reproductions() -> None:
    sources = Path(eulernet.__file__).parent.rglob("*.py")
    assert not [
        path for path in sources if re.search(r"^\s*(from|import) reproductions", path.read_text(), re.MULTILINE)
    ]


# ---- Fig. 1
@pytest.mark.parametrize("h", euler.STEP_SIZES)
def test_euler_states_are_powers_of_the_amplification_factor(h: float) -> None:
    states = euler.solve(h)
    assert states == pytest.approx([(1 - 2.3 * h) ** n for n in range(len(states))], rel=1e-12)
    assert 5.0 - h < h * (len(states) - 1) <= 5.0 + 1e-9


def test_euler_converges_with_order_one_and_is_unstable_beyond_its_limit() -> None:
    errors = [abs(euler.solve(h)[round(1 / h)] - math.exp(-2.3)) for h in (0.02, 0.01)]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)
    growing = {record["config"]["h"] for record in euler.run() if "grows" in euler.statements([record])[0]}
    assert growing == {h for h in euler.STEP_SIZES if h > 2 / 2.3} == {0.9}


def test_euler_command_in_a_fresh_process_writes_records_and_a_picture(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reproductions", "euler", "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
    written = read_records(tmp_path)
    assert [record["config"]["h"] for record in written] == [0.1, 0.3, 0.7, 0.9]
    largest = [record["result"]["largest_error"] for record in written]
    assert largest == sorted(largest) and largest[0] < 0.05
    assert (tmp_path / "euler.png").read_bytes().startswith(b"\x89PNG")


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


def test_same_seed_same_results_and_another_seed_others() -> None:
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
def test_failed_training(loss: float, expected: bool) -> None:
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


# ---- records and statistics
def test_records_are_lines_of_strict_json_and_keep_the_configuration_exact(tmp_path: Path) -> None:
    path = write_records(tmp_path, [{"config": {"h": 0.1234567}, "result": {"loss": [math.nan, 0.1234567], "n": 7}}])
    (line,) = path.read_text().splitlines()
    assert json.loads(line) == {"config": {"h": 0.1234567}, "result": {"loss": [None, 0.12346], "n": 7}}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (9, 2.26216), (30, 2.04227), (1000, 1.96234)]
)
def test_t_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    values = np.random.default_rng(0).normal(size=freedom + 1)
    found, error = Estimate.of(values.tolist()), values.std(ddof=1) / math.sqrt(len(values))
    assert (found.high - found.mean) / error == pytest.approx(quantile, rel=1e-5)
    assert (found.mean - found.low) / error == pytest.approx(quantile, rel=1e-5)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(size=(4000, 5))
    covered = sum(one.low < 0 < one.high for one in map(Estimate.of, draws[:500]))
    assert covered / 500 == pytest.approx(0.95, abs=0.04)  # 4 standard errors


# ---- CIFAR-10
COUNT = 4
BINARY = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "IMAGES_PER_FILE", COUNT)


@pytest.fixture
def root(tmp_path: Path, small_files: None) -> Path:
    """A folder with small files of the binary layout."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in BINARY:
        records = rng.integers(0, 256, size=(COUNT, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.tobytes())
    return tmp_path


class Python2Pickler(pickle._Pickler):
    """Writes bytes and text as Python 2 wrote its strings, as in the official files."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value: bytes | str) -> None:
        raw = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + len(raw).to_bytes(4, "little") + raw)  # type: ignore[attr-defined]

    dispatch[bytes] = dispatch[str] = save_string


def to_python_layout(root: Path, python2: bool = True) -> Path:
    """The same images as the official python files hold them."""
    folder = root / "python" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in BINARY:
        records = np.fromfile(root / "cifar-10-batches-bin" / name, dtype=np.uint8).reshape(-1, 3073)
        content = {
            "data": np.ascontiguousarray(records[:, 1:]),
            "labels": records[:, 0].tolist(),
            "batch_label": "a batch",
        }
        buffer = io.BytesIO()
        (Python2Pickler if python2 else pickle.Pickler)(buffer, protocol=2).dump(content)
        old_names = buffer.getvalue().replace(b"numpy._core.", b"numpy.core.") if python2 else buffer.getvalue()
        (folder / name.removesuffix(".bin")).write_bytes(old_names)
    return folder


def equal(a: data.Images, b: data.Images) -> bool:
    return torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels)


def test_binary_layout_is_label_then_red_green_blue_planes(root: Path) -> None:
    train, test = load_cifar10(root)
    assert train.pixels.shape == (5 * COUNT, 3, 32, 32) and train.pixels.dtype == torch.uint8
    assert test.labels.shape == (COUNT,) and test.labels.dtype == torch.int64
    raw = (root / "cifar-10-batches-bin" / "data_batch_2.bin").read_bytes()[3073 : 2 * 3073]
    image = train.pixels[COUNT + 1]
    assert train.labels[COUNT + 1] == raw[0]
    assert image[2, 5, 7] == raw[1 + 2 * 1024 + 5 * 32 + 7]


@pytest.mark.parametrize("python2", [True, False], ids=["pickled by Python 2", "pickled by Python 3"])
def test_both_layouts_give_the_same_images(root: Path, python2: bool) -> None:
    folder = to_python_layout(root, python2)
    for from_binary, from_python in zip(load_cifar10(root), load_cifar10(folder), strict=True):
        assert equal(from_binary, from_python)


def test_the_folder_itself_or_the_one_that_holds_it(root: Path) -> None:
    assert equal(load_cifar10(root)[1], load_cifar10(root / "cifar-10-batches-bin")[1])


def damage_truncate(folder: Path) -> None:
    path = folder / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])


def damage_extend(folder: Path) -> None:
    with (folder / "data_batch_3.bin").open("ab") as file:
        file.write(b"\0")


def damage_label(folder: Path) -> None:
    path = folder / "data_batch_3.bin"
    content = bytearray(path.read_bytes())
    content[2 * 3073] = 10
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: (folder / "data_batch_3.bin").unlink(),
            r"lacks data_batch_3\.bin; expected are the six files data_",
        ),
        (
            damage_truncate,
            r"data_batch_3\.bin has 12,291 bytes; expected are 12,292: 4 records of 3,073 bytes, a label and",
        ),
        (damage_extend, r"data_batch_3\.bin has 12,293 bytes; expected are 12,292"),
        (damage_label, r"data_batch_3\.bin: image 2 has the label 10; expected are labels from 0 to 9"),
    ],
    ids=["missing", "truncated", "too long", "bad label"],
)
def test_damaged_binary_files_are_named(root: Path, damage: object, words: str) -> None:
    assert callable(damage)
    damage(root / "cifar-10-batches-bin")
    with pytest.raises(DataError, match=words):
        load_cifar10(root)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 1",)


GOOD = np.zeros((COUNT, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "test_batch is not a whole pickle of arrays: "),
        (Malicious(), r"test_batch is not a whole pickle of arrays: UnpicklingError: it names (posix|nt)\.system"),
        ([1, 2], "test_batch holds no CIFAR-10 batch: expected is a dict with an array 'data' and a list 'labels'"),
        (
            {"data": GOOD[:, :9], "labels": [0] * COUNT},
            r"'data' of shape \(4, 9\) and dtype uint8 with 4 labels; expected",
        ),
        ({"data": GOOD.astype(np.float32), "labels": [0] * COUNT}, "dtype float32"),
        ({"data": GOOD, "labels": [0]}, "with 1 labels; expected are shape .* and 4 labels"),
        ({"data": GOOD, "labels": [0, 0, 0, -1]}, "image 3 has the label -1; expected are labels from 0 to 9"),
    ],
    ids=["truncated", "runs code", "another object", "shape", "dtype", "label count", "bad label"],
)
def test_damaged_python_files_are_named(root: Path, content: object, words: str) -> None:
    path = to_python_layout(root) / "test_batch"
    path.write_bytes(path.read_bytes()[:-100] if content is None else pickle.dumps(content, protocol=2))
    with pytest.raises(DataError, match=words):
        load_cifar10(path.parent)


def test_empty_folder_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"holds no CIFAR-10: expected is a folder cifar-10-batches-bin or .*--download"
    ):
        load_cifar10(tmp_path)


def test_download_goes_through_torchvision(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    source = to_python_layout(root)

    def fetch(target: str, download: bool) -> None:
        assert download
        source.rename(Path(target) / source.name)

    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setattr(datasets, "CIFAR10", fetch)
    assert equal(load_cifar10(empty, download=True)[0], load_cifar10(root)[0])

    def fail(target: str, download: bool) -> None:
        raise OSError("no network")

    monkeypatch.setattr(datasets, "CIFAR10", fail)
    with pytest.raises(DataError, match=r"could not download CIFAR-10 into .*: no network"):
        load_cifar10(tmp_path / "nothing", download=True)


def test_normalised_images_have_the_training_images_mean_taken_off() -> None:
    pixels = torch.tensor([125, 123, 114], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    normal = cifar10.normalise(pixels, torch.device("cpu"))
    assert normal.dtype == torch.float32 and normal.abs().max() < 0.02


def test_accuracy_is_a_share_over_all_batches() -> None:
    class Brightness(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot((x.mean(dim=(1, 2, 3)) > 0).long(), 10).float()

    pixels = torch.zeros(1200, 3, 32, 32, dtype=torch.uint8)
    pixels[:300] = 255
    labels = torch.zeros(1200, dtype=torch.int64)
    assert cifar10.accuracy(Brightness(), data.Images(pixels, labels), torch.device("cpu")) == 0.75


def test_resnet_is_patched_and_does_not_start_with_empty_branches() -> None:
    model = cifar10.build(cifar10.Config(h=0.3))
    assert {step.h for step in eulernet.steps(model)} == {0.3} and len(eulernet.steps(model)) == 8
    assert model.layer1[0].bn2.weight.min() == 1


def test_cifar10_command_trains_and_writes_a_record(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = run_cli(
        "cifar10", "--data-root", root, "--steps", 3, "--batch-size", 7, "--h", 0.2, "--device", "cpu", "--out", out
    )
    (record,) = read_records(out)
    assert record["config"] == asdict(cifar10.Config(h=0.2, steps=3, batch_size=7))
    assert len(record["result"]["train_loss_curve"]) == 3 and record["result"]["residual_steps"] == 8
    assert "resnet18: 8 residual steps, h = 0.2." in printed
    assert "Test accuracy before and after: " in printed


def test_errors_are_one_line_and_exit_code_one(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage_truncate(root / "cifar-10-batches-bin")
    monkeypatch.setattr(sys, "argv", ["reproductions", "cifar10", "--data-root", str(root)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "data_batch_3.bin has 12,291 bytes; expected are 12,292" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["two-moon", "--preset", "paper"], "'paper' is none of smoke, small"),
        (["two-moon", "--seeds", "0"], "--seeds"),
        (["cifar10", "--data-root", ".", "--model", "resnet17"], "timm has no model 'resnet17'"),
        (["cifar10", "--data-root", ".", "--device", "abacus"], "abacus"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert words in result.output
