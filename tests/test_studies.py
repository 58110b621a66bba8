"""The studies: their data, their engine against plain loops, what a killed process leaves, what is said of records."""

import doctest
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import eulernet
from reproductions import cli, desk, report, trial
from reproductions.cli import RESULTS, app
from reproductions.data import ag_news as texts
from reproductions.data import batches as sources
from reproductions.data import cifar10 as data
from reproductions.data import noise as corrupt
from reproductions.data.ag_news import ALPHABET, load_ag_news, read_csv
from reproductions.errors import DataError
from reproductions.evidence import claims, style
from reproductions.evidence.claims import Results, Row, compare, compare_spreads
from reproductions.evidence.statistics import Estimate
from reproductions.presets import PRESETS, SEEDS
from reproductions.records import append_record, read_records
from reproductions.studies import GRIDS, throughput
from reproductions.studies import fig2_dynamics as dynamics
from reproductions.studies import fig3_depth as depth
from reproductions.studies import fig5_noise as noise
from reproductions.studies import fig6_choice_of_h as select
from reproductions.studies import finetuning as finetune
from reproductions.studies import propositions as bounds
from reproductions.studies import robustness as robust
from reproductions.training import grid
from reproductions.training import loop as train
from reproductions.training import network as made
from reproductions.training.loop import SideBySide, Training
from reproductions.training.network import build
from reproductions.trial import Trial
from tests.helpers import small_data

CPU = torch.device("cpu")
COUNT = 40  # images a file
TINY = Trial(depth=8, size=8, batch_size=32, train=72, test=24, epochs=2, milestones=(0.5,), learning_rate=0.05)


@pytest.mark.parametrize("module", [claims, corrupt, made, texts, train, trial], ids=lambda module: module.__name__)
def test_examples_in_docstrings_run(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    small_data.expect(monkeypatch, COUNT)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.write(tmp_path_factory.mktemp("data"), COUNT)


def source_of(one: Trial, root: Path) -> sources.Source:
    return sources.load(one, root, CPU)


# ---- texts
def write(path: Path, *rows: str) -> Path:
    path.write_text("".join(row + "\n" for row in rows))
    return path


def test_titles_and_descriptions_are_joined_without_a_trace_of_an_empty_one(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.csv", '"3","Title ","  Description"', '"1",""," All ""text"" here "', '"4","Only title",""'
    )
    assert read_csv(path) == texts.News(["Title Description", 'All "text" here', "Only title"], [2, 0, 3])


def test_repeated_training_texts_are_dropped_and_the_first_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "TEST_ROWS", 1)
    write(tmp_path / "train.csv", '"1","b","x"', '"2","a","y"', '"3","b","x"', '"4","b ","  x"')
    write(tmp_path / "test.csv", '"1","b","x"')
    train_rows, test_rows = load_ag_news(tmp_path)
    assert (train_rows.texts, train_rows.labels) == (["b x", "a y"], [0, 1])
    assert test_rows.texts == ["b x"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is missing; expected are rows"),
        ('"1","a"\n', "row 1 has 2 columns; expected are rows"),
        ('"1","a","b"\n"5","a","b"\n', "row 2 has the class '5'; expected .* with a class from 1 to 4"),
        ('"1","a","b"\n"2","a","b', "is damaged after row 1: unexpected end of data"),
        ("", "is empty; expected"),
        (b'"1","a","\xff"\n', "is damaged after row 0: 'utf-8' codec"),
    ],
    ids=["missing", "columns", "class", "truncated", "empty", "bytes"],
)
def test_damaged_csv_files_are_named(tmp_path: Path, content: str | bytes | None, words: str) -> None:
    path = tmp_path / "train.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=f"train.csv.*{words}"):
        read_csv(path)


def test_a_test_file_cut_between_rows_is_noticed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "TEST_ROWS", 25)
    with pytest.raises(DataError, match=r"test\.csv has 24 rows; expected are 25"):
        load_ag_news(root)


