"""What every test runs under: one thread a worker, one seed a test, no network; and the page of what was verified."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then run on the CPU


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Random weights and inputs are the same in every run and in every order of the tests."""
    torch.manual_seed(0)


# ---- docs/coverage.md: made of the sweep tests that passed, so that it cannot say more than they verified
class Covered(NamedTuple):
    """What a sweep test records of its model: `record_property("coverage", tuple(Covered(...)))`."""

    library: str  # "timm", "torchvision", "Hugging Face"
    group: str  # the module of timm, the family of torchvision, the model type of Hugging Face
    model: str
    steps: int
    long: int
    unsupported: int
    folded: int


SWEEPS = "tests/test_timm.py tests/test_torchvision.py tests/test_huggingface.py"
COMMAND = f"python -m pytest -n 2 {SWEEPS} --write-coverage docs/coverage.md"
PACKAGES = {"timm": "timm", "torchvision": "torchvision", "Hugging Face": "transformers"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-coverage", type=Path, metavar="FILE", help="write the table of what the sweeps verified")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    path: Path | None = config.getoption("--write-coverage")
    if path is None:
        return
    passed = [report for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    rows = {Covered(*value) for report in passed for name, value in report.user_properties if name == "coverage"}
    path.write_text(page(sorted(rows)))
    terminalreporter.write_line(f"{path}: {len(rows)} models")


HEAD = f"""# What was found and verified

Written by `{COMMAND}`.
A model is listed when its test passed: at random weights, patched at h = 0.3, it equals a reference that scales the
branches at run time; at h = 1 it is bit-identical to the original; after `unpatch` it is what it was; folded, and
patched with `preserve=True`, it computes what it computed. The number of its steps stands behind its name. *Long*
steps are left alone unless `include=` names them; *unsupported* additions are named by `find_steps` and never scaled;
*folded* is the share of the steps whose h the weights can absorb, and so `preserve` can make up for. The others end in
something that is not homogeneous, such as a gate on what it multiplies, and are named.
"""


def page(rows: list[Covered]) -> str:
    """The table as Markdown: one line a group of each library."""
    libraries: dict[str, dict[str, list[Covered]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        libraries[row.library][row.group].append(row)
    lines = [HEAD]
    for library, package in PACKAGES.items():
        groups = libraries[library]
        lines += [
            f"## {library}: {sum(map(len, groups.values()))} models ({package} {version(package)})\n",
            "| | models and their steps | long | unsupported | folded |",
            "| --- | --- | --: | --: | --: |",
        ]
        for name, group in groups.items():
            models = ", ".join(f"{row.model} {row.steps}" if row.model != name else str(row.steps) for row in group)
            long, unsupported, folded, steps = (
                sum(column) for column in zip(*((r.long, r.unsupported, r.folded, r.steps) for r in group), strict=True)
            )
            lines.append(f"| {name} | {models} | {long} | {unsupported} | {folded / steps:.0%} |")
        lines.append("")
    return "\n".join(lines)
