"""Small data, for each test of the studies."""

from pathlib import Path

import pytest

from tests.helpers import small_data
from tests.helpers.studied import COUNT


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    small_data.expect(monkeypatch, COUNT)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.write(tmp_path_factory.mktemp("data"), COUNT)
