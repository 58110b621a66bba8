"""The reproductions as a package: Fig. 1, records, statistics and the command line."""

import doctest
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from typer.testing import CliRunner

import eulernet
from reproductions import records
from reproductions.cli import app
from reproductions.data import cifar10 as data
from reproductions.data import two_moons as moons
from reproductions.evidence import statistics
from reproductions.evidence.statistics import Estimate
from reproductions.records import read_records, write_records
from reproductions.studies import fig1_euler as euler
from reproductions.studies import fig4_two_moon as two_moon

# ---- the package


@pytest.mark.parametrize(
    "module", [data, euler, moons, records, statistics, two_moon], ids=lambda module: module.__name__
)
def test_examples_in_docstrings_run(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


def test_the_library_does_not_import_the_reproductions() -> None:
    sources = Path(eulernet.__file__).parent.rglob("*.py")
    assert not [
        path for path in sources if re.search(r"^\s*(from|import) reproductions", path.read_text(), re.MULTILINE)
    ]


# ---- Fig. 1


@pytest.mark.parametrize("h", euler.STEP_SIZES)
def test_euler_states_are_powers_of_the_amplification_factor(h: float) -> None:
    states = euler.solve(h)
    assert states == pytest.approx([(1 - 2.3 * h) ** n for n in range(len(states))], rel=1e-12)
    assert 5.0 - h < h * (len(states) - 1) <= 5.0 + 1e-9


def test_euler_converges_with_order_one_and_is_unstable_beyond_its_limit() -> None:
    errors = [abs(euler.solve(h)[round(1 / h)] - math.exp(-2.3)) for h in (0.02, 0.01)]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)
    growing = {record["config"]["h"] for record in euler.run() if "grows" in euler.statements([record])[0]}
    assert growing == {h for h in euler.STEP_SIZES if h > 2 / 2.3} == {0.9}


def test_euler_command_in_a_fresh_process_writes_records_and_a_picture(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reproductions", "euler", "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
    written = read_records(tmp_path)
    assert [record["config"]["h"] for record in written] == [0.1, 0.3, 0.7, 0.9]
    largest = [record["result"]["largest_error"] for record in written]
    assert largest == sorted(largest) and largest[0] < 0.05
    assert (tmp_path / "euler.png").read_bytes().startswith(b"\x89PNG")


# ---- records and statistics


def test_records_are_lines_of_strict_json_and_keep_the_configuration_exact(tmp_path: Path) -> None:
    path = write_records(tmp_path, [{"config": {"h": 0.1234567}, "result": {"loss": [math.nan, 0.1234567], "n": 7}}])
    (line,) = path.read_text().splitlines()
    assert json.loads(line) == {"config": {"h": 0.1234567}, "result": {"loss": [None, 0.12346], "n": 7}}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (9, 2.26216), (30, 2.04227), (1000, 1.96234)]
)
def test_t_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    values = np.random.default_rng(0).normal(size=freedom + 1)
    found, error = Estimate.of(values.tolist()), values.std(ddof=1) / math.sqrt(len(values))
    assert (found.high - found.mean) / error == pytest.approx(quantile, rel=1e-5)
    assert (found.mean - found.low) / error == pytest.approx(quantile, rel=1e-5)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(size=(4000, 5))
    covered = sum(one.low < 0 < one.high for one in map(Estimate.of, draws[:500]))
    assert covered / 500 == pytest.approx(0.95, abs=0.04)  # 4 standard errors


# ---- CIFAR-10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["two-moon", "--preset", "paper"], "'paper' is none of smoke, small"),
        (["two-moon", "--seeds", "0"], "--seeds"),
        (["cifar10", "--data-root", ".", "--model", "resnet17"], "timm has no model 'resnet17'"),
        (["cifar10", "--data-root", ".", "--device", "abacus"], "abacus"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert words in result.output