def test_a_folder_without_news_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"holds no AG-NEWS: expected are the files train\.csv and test\.csv .*--download"
    ):
        load_ag_news(tmp_path)


def test_news_from_the_hub_are_stripped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> dict[str, list[Any]]:
        assert name == "fancyzhx/ag_news"
        return {"text": [f" {split} text", "other"], "label": [3, 0]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_ag_news(tmp_path, download=True)[0] == texts.News(["train text", "other"], [3, 0])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load_ag_news(tmp_path, download=True)


def test_alphabet_has_68_letters() -> None:
    assert len(ALPHABET) == len(set(ALPHABET)) == 68
    assert texts.encode([ALPHABET], 70)[0].tolist() == [*range(1, 69), 0, 0]
    assert texts.encode(["é \n€"], 4)[0].tolist() == [69] * 4


# ---- noise
def test_gaussian_noise_has_the_standard_deviation_asked_for() -> None:
    images = torch.full((100, 3, 16, 16), 128, dtype=torch.uint8)
    noisy = corrupt.corrupt(images, "gaussian", 0.1, 0)
    assert (noisy.float() - 128).std().item() == pytest.approx(25.5, rel=0.02)  # 7 standard errors of 76,800 draws


def test_random_letters_fall_within_the_text() -> None:
    letters = torch.zeros(300, 50, dtype=torch.uint8)
    letters[:, :40] = 60
    noisy = corrupt.corrupt(letters, "letters", 0.5, 0)
    changed = noisy != letters
    assert not changed[:, 40:].any() and noisy[changed].min() >= 1 and noisy[changed].max() <= 26
    # 20 draws with replacement from 40 places hit 40 (1 - (39/40)^20) of them, and each shows.
    assert changed.sum(dim=1).float().mean().item() == pytest.approx(40 * (1 - (39 / 40) ** 20), rel=0.02)
    assert changed.sum(dim=1).max() <= 20


def test_wrong_labels_are_others_all_alike() -> None:
    right = torch.arange(10_000) % 10
    noisy = corrupt.labels(right, 0.3, 10, torch.Generator().manual_seed(0))
    wrong = noisy != right
    assert wrong.sum() == 3000
    shifts = torch.bincount((noisy[wrong] - right[wrong]) % 10, minlength=10)
    assert shifts[0] == 0 and shifts[1:].min() > 250  # 333 expected, 5 standard deviations


def test_same_seed_same_noise(root: Path) -> None:
    noisy = replace(TINY, noise="gaussian", level=0.2)
    one, same, other = (sources._load(replace(noisy, seed=seed), root, CPU, False).inputs for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


# ---- sources
def test_batches_are_crops_and_flips_of_the_padded_images(root: Path) -> None:
    source = source_of(replace(TINY, size=32), root)
    images = data.load_cifar10(root)[0].pixels
    drawn = source.draw(seed=3, epoch=1)
    assert sorted(drawn[:, 0].tolist()) == list(range(72))
    assert drawn[:, 1:3].amax() == 8 and drawn[:, 1:].amin() == 0 and set(drawn[:, 3].tolist()) == {0, 1}
    inputs, labels = source.batch(drawn[:20])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
    for x, label, (index, row, column, flip) in zip(inputs, labels, drawn[:20].tolist(), strict=True):
        crop = nn.functional.pad(images[index], [4] * 4)[:, row : row + 32, column : column + 32]
        crop = crop.flip(-1) if flip else crop
        torch.testing.assert_close(x, (crop / 255 - mean) / std, rtol=0, atol=0)
        assert label == index % 10


def test_small_images_are_means_of_tiles(root: Path) -> None:
    pixels = data.load_cifar10(root)[1].pixels
    small = source_of(TINY, root).tests["test"][0]
    assert small.shape == (24, 3, 8, 8)
    torch.testing.assert_close(small[5].float(), nn.functional.avg_pool2d(pixels[5].float(), 4).round(), rtol=0, atol=0)


def test_parts_of_the_data(root: Path) -> None:
    whole = source_of(replace(TINY, train=0, test=0), root)
    assert len(whole) == 5 * COUNT and len(whole.tests["test"][1]) == COUNT
    held = source_of(replace(TINY, held_out=12), root)
    assert len(held) == 60 and len(held.tests["validation"][1]) == 12
    five = source_of(replace(TINY, classes=(5, 10)), root)
    assert sorted(set(five.labels.tolist())) == [0, 1, 2, 3, 4] and len(five) == 35
    probed = source_of(replace(TINY, probes=(("mosaic", 4.0),)), root)
    assert probed.tests["mosaic 4"][0].flatten(2).unique(dim=2).shape[2] <= 4


def test_texts_close_to_a_training_text_are_left_out_of_the_distinct_ones(root: Path) -> None:
    news = Trial(data="ag-news", model="vdcnn", depth=9, size=64)
    source = source_of(news, root)
    train_rows, test_rows = load_ag_news(root)
    near = texts.near_duplicates(train_rows.texts, test_rows.texts)
    assert len(source.tests["distinct"][1]) == 24 - sum(near)
    assert source.batch(source.draw(0, 0)[:3])[0].dtype == torch.int64


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


# ---- what a killed process leaves
def comparable(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in r.items() if name not in ("seconds", "environment")} for r in records]


LONG = [replace(TINY, epochs=6, log=True, seed=seed, h=0.1) for seed in range(3)]
CHILD = """
import sys, torch
from pathlib import Path
from dataclasses import replace
torch.set_num_threads(1)
from reproductions.data import cifar10 as data
from reproductions.training import grid
from reproductions.trial import Trial
data.IMAGES_PER_FILE = 40
base = Trial(depth=8, size=8, batch_size=32, train=72, test=24, epochs=6, milestones=(0.5,), learning_rate=0.05)
trials = [replace(base, log=True, seed=seed, h=0.1) for seed in range(3)]
grid.run(grid.Place(Path(sys.argv[1]), Path(sys.argv[2]), torch.device("cpu")), trials)
"""


def test_a_study_killed_in_the_middle_ends_as_an_undisturbed_one(root: Path, tmp_path: Path) -> None:
    undisturbed = grid.run(grid.Place(tmp_path / "whole", root, CPU), LONG)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "killed"), str(root)]
    child = subprocess.Popen(command, cwd=Path(__file__).parents[1])
    try:
        checkpoint = tmp_path / "killed" / "checkpoints" / f"{LONG[1].key}.pt"
        end = time.monotonic() + 120
        while not checkpoint.exists():
            assert child.poll() is None and time.monotonic() < end
            time.sleep(0.001)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    place = grid.Place(tmp_path / "killed", root, CPU)
    done = len(grid.recorded(place, LONG))
    assert 1 <= done < 3
    begun: list[float] = []
    resumed = grid.run(place, LONG, lambda label, share, work: begun.append(share))
    assert begun[0] > 1 / 6  # the first epoch was not trained again
    assert comparable(resumed) == comparable(undisturbed)
    assert not list((tmp_path / "killed" / "checkpoints").iterdir())


