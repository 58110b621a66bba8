"""The data of the studies: texts, noise and batches."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from reproductions.data import ag_news as texts
from reproductions.data import batches as sources
from reproductions.data import cifar10 as data
from reproductions.data import noise as corrupt
from reproductions.data.ag_news import ALPHABET, load_ag_news, read_csv
from reproductions.errors import DataError
from reproductions.trial import Trial
from tests.helpers.studied import COUNT, CPU, TINY, source_of

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


def test_the_same_seed_gives_the_same_noise(root: Path) -> None:
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


def test_the_parts_of_the_data_are_those_asked_for(root: Path) -> None:
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
