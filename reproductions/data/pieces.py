"""Pieces of the data sets, for trainings of a minute: bytes of AG-NEWS, images of CIFAR-10 shrunk to 16 x 16."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from reproductions.data.ag_news import load_ag_news
from reproductions.data.cifar10 import load_cifar10

HELD_OUT_TEXTS = 128
SIDE, IMAGES, TRAIN_IMAGES, HELD_OUT_IMAGES = 16, 32, 10_000, 2_000
SHRUNK = "cifar-10-16x16.npz"
Samples = tuple[Tensor, Tensor]  # what the network takes, and the labels of what it says


class Data(Protocol):
    """What one kind of network is trained and tested on."""

    @property
    def chance(self) -> float:
        """The loss that the frequencies of the labels give: that of a network that looks at nothing."""

    def batch(self, generator: torch.Generator) -> Samples: ...
    def held_out(self) -> Samples: ...


class Bytes:
    """The bytes of AG-NEWS, in pieces from anywhere, so many of so many bytes; each byte is to say the next one."""

    def __init__(self, data_root: str, texts: int = 8, context: int = 64) -> None:
        self.texts, self.context = texts, context
        news = zip(load_ag_news(data_root), (20_000, 2_000), strict=True)
        train, test = (np.frombuffer("\n".join(part.texts[:count]).encode(), np.uint8) for part, count in news)
        counts = np.bincount(train, minlength=256) + 1
        self.chance = -float(np.log(counts / counts.sum())[test].mean())
        self.train, self.test = (torch.from_numpy(part.copy()) for part in (train, test))

    def batch(self, generator: torch.Generator) -> Samples:
        return self._pieces(self.train, self.texts, generator)

    def held_out(self) -> Samples:
        return self._pieces(self.test, HELD_OUT_TEXTS, torch.Generator().manual_seed(7))

    def _pieces(self, data: Tensor, count: int, generator: torch.Generator) -> Samples:
        starts = torch.randint(0, len(data) - self.context, (count, 1), generator=generator)
        pieces = data[starts + torch.arange(self.context + 1)].long()
        return pieces[:, :-1], pieces[:, 1:]


class Pictures:
    """10,000 images of CIFAR-10 to train on and 2,000 to test, shrunk to 16 x 16."""

    chance = math.log(10)

    def __init__(self, data_root: str) -> None:
        with np.load(shrunk(Path(data_root))) as parts:
            self.parts = {name: torch.from_numpy(parts[name]) for name in parts}

    def batch(self, generator: torch.Generator) -> Samples:
        chosen = torch.randint(0, TRAIN_IMAGES, (IMAGES,), generator=generator)
        return self._normalised(self.parts["train"][chosen]), self.parts["train_labels"][chosen]

    def held_out(self) -> Samples:
        return self._normalised(self.parts["test"]), self.parts["test_labels"]

    def _normalised(self, pixels: Tensor) -> Tensor:
        return (pixels / 255 - 0.45) / 0.25


def shrunk(data_root: Path) -> Path:
    """The file of the shrunk images, made beside the data where it is missing."""
    path = data_root / SHRUNK
    if not path.exists():
        arrays: dict[str, Any] = {}
        for name, images, count in zip(
            ("train", "test"), load_cifar10(data_root), (TRAIN_IMAGES, HELD_OUT_IMAGES), strict=True
        ):
            small = nn.functional.adaptive_avg_pool2d(images.pixels[:count].float(), SIDE)
            arrays |= {name: small.round().byte().numpy(), f"{name}_labels": images.labels[:count].numpy()}
        np.savez(path, **arrays)
    return path


@lru_cache(maxsize=2)
def pieces(model: str, data_root: str, texts: int = 8, context: int = 64) -> Data:
    return Bytes(data_root, texts, context) if model == "gpt" else Pictures(data_root)