def test_an_exception_in_each_epoch_changes_nothing(root: Path, tmp_path: Path) -> None:
    place = grid.Place(tmp_path / "stopped", root, CPU)

    def stop(label: str, share: float, work: float) -> None:
        if share % (1 / 3) > 1 / 6 and share > stop.passed:  # type: ignore[attr-defined]
            stop.passed = share  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    stop.passed = 0.0  # type: ignore[attr-defined]
    stops = 0
    while True:
        try:
            records = grid.run(place, LONG[:1], stop)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 3
    assert comparable(records) == comparable(grid.run(grid.Place(tmp_path / "whole", root, CPU), LONG[:1]))


def test_what_was_begun_on_a_gpu_goes_on_without_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, one = grid.Place(tmp_path / "begun", root, CPU), LONG[0]
    begun = Training(one, source_of(one, root), CPU)
    SideBySide([begun]).epoch()
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        grid._save(place.checkpoint(one.key), begun.state())
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(place.checkpoint(one.key), weights_only=True)
    whole = grid.run(grid.Place(tmp_path / "whole", root, CPU), [one])
    assert comparable(grid.run(place, [one])) == comparable(whole)


def test_what_was_begun_without_a_gpu_goes_on_with_learning_rates_that_a_graph_can_be_told(root: Path) -> None:
    begun, other = (Training(TINY, source_of(TINY, root), CPU) for _ in range(2))
    SideBySide([begun]).epoch()
    for group in other.optimizer.param_groups:  # as on a CUDA device
        group["lr"] = torch.tensor(group["lr"])
    other.load(begun.state())
    assert all(isinstance(group["lr"], Tensor) for group in other.optimizer.param_groups)
    buffers = [[s["momentum_buffer"] for s in one.optimizer.state.values()] for one in (begun, other)]
    assert buffers[0] and all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))


