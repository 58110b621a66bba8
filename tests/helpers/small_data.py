"""Both data sets of the studies, small: fixtures of the tests that train."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from reproductions.data import ag_news, batches, cifar10

COUNT = 320  # images a file, where nothing else is asked for
TEXTS = 24  # test texts


def expect(monkeypatch: pytest.MonkeyPatch, count: int = COUNT) -> None:
    """Let the loaders expect small files, and remember none of another test's data."""
    monkeypatch.setattr(cifar10, "IMAGES_PER_FILE", count)
    monkeypatch.setattr(ag_news, "TEST_ROWS", TEXTS)
    forget()


def forget() -> None:
    for cached in (batches._load, batches._cifar10, batches._ag_news, batches.identify):
        cached.cache_clear()


def write(root: Path, count: int = COUNT) -> Path:
    """Write both into a folder, such that there is something to learn."""
    rng = np.random.default_rng(0)
    (root / "cifar-10-batches-bin").mkdir()
    for name in [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]:
        labels = np.arange(count) % 10
        pixels = rng.integers(0, 128, (count, 3072)) + 12 * labels[:, None]
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


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small files, and none of another test's data."""
    expect(monkeypatch)
    yield
    forget()


@pytest.fixture(scope="module", name="root")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both data sets, small."""
    return write(tmp_path_factory.mktemp("data"))
