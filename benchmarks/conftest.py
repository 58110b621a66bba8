"""One thread, and the versions and the processor in the JSON that pytest-benchmark writes."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the name of the machine is nobody's business
    packages = ("eulernet", "torch", "timm", "transformers")
    machine_info["versions"] = {name: importlib.metadata.version(name) for name in packages}
    machine_info["device"] = machine_info["cpu"].get("brand_raw", machine_info["machine"])
    machine_info["threads"] = 1