def test_a_torn_line_is_no_record_and_is_cut_off(tmp_path: Path) -> None:
    append_record(tmp_path, {"key": "a", "result": {"loss": math.nan}})
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"key":"b","resu')
    assert [record["key"] for record in read_records(tmp_path)] == ["a"]
    append_record(tmp_path, {"key": "c", "config": {}})
    assert [record["key"] for record in read_records(tmp_path)] == ["a", "c"]
    assert read_records(tmp_path)[0]["result"]["loss"] is None


@pytest.mark.parametrize("study", ["bounds", "throughput"])
def test_a_study_does_not_overwrite_the_records_of_another(study: str, root: Path, tmp_path: Path) -> None:
    append_record(tmp_path, {"study": "trials", "key": "a", "config": {}, "result": {}})
    with pytest.raises(DataError, match=rf"records\.jsonl holds records of trials, not of {study}"):
        run_cli(study, "--data-root", root, "--device", "cpu", "--out", tmp_path)
    assert [record["key"] for record in read_records(tmp_path)] == ["a"]


def test_finished_trials_are_not_run_again(root: Path, tmp_path: Path) -> None:
    place = grid.Place(tmp_path, root, CPU)
    first = grid.run(place, [TINY])
    begun: list[str] = []
    assert grid.run(place, [TINY], lambda label, share, work: begun.append(label)) == first
    assert not begun
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == []


def test_keys_are_those_of_stored_records() -> None:
    """A key that changes with the code would train everything again."""
    assert Trial().key == Trial(depth=20, h=1.0).key
    assert Trial(h=0.1, depth=110, seed=3).key == "2de5f9c80b5d"
    keys = [one.key for name in GRIDS for preset in PRESETS for one in GRIDS[name].trials(preset, 10)]
    configs = {
        json.dumps(one.config(), sort_keys=True) for g in GRIDS.values() for p in PRESETS for one in g.trials(p, 10)
    }
    assert len(set(keys)) == len(configs)


# ---- Ray
RAY = """
import os, signal, sys, torch
from pathlib import Path
from dataclasses import replace
torch.set_num_threads(1)
from reproductions.data import cifar10 as data
from reproductions.training import grid, ray_cluster as on_ray
from reproductions.trial import Trial
root, folder, always = Path(sys.argv[2]), Path(sys.argv[1]), len(sys.argv) > 3
on_ray.RETRIES = 1
base = Trial(depth=8, size=8, batch_size=32, train=72, test=24, epochs=6, milestones=(0.5,), learning_rate=0.05)
trials = [replace(base, log=True, seed=seed, h=0.1) for seed in range(3)]
whole = grid.train

def train(place, group, keep):
    data.IMAGES_PER_FILE = 40
    mark = folder / f"killed-{group[0].key}"
    def show(label, share, work):
        if share > 0.5 and group[0].seed == 1 and (always or not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return whole(place, group, keep, show)

grid.train = train
on_ray.run("local", grid.Place(folder, root, torch.device("cpu")), trials)
"""


