"""Both data sets, small: fixtures of the tests that train."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from reproductions.data import ag_news as texts
from reproductions.data import batches as sources
from reproductions.data import cifar10 as data

COUNT = 320


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small files, and none of another test's data."""
    monkeypatch.setattr(data, "IMAGES_PER_FILE", COUNT)
    monkeypatch.setattr(texts, "TEST_ROWS", 24)
    cached = (sources._load, sources._cifar10, sources._ag_news)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture(scope="module", name="root")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both data sets, small."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (root / "cifar-10-batches-bin").mkdir()
    for name in [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]:
        labels = np.arange(COUNT) % 10
        pixels = rng.integers(0, 128, (COUNT, 3072)) + 12 * labels[:, None]
        records = np.concatenate([labels[:, None], pixels], axis=1).astype(np.uint8)
        (root / "cifar-10-batches-bin" / name).write_bytes(records.tobytes())
    (root / "ag_news").mkdir()
    for name, rows in (("train", 80), ("test", 24)):
        with (root / "ag_news" / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            for row in range(rows):
                words = rng.choice(["market", "goal", "chip", "war", "bank", "team"], 12)
                writer.writerow([row % 4 + 1, f"{name} {row}", " ".join(words)])
    return root
