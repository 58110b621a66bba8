"""What every test runs under: one thread a worker, one seed a test, no network; and the page of what was verified."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch

from tests.helpers import interpreter
from tests.helpers.coverage import Covered, page

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then run on the CPU
    interpreter.mend()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Random weights and inputs are the same in every run and in every order of the tests."""
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-coverage", type=Path, metavar="FILE", help="write the table of what the sweeps that run verified"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    path: Path | None = config.getoption("--write-coverage")
    if path is None:
        return
    passed = [report for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    rows = {Covered(*value) for report in passed for name, value in report.user_properties if name == "coverage"}
    path.write_text(page(sorted(rows), path.read_text() if path.exists() else ""))
    terminalreporter.write_line(f"{path}: {len(rows)} models")