def run_on_ray(folder: Path, root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("ray")
    folder.mkdir()
    return subprocess.run(
        [sys.executable, "-c", RAY, str(folder), str(root), *options],
        timeout=300,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
        capture_output=True,
        text=True,
    )


def test_on_ray_a_killed_worker_changes_nothing(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    assert run_on_ray(folder, root).returncode == 0
    assert list(folder.glob("killed-*")) == [folder / f"killed-{LONG[1].key}"]
    spread = grid.recorded(grid.Place(folder, root, CPU), LONG)
    assert comparable(spread) == comparable(grid.run(grid.Place(tmp_path / "here", root, CPU), LONG))


def test_on_ray_a_worker_that_always_dies_is_named(root: Path, tmp_path: Path) -> None:
    ended = run_on_ray(tmp_path / "ray", root, "always")
    assert ended.returncode == 1
    assert f"DataError: {grid.name([LONG[1]])}: its worker died 2 times" in ended.stderr
    assert "give the command again, on machines with more memory" in ended.stderr


# ---- bounds
def test_spectral_norm_is_that_of_the_whole_matrix() -> None:
    convolution, norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -2.0, 1.0]))
        norm.running_var.copy_(torch.tensor([0.25, 1.0, 4.0]))

        def affine(x: Tensor) -> Tensor:
            return norm(convolution(x.view(1, 2, 5, 5))).flatten()

        matrix = torch.autograd.functional.jacobian(affine, torch.zeros(50))
        found = bounds.spectral_norm(convolution, norm, (2, 5, 5), torch.Generator().manual_seed(0), iterations=300)
    assert found == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-4)


def test_bounds_hold_and_are_reached_where_they_must_be() -> None:
    """With empty branches nothing changes: gain 1, bound 1, noise as it was."""
    network = build(Trial(depth=14, h=0.5, initial=0.0))
    inputs, labels = torch.randn(8, 3, 8, 8), torch.arange(8)
    result = bounds.measure(network, inputs, labels, 0.5, torch.Generator().manual_seed(0))
    assert result["blocks"] == 2 and result["noise_holds"]
    assert result["gain_bounds"] == [1.0, 1.0] and result["branch_norm"] == 0
    # The rectifier after a block lets the gradient of what is positive pass; what is zero was cut off before.
    assert result["growth"] <= 1 + 1e-6 and result["noise"] <= 1 + 1e-6
    random = bounds.measure(build(Trial(depth=14)), inputs, labels, 1.0, torch.Generator().manual_seed(0))
    assert all(gain <= bound for gain, bound in zip(random["gains"], random["gain_bounds"], strict=True))
    assert random["noise"] <= random["noise_bound"] and math.log10(random["growth"]) <= random["log10_growth_bound"]


# ---- what is said
def records_of(cell: Trial, values: list[float | None], name: str = "test_accuracy") -> list[dict[str, Any]]:
    return [{"key": replace(cell, seed=s).key, "result": {name: v, "failed": False}} for s, v in enumerate(values)]


@pytest.mark.parametrize(
    ("plain", "euler", "word"),
    [
        ([0.5, 0.6, 0.7], [0.6, 0.71, 0.8], "supported"),
        ([0.6, 0.71, 0.8], [0.5, 0.6, 0.7], "refuted"),
        ([0.5, 0.6, 0.7], [0.6, 0.55, 0.7], "undecided"),
        ([0.5], [0.6], "undecided"),
        ([0.5, None], [0.6, 0.6], "undecided"),
        ([], [0.6], "not run"),
    ],
)
def test_a_verdict_follows_from_the_interval_of_paired_differences(
    plain: list[float | None], euler: list[float | None], word: str
) -> None:
    a, b = TINY, replace(TINY, h=0.1)
    results = Results([*records_of(a, plain), *records_of(b, euler)])
    row = compare(results, "claim", [(a, b)], "test_accuracy")
    assert row.verdict == word
    if word in ("supported", "refuted"):
        found = Estimate.of([y - x for x, y in zip(plain, euler, strict=True)])  # type: ignore[operator]
        assert f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})" in row.outcome
        assert "3 seeds" in row.run and "ResNet-8; 72 images of 8 x 8; 2 epochs" in row.run


