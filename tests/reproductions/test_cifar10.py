"""CIFAR-10: its files, whole and damaged, and one training."""

import io
import os
import pickle
import sys
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import eulernet
from reproductions.cli import main
from reproductions.data import cifar10 as data
from reproductions.data.cifar10 import load_cifar10
from reproductions.errors import DataError
from reproductions.records import read_records
from reproductions.studies import timm_on_cifar10 as cifar10
from tests.helpers.studied import run_cli

COUNT = 4

BINARY = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]


# ---- CIFAR-10


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
