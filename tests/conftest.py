"""What every test runs under: one thread a worker, one seed a test, no network; and the page of what was verified."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import interpreter
from tests.helpers.coverage import Covered, page

torch.set_num_threads(1)
# A GPU's convolutions would round to ten bits what differs in the last one, and nothing could be compared.
torch.backends.cudnn.allow_tf32 = False
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then run on the CPU
    interpreter.mend()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Random weights and inputs are the same in every run and in every order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _frozen() -> None:
    """No collection of garbage goes over what is there before a test, most of it packages: a third of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def recompiled() -> Iterator[None]:
    """Nothing that was compiled before is found again, nor what this test compiles; Dynamo has its own limit.

    Importing timm.optim moves that of the process from 8 recompilations to a million.
    """
    import torch._dynamo.config

    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch.compiler.reset()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that ran, but for the ends of sums."""
    from eulernet.kernels._launch import Launch

    names: list[str] = []
    start = Launch.__call__

    def counted(self: Launch, tensors: tuple[Tensor | None, ...], h: float) -> None:
        names.extend({self.kernel.fn.__name__} - {"sum_parts"})
        start(self, tensors, h)

    monkeypatch.setattr(Launch, "__call__", counted)
    return names


@pytest.fixture
def cover(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Notes what a sweep test has verified of a model, where the table is to be written."""

    def note(library: str, group: str, model: str, specimen: Any, steps: Any, folded: int) -> None:
        if request.config.getoption("--write-coverage") is None:
            return
        import eulernet
        from tests.helpers.zoo import quiet

        with quiet():
            found = eulernet.find_steps(specimen.model, example_inputs=specimen.example)
        assert [(step.name, step.kind) for step in found] == [(step.name, step.kind) for step in steps]
        covered = Covered(library, group, model, len(found), len(found.long), len(found.unsupported), folded)
        record_property("coverage", tuple(covered))  # xdist sends builtin types only

    return note


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-coverage", type=Path, metavar="FILE", help="write the table of what the sweeps that run verified"
    )
    parser.addoption("--write-support", type=Path, metavar="FILE", help="write the page of what works with other tools")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    passed = [report for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    path: Path | None = config.getoption("--write-support")
    if path is not None:
        from tests.support import ROWS
        from tests.support.base import foot
        from tests.support.base import page as support

        numbers = {value for report in passed for name, value in report.user_properties if name == "support"}
        path.write_text(support(row for number, row in enumerate(ROWS) if number in numbers) + "\n" + foot())
        terminalreporter.write_line(f"{path}: {len(numbers)} of {len(ROWS)} lines")
    path = config.getoption("--write-coverage")
    if path is None:
        return
    rows = {Covered(*value) for report in passed for name, value in report.user_properties if name == "coverage"}
    path.write_text(page(sorted(rows), path.read_text() if path.exists() else ""))
    terminalreporter.write_line(f"{path}: {len(rows)} models")
