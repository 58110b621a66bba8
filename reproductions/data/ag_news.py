"""AG-NEWS, from its csv files or from Hugging Face, as letters."""

from __future__ import annotations

import csv
import re
import string
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reproductions.errors import DataError

CLASSES = 4
TEST_ROWS = 7600
ALPHABET = string.ascii_lowercase + string.digits + string.punctuation  # 68 letters, numbered from 1
PADDING, UNKNOWN = 0, 69
_FOLDERS = ("", "ag_news", "ag_news_csv")
_HUB = "fancyzhx/ag_news"


@dataclass(frozen=True)
class News:
    """Texts and their classes 0 to 3."""

    texts: list[str]
    labels: list[int]


def load_ag_news(root: Path | str, download: bool = False) -> tuple[News, News]:
    """AG-NEWS, training and test texts.

    Title and description are stripped, and joined where neither is empty: in a part of the rows all text is in the
    description, and a space in front of it would give away the class. Repeated training texts are dropped.

    Args:
        root: the folder with `train.csv` and `test.csv`, or the one that holds it as `ag_news` or `ag_news_csv`.
        download: let Hugging Face `datasets` fetch the data where there are no such files.

    Raises:
        DataError: a file is missing or damaged.
    """
    root = Path(root)
    folder = folder_of(root)
    if folder is None and download:
        train, test = _from_hub("train"), _from_hub("test")
    elif folder is None:
        raise DataError(
            f"{root} holds no AG-NEWS: expected are the files train.csv and test.csv in it or in a folder "
            f"{' or '.join(filter(None, _FOLDERS))}. With a network, --download lets Hugging Face datasets fetch it."
        )
    else:
        train, test = read_csv(folder / "train.csv"), read_csv(folder / "test.csv")
        if len(test.texts) != TEST_ROWS:
            raise DataError(f"{folder / 'test.csv'} has {len(test.texts):,} rows; expected are {TEST_ROWS:,}.")
    first = dict(reversed([*zip(train.texts, range(len(train.texts)), strict=True)]))
    kept = sorted(first.values())
    return News([train.texts[i] for i in kept], [train.labels[i] for i in kept]), test


def folder_of(root: Path) -> Path | None:
    """The folder of the files, `root` or one in it; None where there is none."""
    return next((root / name for name in _FOLDERS if (root / name / "train.csv").is_file()), None)


def read_csv(path: Path) -> News:
    """The rows of an official file: a class from 1 to 4, a title, a description.

    Raises:
        DataError: the file is missing or damaged.
    """
    texts, labels = [], []
    expected = 'expected are rows "class","title","description" with a class from 1 to 4'
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.reader(file, strict=True), 1):
                if len(row) != 3:
                    raise DataError(f"{path}: row {number} has {len(row)} columns; {expected}.")
                if row[0] not in ("1", "2", "3", "4"):
                    raise DataError(f"{path}: row {number} has the class {row[0]!r}; {expected}.")
                texts.append(" ".join(filter(None, (part.strip() for part in row[1:]))))
                labels.append(int(row[0]) - 1)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {expected}.") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged after row {len(labels)}: {error}; {expected}.") from error
    if not texts:
        raise DataError(f"{path} is empty; {expected}.")
    return News(texts, labels)


def _from_hub(split: str) -> News:
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError("downloading AG-NEWS needs datasets; run: pip install datasets") from None
    try:
        rows = load_dataset(_HUB, split=split)
    except Exception as error:  # the hub raises errors of many kinds
        raise DataError(f"Hugging Face datasets could not fetch {_HUB}: {error}") from error
    return News([text.strip() for text in rows["text"]], list(rows["label"]))


def near_duplicates(train: Sequence[str], test: Sequence[str], words: int = 8, share: float = 0.9) -> tuple[bool, ...]:
    """For each test text, whether a training text is almost the same.

    Almost the same are texts that have `words` words in a row in common, and of their different words the `share`.
    Case and all that is neither letter nor digit do not count.

    Example:
        >>> near_duplicates(["One, two. Three four"], ["one two three FOUR", "one two three"], words=3)
        (True, False)
    """
    of_test = [_words(text) for text in test]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, found in enumerate(of_test):
        for row in _rows(found, words):
            holders[row].append(index)
    near = [False] * len(test)
    for text in train:
        own = _words(text)
        for index in {i for row in _rows(own, words) if row in holders for i in holders[row]}:
            if not near[index]:
                a, b = set(own), set(of_test[index])
                near[index] = len(a & b) >= share * len(a | b)
    return tuple(near)


def _words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _rows(words: list[str], length: int) -> list[tuple[str, ...]]:
    return [*zip(*(words[i:] for i in range(length)), strict=False)]


_NUMBERS = np.full(129, UNKNOWN, np.uint8)
_NUMBERS[[ord(letter) for letter in ALPHABET]] = np.arange(1, 69)


def encode(texts: Sequence[str], length: int) -> Tensor:
    """Texts as numbers of letters, uint8 of shape (texts, length): lower case, cut off or padded with zeros.

    A letter that is not in the alphabet of 68, the space for one, has the number 69.

    Example:
        >>> encode(["Ab c", "~"], 5).tolist()
        [[1, 2, 69, 3, 0], [68, 0, 0, 0, 0]]
    """
    letters = np.full((len(texts), length), PADDING, np.uint8)
    for row, text in zip(letters, texts, strict=True):
        codes = np.frombuffer(text.lower()[:length].encode("utf-32-le"), np.uint32)
        row[: len(codes)] = _NUMBERS[np.minimum(codes, 128)]
    return torch.from_numpy(letters)
