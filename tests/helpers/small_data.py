"""Both data sets of the studies, small, and such that there is something to learn."""

import csv
from pathlib import Path

import numpy as np
import pytest

from reproductions.data import ag_news, batches, cifar10

COUNT = 40  # images a file
TEXTS = 24  # test texts


def expect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loaders expect small files, and remember none of another test's data."""
    monkeypatch.setattr(cifar10, "IMAGES_PER_FILE", COUNT)
    monkeypatch.setattr(ag_news, "TEST_ROWS", TEXTS)
    for cached in (batches._load, batches._cifar10, batches._ag_news, batches.identify):
        cached.cache_clear()


def write(root: Path) -> Path:
    """Write both into a folder."""
    rng = np.random.default_rng(0)
    (root / "cifar-10-batches-bin").mkdir()
    for name in [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]:
        labels = np.arange(COUNT) % 10
        pixels = rng.integers(0, 128, (COUNT, 3072)) + 12 * labels[:, None]
        records = np.concatenate([labels[:, None], pixels], axis=1).astype(np.uint8)
        (root / "cifar-10-batches-bin" / name).write_bytes(records.tobytes())
    (root / "ag_news").mkdir()
    for name, rows in (("train", 80), ("test", TEXTS)):
        with (root / "ag_news" / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            for row in range(rows):
                words = rng.choice(["market", "goal", "chip", "war", "bank", "team"], 12)
                writer.writerow([row % 4 + 1, f"{name} {row}", " ".join(words)])
    return root
