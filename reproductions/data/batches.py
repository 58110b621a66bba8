"""Where a training's batches come from: the whole data set on the device, augmentation there.

What is random in an epoch is drawn beforehand, on the CPU, from the trial's seed and the epoch's number: the same on
every device, after every restart, and with no random numbers inside a captured graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from einops import reduce
from torch import Tensor, nn

from reproductions.data import identity
from reproductions.data import noise as corrupt
from reproductions.data.ag_news import encode, load_ag_news, near_duplicates
from reproductions.data.cifar10 import MEAN, STD, load_cifar10
from reproductions.trial import CLASSES, Trial

Samples = tuple[Tensor, Tensor]  # inputs as uint8, labels as int64


class Source:
    """The training samples and, by name, the samples to test on, all on the device."""

    data: Mapping[str, Any] = {}  # which data set it is, and how many of its samples are trained on and tested

    def __init__(self, train: Samples, tests: dict[str, Samples], device: torch.device) -> None:
        self.inputs, self.labels = (part.to(device) for part in train)
        self.tests = {name: (inputs.to(device), labels.to(device)) for name, (inputs, labels) in tests.items()}

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, seed: int, epoch: int) -> Tensor:
        """What is random in an epoch: int64, a row a sample, its first column the order of the samples."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return torch.stack([torch.randperm(len(self), generator=generator), *self._augment(generator)], dim=1)

    def _augment(self, generator: torch.Generator) -> list[Tensor]:
        return []

    def batch(self, drawn: Tensor) -> Samples:
        """The batch that some rows of `draw` say: what the network takes, and its labels."""
        return self.prepare(self.inputs[drawn[:, 0]]), self.labels[drawn[:, 0]]

    def prepare(self, inputs: Tensor) -> Tensor:
        """Stored inputs as the network takes them."""
        return inputs.long()


class ImageSource(Source):
    """Images: cropped after padding with an eighth of their side of black pixels, flipped, normalised."""

    def __init__(self, train: Samples, tests: dict[str, Samples], device: torch.device) -> None:
        super().__init__(train, tests, device)
        self.side = train[0].shape[-1]
        self.padding = self.side // 8
        self.inputs = nn.functional.pad(self.inputs, [self.padding] * 4)
        self.mean, self.std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
        self.places = torch.arange(self.side, device=device)

    def _augment(self, generator: torch.Generator) -> list[Tensor]:
        ends = (2 * self.padding + 1, 2 * self.padding + 1, 2)  # row, column, flip
        return [torch.randint(end, (len(self),), generator=generator) for end in ends]

    def batch(self, drawn: Tensor) -> Samples:
        index, row, column, flip = drawn.unbind(dim=1)
        rows = row[:, None] + self.places
        columns = column[:, None] + torch.where(flip[:, None] == 1, self.places.flip(0), self.places)
        n, channel = index[:, None, None, None], torch.arange(3, device=index.device)[:, None, None]
        return self.prepare(self.inputs[n, channel, rows[:, None, :, None], columns[:, None, None, :]]), self.labels[
            index
        ]

    def prepare(self, inputs: Tensor) -> Tensor:
        return (inputs.float() / 255 - self.mean) / self.std


@lru_cache(maxsize=32)
def _load(trial: Trial, root: Path, device: torch.device, download: bool) -> Source:
    train, tests = (_images if trial.data == "cifar10" else _texts)(trial, root, download)
    inputs, labels = train
    if trial.noise == "labels":
        generator = torch.Generator().manual_seed(trial.seed)
        labels = corrupt.labels(labels, trial.level, CLASSES[trial.data], generator)
    elif trial.noise:
        inputs = corrupt.corrupt(inputs, trial.noise, trial.level, trial.seed)
    if trial.held_out:
        tests["validation"] = inputs[-trial.held_out :], labels[-trial.held_out :]
        inputs, labels = inputs[: -trial.held_out], labels[: -trial.held_out]
    for kind, level in trial.probes:
        tests[f"{kind} {level:g}"] = corrupt.corrupt(tests["test"][0], kind, level, 0), tests["test"][1]
    source = (ImageSource if trial.data == "cifar10" else Source)((inputs, labels), tests, device)
    source.data = {**identify(trial.data, root, download), "trained": len(labels), "tested": len(tests["test"][1])}
    return source


_DATA_FIELDS = "data train test held_out size classes noise level probes".split()


def load(trial: Trial, root: Path, device: torch.device, download: bool = False) -> Source:
    """The source of a trial, shared with the trials that have the same data.

    Raises:
        DataError: a file is missing or damaged.
    """
    same = {name: getattr(trial, name) for name in _DATA_FIELDS}
    return _load(Trial(**same, seed=trial.seed if trial.noise else 0), root, device, download)


def check(names: Iterable[str], root: Path, download: bool = False) -> list[str]:
    """Read the data sets of these names, so that what is wrong with any is said before the first training.

    Returns:
        What of them is not official, in words.

    Raises:
        DataError: a file is missing or damaged.
    """
    said = []
    for name in names:
        (_cifar10 if name == "cifar10" else _ag_news)(root, download)
        said += identity.doubts(name, root)
    return said


@lru_cache(maxsize=2)
def identify(name: str, root: Path, download: bool = False) -> dict[str, Any]:
    """Which data set it is: its name, how many training and test samples it has, a hash of all of it."""
    if name == "cifar10":
        return identity.of_images(*_cifar10(root, download))
    return identity.of_texts(*_ag_news(root, download))


_cifar10 = lru_cache(maxsize=1)(load_cifar10)
_ag_news = lru_cache(maxsize=1)(load_ag_news)


def _images(trial: Trial, root: Path, download: bool) -> tuple[Samples, dict[str, Samples]]:
    train, test = (
        _part(_shrunk(images.pixels[: n or None], trial.size or 32), images.labels[: n or None], trial.classes)
        for images, n in zip(_cifar10(root, download), (trial.train, trial.test), strict=True)
    )
    return train, {"test": test}


def _shrunk(pixels: Tensor, side: int) -> Tensor:
    factor = pixels.shape[-1] // side
    if factor == 1:
        return pixels
    means = reduce(pixels.float(), "n c (y a) (x b) -> n c y x", "mean", a=factor, b=factor)
    return means.round().to(torch.uint8)


def _texts(trial: Trial, root: Path, download: bool) -> tuple[Samples, dict[str, Samples]]:
    train, test = _ag_news(root, download)
    texts, test_texts = train.texts[: trial.train or None], test.texts[: trial.test or None]
    encoded = [
        _part(encode(part, trial.size or 1024), torch.tensor(labels[: len(part)]), trial.classes)
        for part, labels in ((texts, train.labels), (test_texts, test.labels))
    ]
    near = torch.tensor(_near(tuple(texts), tuple(test_texts)))
    inputs, labels = encoded[1]
    distinct = {} if trial.classes else {"distinct": (inputs[~near], labels[~near])}
    return encoded[0], {"test": encoded[1], **distinct}


_near: Callable[..., tuple[bool, ...]] = lru_cache(maxsize=4)(near_duplicates)


def _part(inputs: Tensor, labels: Tensor, classes: tuple[int, ...]) -> Samples:
    """The samples of some classes, numbered from 0."""
    if not classes:
        return inputs, labels
    chosen = (labels >= classes[0]) & (labels < classes[1])
    return inputs[chosen], labels[chosen] - classes[0]