@pytest.mark.parametrize(
    ("plain", "euler", "word"),
    [
        ([2.0, 2.1, None], [1.0, 1.1, 1.2], "supported"),
        ([2.0, 2.1, 2.0], [1.0, 1.1, None], "undecided"),
        ([2.0, 2.1, None], [1.0, 1.1, None], "supported"),
        ([1.0, 1.1, None], [2.0, 2.1, 2.0], "undecided"),
        ([1.0, 1.1, 1.0], [2.0, 2.1, None], "refuted"),
    ],
)
def test_a_diverged_training_contradicts_what_it_is_the_worse_of(
    plain: list[float | None], euler: list[float | None], word: str
) -> None:
    a, b = TINY, replace(TINY, h=0.1)
    results = Results([*records_of(a, plain, "train_loss"), *records_of(b, euler, "train_loss")])
    row = compare(results, "claim", [(a, b)], "train_loss", higher=False)
    assert row.verdict == word and "1 seed not finite" in row.outcome


def test_a_diverged_training_has_no_feature_steps() -> None:
    records = [{"key": TINY.key, "result": {"feature_steps": [0.1, None]}}]
    assert math.isnan(Results(records).values(TINY, "feature_steps")[0])


def test_a_learning_rate_at_which_most_trainings_diverge_is_not_the_best() -> None:
    good, bad = (robust.cell("smoke", {"h": 1.0}, {"learning_rate": rate}) for rate in (0.1, 1.0))
    results = Results([*records_of(good, [1.5] * 3, "train_loss"), *records_of(bad, [1.0, None, None], "train_loss")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(robust.RATES, "smoke", (1.0, 0.1))
        assert robust.at_best_rate(results, "smoke", {"h": 1.0}) == good


def test_failures_are_judged_with_ten_seeds_and_need_no_small_h() -> None:
    records = []
    for h in select.TEXT_H[-2:]:
        cell = select.short("paper", "vdcnn", 49, h)
        records += [{"key": replace(cell, seed=s).key, "result": {"failed": s < 9}} for s in range(10)]
    for counted, seeds, word in ((records, "10 seeds", "supported"), (records[:-1], "9 seeds", "undecided")):
        (row,) = [r for r in select.claims(Results(counted), "paper") if r.claim.startswith("vdcnn 49: trainings fail")]
        assert row.verdict == word and seeds in row.run and "h = 0.8: 9 of 10 fail; h = 1: 9 of" in row.outcome


def test_spreads_are_judged_over_pooled_cells() -> None:
    pairs = [(replace(TINY, depth=d), replace(TINY, depth=d, h=0.1)) for d in (8, 14, 20, 26)]
    records = []
    for wide, narrow in pairs:
        records += records_of(wide, [0.1, 0.5, 0.9]) + records_of(narrow, [0.49, 0.5, 0.51])
    row = compare_spreads(Results(records), "claim", pairs, "test_accuracy")
    assert row.verdict == "supported" and "12 pairs" in row.outcome
    assert compare_spreads(Results(records), "claim", pairs[:1], "test_accuracy").verdict == "undecided"
    assert compare_spreads(Results([]), "claim", pairs, "test_accuracy").verdict == "not run"


def test_best_h_is_chosen_on_held_out_samples_and_ties_go_to_the_smaller() -> None:
    records = []
    for h in (0.01, 0.1, 1.0):
        cell = select.cell("smoke", "resnet", 20, h)
        for seed in range(3):
            result = {"validation_accuracy": {0.01: 0.5, 0.1: 0.7, 1.0: 0.7}[h], "test_accuracy": h, "failed": False}
            records.append({"key": replace(cell, seed=seed).key, "result": result})
    assert select.best(Results(records), "smoke", "resnet", 20) == 0.1
    auto = {"key": select.cell("smoke", "resnet", 20, "auto").key, "result": {"h": 1 / 3}}
    said = [row.claim for row in select.claims(Results([*records, auto]), "smoke")]
    assert any(claim.startswith("resnet 20: h = auto (0.333) tests") for claim in said)  # where the rule landed


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_study_has_a_grid_and_claims_in_every_preset(name: str, preset: str) -> None:
    study = GRIDS[name]
    trials = study.trials(preset, SEEDS[preset])
    assert trials and len({one.key for one in trials}) == len(trials)
    rows = study.claims(Results([]), preset)
    assert rows and all(isinstance(row, Row) and row.verdict == "not run" for row in rows)


def test_paper_presets_are_the_papers_protocol() -> None:
    images, news = Trial(), depth.cell("paper", "vdcnn", 49, {"h": 0.1})
    assert (images.epochs, images.batch_size, images.learning_rate, images.milestones) == (80, 128, 0.1, (0.5, 0.75))
    assert (news.epochs, news.batch_size, news.learning_rate, news.milestones) == (15, 64, 0.1, ())
    assert images.weight_decay == news.weight_decay == 0 and images.warmup == 0
    assert {t.depth for t in depth.trials("paper", 5)} >= {20, 110, 218, 9, 17, 29, 49}
    assert {t.depth for t in dynamics.trials("paper", 5) if t.model == "resnet" and t.epochs == 80} == {110, 218}
    assert noise.DEPTH["paper"] == (218, 49) and noise.cell("paper", "letters", 0.1, {}).learning_rate == 0.01
    assert min(select.IMAGE_H) == 0.001 and max(select.IMAGE_H) == 20 and max(select.TEXT_H) == 1
    assert {t.learning_rate for t in robust.trials("paper", 1)} >= {0.01, 1.0}
    assert {t.start for t in finetune.trials("paper", 1)} == {None, finetune.base("paper")}


# ---- the command line
def run_cli(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_depth_command_writes_records_figures_and_a_report(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid_of = [replace(TINY, h=h, depth=8, log=True, seed=s) for h in (1.0, 0.1) for s in range(2)]
    progress = cli._progress()
    monkeypatch.setattr(cli, "_progress", lambda: progress)
    monkeypatch.setattr(depth, "trials", lambda preset, seeds: grid_of)
    monkeypatch.setattr(depth, "cell", lambda preset, model, n, arm: replace(TINY, depth=8, log=True, **arm))
    printed = run_cli("depth", "--data-root", root, "--device", "cpu", "--out", tmp_path / "trials")
    assert "4 trials" in printed and (tmp_path / "trials" / "depth-smoke.png").stat().st_size > 10_000
    whole, flight = progress.tasks
    assert flight.finished_time < whole.finished_time / 2  # that of the last of four
    again = run_cli("depth", "--data-root", root, "--device", "cpu", "--out", tmp_path / "trials")
    assert "4 of 4 trials have a record" in again
    run_cli("report", "--results", tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    assert re.search(r"\| resnet 20: h = 0.1 tests better than h = 1 \| ResNet-8; 72 images .* 2 seeds \| .*\*\*", text)


def test_missing_texts_are_noticed_before_the_images_are_trained_on(root: Path, tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-bin").symlink_to(root / "cifar-10-batches-bin")
    with pytest.raises(DataError, match="holds no AG-NEWS"):
        run_cli("depth", "--data-root", tmp_path, "--device", "cpu", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_norms_on_texts_and_of_the_first_iterations_are_claimed_and_drawn(tmp_path: Path) -> None:
    layer = {"weight": [1.0, 2.0], "gradient": [1.0, None], "mean_weight": 1.0}
    log = {"iterations": [0, 1], **{f"layer {n}": layer for n in (2, 19, 49)}}
    cells = [dynamics.early("paper", 20, {"h": 0.1}), dynamics.news("paper", 49, False, {"h": 0.1})]
    assert all(one in dynamics.trials("paper", 1) for one in cells)
    results = Results({"study": "trials", "key": one.key, "result": {"log": log}} for one in cells)
    drawn = [style.save(figure, tmp_path / name) for name, figure in dynamics.figures(results)]
    assert [path.name for path in drawn] == ["dynamics-early-paper", "dynamics-texts-paper"]
    said = {(row.claim, row.run) for row in dynamics.claims(Results([]), "paper")}
    claim = "vdcnn 49: with h = 0.1 the averaged weight norm of layer 2 is smaller"
    assert (claim, "VDCNN-49 without BN; all training texts at hand of 1,024 letters; 1 epoch") in said


def test_diverged_trainings_are_crosses() -> None:
    figure, axes = plt.subplots()
    results = Results(records_of(TINY, [1.0, None, None], "train_loss"))
    shown = style.points(axes, results, {0.0: TINY}, "train_loss", "h = 1", ("red", "o", "-"))
    crosses = next(c for c in axes.collections if len(c.get_offsets()) == 2)
    assert shown == 1 and crosses.get_offsets()[:, 1].tolist() == [0.98] * 2
    assert "diverged: not finite" in axes.get_legend_handles_labels()[1]
    plt.close(figure)


def test_start_bounds_and_throughput_commands(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamics, "DEPTHS", (8, 14))
    monkeypatch.setattr(bounds, "DEPTHS", {"smoke": (8, 14)})
    monkeypatch.setattr(throughput, "AT_ONCE", (1, 2))
    printed = run_cli(
        "dynamics", "--init", "--data-root", root, "--device", "cpu", "--seeds", 2, "--out", tmp_path / "s"
    )
    assert "explodes" in printed and (tmp_path / "s" / "start.png").exists()
    run_cli("bounds", "--data-root", root, "--device", "cpu", "--seeds", 2, "--out", tmp_path / "b")
    assert (tmp_path / "b" / "bounds.png").exists()
    assert len(read_records(tmp_path / "b")) == 2 * 2 * len(bounds.H)
    out = tmp_path / "t"
    run_cli("throughput", "--data-root", root, "--device", "cpu", "--depth", 8, "--iterations", 2, "--out", out)
    assert [r["config"]["at_once"] for r in read_records(out)] == [1, 2]
    assert throughput.measure([replace(TINY, train=72)], root, CPU, iterations=7) > 0  # more than an epoch has


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["depth", "--preset", "large", "--data-root", "."], "'large' is none of smoke, cpu, small, paper"),
        (["depth", "--data-root", ".", "--device", "abacus"], "abacus"),
        (["noise", "--data-root", ".", "--seeds", "11"], "--seeds"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and words in result.output


def test_stored_trials_belong_to_the_studies_as_they_are() -> None:
    presets = {name: (*PRESETS, *getattr(study, "ALSO", ())) for name, study in GRIDS.items()}
    known = {one.key: one for name, study in GRIDS.items() for p in presets[name] for one in study.trials(p, 10)}
    known |= {one.key: one for one in desk.trials()}
    for record in read_records(RESULTS / "trials"):
        assert record["config"] == known[record["key"]].config()
        loss = record["result"]["train_loss"]
        assert record["result"]["failed"] == train.failed(
            math.nan if loss is None else loss, known[record["key"]].class_count
        )


def test_report_is_made_of_the_stored_records() -> None:
    stored = (RESULTS / "REPORT.md").read_text()
    assert report.text(RESULTS) == stored
    # What speaks against a small h is said as well.
    assert re.search(r"relative to how far the features spread .* \+0\.156 \(.*\*\*refuted\*\*", stored)
