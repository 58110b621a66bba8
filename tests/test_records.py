"""What a record says of its data and of the code, and that trainings on different data are not mixed."""

import hashlib
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reproductions import records
from reproductions.data import batches, identity
from reproductions.errors import DataError
from reproductions.evidence.claims import Results, describe
from reproductions.presets import EULER, PLAIN
from reproductions.studies import fig6_choice_of_h, finetuning
from reproductions.training import grid
from reproductions.trial import Trial
from tests.helpers import small_data

CPU = torch.device("cpu")
COUNT = 40  # images a file
TINY = Trial(depth=8, size=8, batch_size=32, train=72, test=24, epochs=1, milestones=(), held_out=8, seed=0)
NEWS = Trial(data="ag-news", model="vdcnn", depth=9, size=64, batch_size=40, epochs=1, milestones=())


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_data.expect(monkeypatch, COUNT)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return small_data.write(tmp_path / "data", COUNT)


# ---- what a record says
def test_a_record_says_which_data_and_which_commit(root: Path, tmp_path: Path) -> None:
    (record,) = grid.run(grid.Place(tmp_path / "out", root, CPU), [TINY])
    train, test = batches._cifar10(root, False)
    digest = hashlib.sha256()
    for images in (train, test):
        digest.update(images.pixels.numpy().tobytes() + images.labels.numpy().astype("<i8").tobytes())
    assert record["data"] == {
        "name": "cifar10", "train": 200, "test": 40, "sha256": digest.hexdigest()[:16], "trained": 64, "tested": 24,
    }  # fmt: skip
    here = Path(records.__file__).parent
    head = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert record["environment"]["commit"].rstrip("+") == head[:12]


def test_outside_of_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "__file__", str(tmp_path / "reproductions" / "records.py"))
    records.commit.cache_clear()
    assert records.commit() == ""
    records.commit.cache_clear()


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (fig6_choice_of_h.cell("cpu", "resnet", 20, 0.1), "4,500 images of 16 x 16, 500 more held out; 2 epochs"),
        (fig6_choice_of_h.cell("paper", "resnet", 110, 0.1), "45,000 images of 32 x 32, 5,000 more held out; 80 epoch"),
        (finetuning.cell("cpu", EULER, 0.01), "2,511 images of 16 x 16, those of classes 5 to 9 among 5,000; 2 epochs"),
        (finetuning.cell("paper", PLAIN, 0.01), "25,000 images of 32 x 32, those of classes 5 to 9 among 50,000"),
        (replace(NEWS, size=0), "VDCNN-9; all training texts at hand of 1,024 letters"),
        (replace(NEWS, model="vdcnn-original"), "VDCNN-9 (the original one, He's initial values);"),
    ],
)  # fmt: skip
def test_a_row_says_what_was_trained_on(cell: Trial, words: str) -> None:
    assert words in describe([cell], 3)


def test_a_row_says_what_the_record_says(root: Path, tmp_path: Path) -> None:
    """Numbers that follow from the data alone, such as how many texts are left without repeated ones."""
    one = replace(NEWS, precision="tf32")
    found = Results(grid.run(grid.Place(tmp_path / "out", root, CPU), [one]))
    assert "80 training texts of 64 letters (0% of AG-NEWS); 1 epoch, fp32, 1 seed" in describe([one], 1, found)


@pytest.mark.parametrize(
    ("precision", "device", "words"),
    [
        ("tf32", "cpu (x86_64)", "80 epochs, fp32, "),
        ("tf32", "NVIDIA H100 80GB HBM3", "80 epochs, TF32 convolutions, "),
        ("bf16", "NVIDIA H100 80GB HBM3", "80 epochs, branches in bf16, "),
        ("fp32", "NVIDIA H100 80GB HBM3", "80 epochs, fp32, "),
    ],
)
def test_a_cpu_has_no_tf32(precision: Any, device: str, words: str) -> None:
    one = Trial(precision=precision)
    record = {"key": one.key, "config": one.config(), "result": {}, "environment": {"device": device}}
    assert words in describe([one], 3, Results([record]))


# ---- trainings on different data
def test_trainings_on_other_data_are_not_added_to_a_folder(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    first = grid.run(grid.Place(folder, root, CPU), [TINY])
    other = tmp_path / "other"
    shutil.copytree(root, other)
    path = other / "cifar-10-batches-bin" / "data_batch_1.bin"
    path.write_bytes(bytes([1]) + path.read_bytes()[1:])  # one label
    with pytest.raises(DataError, match=r"holds trials on another cifar10.*name another folder by --out"):
        grid.run(grid.Place(folder, other, CPU), [TINY, replace(TINY, seed=1)])
    assert records.read_records(folder) == first
    mixed = [*first, *grid.run(grid.Place(tmp_path / "second", other, CPU), [replace(TINY, seed=1)])]
    with pytest.raises(DataError, match=r"different cifar10 .* can't be compared: keep them in different folders"):
        Results(mixed)


def test_the_same_data_go_on_in_a_folder(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "copy")
    grid.run(grid.Place(tmp_path / "out", root, CPU), [TINY])
    assert len(grid.run(grid.Place(tmp_path / "out", tmp_path / "copy", CPU), [TINY, replace(TINY, seed=1)])) == 2


# ---- the official data
def test_a_part_of_the_texts_is_named_with_its_number(root: Path) -> None:
    said = identity.doubts("ag-news", root)
    assert any("train.csv is not the official file: 80 rows, the official one has 120,000" in line for line in said)


def test_labels_in_another_order_are_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = identity.doubts("cifar10", root)
    assert "other labels than the official CIFAR-10" in line
    labels = bytes(range(10)) * 4 * 6
    monkeypatch.setattr(identity, "LABELS", hashlib.sha256(labels).hexdigest())
    assert identity.doubts("cifar10", root) == []
    path = root / "cifar-10-batches-bin" / "test_batch.bin"
    content = bytearray(path.read_bytes())
    content[0], content[3073] = content[3073], content[0]
    path.write_bytes(bytes(content))
    assert len(identity.doubts("cifar10", root)) == 1


def test_official_files_are_known_by_their_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in identity.cifar10.FILES:
        (folder / name).write_bytes(name.encode())
        monkeypatch.setitem(identity.OFFICIAL, name, hashlib.md5(name.encode()).hexdigest())
    assert identity.doubts("cifar10", tmp_path) == []
    (folder / "data_batch_2").write_bytes(b"else")
    assert identity.doubts("cifar10", tmp_path) == [f"{folder / 'data_batch_2'} is not the official file"]
