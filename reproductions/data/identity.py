"""Which data a training had: numbers and a hash for its record, and whether they are the official ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from reproductions.data import ag_news, cifar10

# MD5 sums of the official files, as the loaders of torchvision and torchtext have them.
OFFICIAL = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "train.csv": "b1a00f826fdfbd249f79597b59e1dc12",
    "test.csv": "d52ea96a97a2d943681189a97654912d",
}
# No sums of the binary files of CIFAR-10 are published: the SHA-256 of their labels, 60,000 bytes.
LABELS = "3edb456524d5918aefded81f5aef7c32efab2a788211df998a4eb0c8957baa1f"
ROWS = {"train.csv": 120_000, "test.csv": 7_600}


def of_images(train: cifar10.Images, test: cifar10.Images) -> dict[str, Any]:
    """How many images there are, and the hash of all pixels and labels."""
    parts = [part for images in (train, test) for part in (images.pixels.numpy(), images.labels.numpy().astype("<i8"))]
    return _identity("cifar10", len(train.labels), len(test.labels), (part.tobytes() for part in parts))


def of_texts(train: ag_news.News, test: ag_news.News) -> dict[str, Any]:
    """How many texts there are, repeated ones once, and the hash of all texts and labels."""
    rows = (f"{y}\t{x}\n".encode() for news in (train, test) for x, y in zip(news.texts, news.labels, strict=True))
    return _identity("ag-news", len(train.texts), len(test.texts), rows)


def _identity(name: str, train: int, test: int, parts: Iterable[bytes]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return {"name": name, "train": train, "test": test, "sha256": digest.hexdigest()[:16]}


def doubts(name: str, root: Path) -> list[str]:
    """What is not official of a data set in a folder, in words; nothing where all is.

    Of binary files of CIFAR-10 the labels alone can be compared.
    """
    if name == "cifar10":
        folder = cifar10.folder_of(root)
        if folder.name == cifar10.BINARY:
            return _labels(folder)
        paths = [folder / file for file in cifar10.FILES]
    else:
        found = ag_news.folder_of(root)
        paths = [found / file for file in ROWS] if found else []
    said = []
    for path in paths:
        if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != OFFICIAL[path.name]:
            rows = ""
            if path.name in ROWS:
                rows = f": {len(ag_news.read_csv(path).texts):,} rows, the official one has {ROWS[path.name]:,}"
            said.append(f"{path} is not the official file{rows}")
    return said


def _labels(folder: Path) -> list[str]:
    labels = b"".join(bytes(images.labels.tolist()) for images in cifar10.load_cifar10(folder))
    if hashlib.sha256(labels).hexdigest() == LABELS:
        return []
    return [f"{folder} has other labels than the official CIFAR-10, or its images in another order"]
